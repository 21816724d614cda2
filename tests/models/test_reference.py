"""Reproduce the recorded steps of the published implementation with this package's modules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from misc import process
from models.builder import DrasCLR
from models.checkpoint import (
    add_module_prefix,
    build_query_encoder,
    export_optimizer_state,
    load_optimizer,
    load_strict,
    read_checkpoint,
    save_checkpoint,
    strip_module_prefix,
)
from models.cnn3d import Encoder
from models.step import make_optimizer

pytestmark = pytest.mark.reference


class Golden:
    def __init__(self, folder):
        self.folder = folder
        self.arrays = np.load(folder / "golden.npz")
        self.before = read_checkpoint(folder / "checkpoint_patch_0000.pth.tar")
        self.after = read_checkpoint(folder / "checkpoint_patch_0001.pth.tar")

    def __getitem__(self, name):
        value = self.arrays[name]
        return torch.from_numpy(value.astype(np.float32) if value.dtype == np.float16 else value)

    def number(self, name):
        return self.arrays[name].item()

    def build(self):
        number = self.number
        sizes = (number("rep_dim"), number("moco_dim"), number("E"), 1, number("K"), number("m"), number("T"))
        return DrasCLR(Encoder, number("L"), *sizes, mlp=True)


@pytest.fixture(scope="module")
def golden(reference):
    return Golden(reference / "train")


def is_convolution_bias(name):
    """Return whether a parameter is a bias in front of BatchNorm, whose gradient is zero in exact arithmetic."""
    return "conv" in name and name.endswith(".bias") and "_routing_fn" not in name


@pytest.fixture(scope="module", params=["one process", "DistributedDataParallel"])
def replayed(golden, request, tmp_path_factory):
    """Repeat two recorded training steps; return the results of each step and the state after both steps."""
    bare = golden.build()
    load_strict(bare, strip_module_prefix(golden.before["state_dict"]), "before")
    optimizer = make_optimizer(bare, 0.01, 0.9, 1e-4)
    load_optimizer(optimizer, golden.before["optimizer"], golden.folder)
    model = bare
    if request.param == "DistributedDataParallel":
        store = tmp_path_factory.mktemp("group") / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        model = process.wrap_data_parallel(bare, torch.device("cpu"))
        assert isinstance(model, nn.parallel.DistributedDataParallel)
    model.train()
    steps = []
    locations = golden["loc"]
    for step in range(golden.number("steps")):
        index = golden.number(f"step{step}_location")
        here, near = locations[index : index + 1], locations[golden[f"step{step}_neighbor_idx"]][None]
        patch, neighbor, labels = model(
            index,
            [golden[f"step{step}_query"], here],
            [golden[f"step{step}_key"], here],
            [golden[f"step{step}_neighbors"], near],
        )
        losses = F.cross_entropy(patch, labels), F.cross_entropy(neighbor, labels)
        optimizer.zero_grad()
        (losses[0] + golden.number("beta") * losses[1]).backward()
        gradients = {name: float(p.grad.norm()) for name, p in bare.encoder_q.named_parameters()}
        optimizer.step()
        steps.append((patch.detach(), neighbor.detach(), *(float(loss.detach()) for loss in losses), gradients))
    if request.param == "DistributedDataParallel":
        torch.distributed.destroy_process_group()
    return steps, add_module_prefix(bare.state_dict()), export_optimizer_state(optimizer)


@pytest.mark.parametrize("step", [0, 1])
def test_logits_and_losses(golden, replayed, rel, step):
    patch, neighbor, loss_patch, loss_neighbor, _ = replayed[0][step]
    assert rel(patch, golden[f"step{step}_logits_patch"]) < 1e-4
    assert rel(neighbor, golden[f"step{step}_logits_neighbor"]) < 1e-4
    assert loss_patch == pytest.approx(golden.number(f"step{step}_loss_patch"), rel=1e-4)
    assert loss_neighbor == pytest.approx(golden.number(f"step{step}_loss_neighbor"), rel=1e-4)


def test_gradient_norms(golden, replayed):
    gradients = replayed[0][0][4]
    names = golden.arrays["grad_names"].tolist()
    assert len(names) == len(gradients) == 82
    biases = 0
    for name, wanted in zip(names, golden.arrays["grad_norms_step0"]):
        if is_convolution_bias(name):
            biases += 1
            assert gradients[name] < 1e-4, name
        else:
            assert gradients[name] == pytest.approx(wanted, rel=1e-3), name
    assert biases == 13


def test_weights_statistics_and_queue_after_two_steps(golden, replayed, rel):
    state = replayed[1]
    wanted = golden.after["state_dict"]
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and state[name].shape == tensor.shape, name
        if not tensor.is_floating_point():
            assert torch.equal(state[name], tensor), name
        elif is_convolution_bias(name):
            assert float((state[name] - tensor).abs().max()) < 1e-4, name
        else:
            assert rel(state[name], tensor) < 1e-4, name


def test_optimizer_state_after_two_steps(golden, replayed, rel):
    ours, wanted = replayed[2], golden.after["optimizer"]
    assert sorted(ours["state"]) == sorted(wanted["state"]) == list(range(82))
    (group,), (wanted_group,) = ours["param_groups"], wanted["param_groups"]
    assert group == wanted_group and len(group["params"]) == 164
    names = [name for name, _ in golden.build().encoder_q.named_parameters()]
    for index, entry in wanted["state"].items():
        assert list(ours["state"][index]) == list(entry)
        buffer = ours["state"][index]["momentum_buffer"]
        if not is_convolution_bias(names[index]):
            assert rel(buffer, entry["momentum_buffer"]) < 1e-3, names[index]


def test_features_in_eval_mode(golden, rel):
    encoder, sizes = build_query_encoder(Encoder, golden.after, "after")
    assert sizes == {"rep_dim": 32, "moco_dim": 16, "num_experts": 2, "num_coordinates": 1, "mlp": True}
    with torch.no_grad():
        z, h = encoder(golden["eval_patches"], golden["loc"])
    assert rel(h, golden["eval_h"]) < 1e-5
    assert rel(z, golden["eval_z"]) < 1e-5


def test_checkpoints_have_the_published_format(golden, tmp_path):
    """Compare keys, shapes and dtypes of state_dict and optimizer before the first step."""
    model = golden.build()
    optimizer = make_optimizer(model, 0.01, 0.9, 1e-4)
    path = tmp_path / "c.pth.tar"
    save_checkpoint(
        path,
        {
            "epoch": 0,
            "arch": "custom",
            "state_dict": add_module_prefix(model.state_dict()),
            "optimizer": export_optimizer_state(optimizer),
        },
    )
    ours, wanted = torch.load(path, weights_only=True), golden.before
    assert list(ours) == list(wanted)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in ours["state_dict"].items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in wanted["state_dict"].items()}
    assert ours["optimizer"] == wanted["optimizer"]
