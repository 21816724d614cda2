"""Run two training steps on one rank, for test_distributed.py."""

import torch
import torch.nn.functional as F

from misc import process
from models.builder import DrasCLR
from models.cnn3d import Encoder

L, K, TOTAL, NEAR = 3, 16, 8, 2


def inputs(step):
    generator = torch.Generator().manual_seed(100 + step)
    patches = torch.randn(2, TOTAL, 1, 32, 32, 32, generator=generator)
    neighbors = torch.randn(TOTAL, NEAR, 32, 32, 32, generator=generator)
    locs = torch.rand(TOTAL, 1 + NEAR, 3, generator=generator) * 2 - 1
    return patches[0], patches[1], neighbors, locs


def run_rank(rank, world, folder, mode):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    torch.manual_seed(1000 + rank)  # ranks start with different weights, which wrap_data_parallel must make equal
    bare = DrasCLR(Encoder, L, 6, 4, 2, 1, K, 0.9, 0.2, True)
    bare.load_state_dict(torch.load(f"{folder}/start.pt", weights_only=True) if rank == 0 else bare.state_dict())
    model = process.wrap_data_parallel(bare, torch.device("cpu"))
    model.train(mode != "eval")
    share = TOTAL // world
    mine = slice(rank * share, (rank + 1) * share)
    encoded = []
    bare.encoder_k.register_forward_pre_hook(lambda _, given: encoded.append((given[0].clone(), given[1].clone())))
    optimizer = torch.optim.SGD(bare.parameters(), 0.05)
    losses, gradients = [], None
    for step in range(2):
        query, key, neighbors, locs = inputs(step)
        if mode == "rows":  # one location per sample
            here, near = locs[mine, 0], locs[mine, 1:]
        else:
            here, near = locs[:1, 0], locs[:1, 1:]
        logits = model(step, [query[mine], here], [key[mine], here], [neighbors[mine], near])
        loss = F.cross_entropy(logits[0], logits[2]) + F.cross_entropy(logits[1], logits[2])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(process.all_reduce_mean(loss.detach().clone()).item())
    torch.save(
        {"losses": losses, "gradients": gradients, "state": bare.state_dict(), "encoded": encoded},
        f"{folder}/rank{rank}.pt",
    )
    torch.distributed.destroy_process_group()
