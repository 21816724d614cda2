"""Run the training steps of one rank as train.py does, for test_groups.py.

The batch of 16 samples is split into four BatchNorm groups, for any number of ranks.
"""

import copy
from pathlib import Path

import torch

from data.augment import Augmentation
from data.dataset import PatchDataset
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from misc import process
from misc.run.runlog import Meters
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.step import STATISTICS, Descent, LocationTable, TrainingStep, make_optimizer

from .conftest import step_views

BATCH, GROUPS = 16, 4


def state_of(model: DrasCLR) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), "subject": model.queue_subject, "step": model.queue_step}


def run_rank(rank: int, world: int, folder: str, steps: int, lr: float, neighbors: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    device = torch.device("cpu")
    torch.manual_seed(3)
    store = PatchStore(Path(folder) / "store")
    dataset = PatchDataset(store, neighbors)
    table = LocationTable.from_arrays(normalize_locations(store.locations), dataset.neighbors, device)
    sampler = LocationBatchSampler(store.num_subjects, store.num_locations, BATCH, 0, rank, world)
    model = DrasCLR(Encoder, store.num_locations, 16, 8, 2, 1, 16, 0.9, 0.2, True, bn_groups=GROUPS // world)
    descend = Descent(make_optimizer(model, lr, 0.9, 1e-4))
    parallel = process.wrap_data_parallel(TrainingStep(model, table), device).train()
    mine = range(rank * GROUPS // world, (rank + 1) * GROUPS // world)
    meters, means, gradients, batches = Meters(STATISTICS, device), [], None, []
    for epoch in range(-(-steps // len(sampler))):
        sampler.set_epoch(epoch)
        batches += [(epoch, index) for index in sampler]
    meters.start_epoch()
    for epoch, index in batches[:steps]:
        sampler.set_epoch(epoch)
        batch = dataset[index]
        views = step_views(batch, Augmentation("agc"), 0, mine, device)
        loss, figures, _ = parallel(batch.location, views, 1.0, batch.subjects)
        descend(loss)
        if gradients is None:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            first = copy.deepcopy(state_of(model))
        meters.add_statistics(figures)
        means.append(list(meters.compute_means_and_reset().values()))
    kept = {"means": torch.tensor(means), "gradients": gradients, "first": first, "state": state_of(model)}
    torch.save(kept, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
