"""Test that one, two and four ranks compute the same results with BatchNorm groups."""

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from misc.command import UserError
from misc.sizes import choose_bn_groups
from models import fast
from models.cnn3d import Encoder, norm_elu
from models.step import STATISTICS

from . import group_steps
from .conftest import run_ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store, grid):
    folder = tmp_path_factory.mktemp("groups")
    make_store(folder / "store", 17, grid, seed=1)
    return folder / "store"


def results_of(store, folder, world, steps, lr, neighbors):
    folder.mkdir()
    shutil.copytree(store, folder / "store")
    run_ranks(group_steps.run_rank, world, folder, steps, lr, neighbors)
    shutil.rmtree(folder / "store")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def relative_difference(ours, wanted):
    return float((ours.double() - wanted.double()).norm()) / max(float(wanted.double().norm()), 1e-12)


@pytest.fixture(scope="module")
def learning(store, tmp_path_factory):
    """Run three steps at learning rate 0.01 on 1, 2 and 4 ranks; save gradients and state after the first step."""
    folder = tmp_path_factory.mktemp("learning")
    return {world: results_of(store, folder / str(world), world, 3, 0.01, 2)[0] for world in (1, 2, 4)}


@pytest.fixture(scope="module")
def standing(store, tmp_path_factory):
    """Run five steps at learning rate 0 with one neighbour per patch."""
    folder = tmp_path_factory.mktemp("standing")
    return {world: results_of(store, folder / str(world), world, 5, 0, 1)[0] for world in (1, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_one_step_is_the_same_on_any_number_of_ranks(learning, world):
    """Statistics, gradients, BatchNorm buffers and the queue differ by less than 1e-5 from those of one rank."""
    one, several = learning[1], learning[world]
    torch.testing.assert_close(several["means"][0], one["means"][0], rtol=1e-5, atol=1e-4)
    assert one["gradients"].keys() == several["gradients"].keys() and len(one["gradients"]) == 82
    for name, wanted in one["gradients"].items():
        # The 13 biases before BatchNorm have a gradient of 0 apart from rounding.
        least = 1e-4 if ".conv" in name and name.endswith("bias") and "routing" not in name else 1e-6
        assert float((several["gradients"][name] - wanted).norm()) < 1e-5 * float(wanted.norm()) + least, name
    for name, wanted in one["first"].items():
        if "running" in name or name in ("queue", "queue_ptr", "subject", "step"):
            assert relative_difference(several["first"][name], wanted) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_five_steps_without_learning(standing, world):
    one, several = standing[1], standing[world]
    torch.testing.assert_close(several["means"][:, :3], one["means"][:, :3], rtol=1e-4, atol=0)
    for name, wanted in one["state"].items():
        if "running" in name or name in ("queue", "queue_ptr", "subject", "step"):
            assert relative_difference(several["state"][name], wanted) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_first_learning_steps_agree(learning, world):
    """Only the first two steps are compared closely, because rounding makes later steps diverge."""
    difference = (learning[world]["means"][:, 2] / learning[1]["means"][:, 2] - 1).abs()
    assert float(difference[:2].max()) < 1e-3


@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (4, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("channels", [8, 64])
def test_each_group_has_its_own_statistics(groups, blocks, quick, channels):
    """Compare values and gradients with one BatchNorm layer per group.

    Only BatchNorm group 0 updates the running statistics."""
    torch.manual_seed(0)
    norm, singles = nn.BatchNorm3d(channels).double(), [nn.BatchNorm3d(channels).double() for _ in range(groups)]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    for single in singles:
        single.load_state_dict(norm.state_dict())
    x = torch.randn(blocks * groups * 3, channels, 4, 4, 4, dtype=torch.float64) * 2 + 1
    x = x.contiguous(memory_format=torch.channels_last_3d)
    ours, theirs = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn_like(x)
    with contextlib.nullcontext() if quick else fast.disable_fast_paths():
        y = torch.cat(norm_elu(norm, ours.chunk(blocks), groups))
    (y * weights).sum().backward()
    numbers = torch.arange(len(x)).view(blocks, groups, 3)
    wanted = torch.empty_like(x)
    for group, single in enumerate(singles):
        rows = numbers[:, group].flatten()
        part = F.elu(single(theirs[rows]))
        (part * weights[rows]).sum().backward()
        wanted[rows] = part.detach()
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
    for name in ("weight", "bias"):
        total = sum(getattr(single, name).grad for single in singles)
        torch.testing.assert_close(getattr(norm, name).grad, total, rtol=1e-9, atol=1e-10)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(singles[0], name), rtol=1e-10, atol=1e-12)


def test_neighbours_share_the_group_of_their_patches():
    """Input in location-major order and input with one location per sample give the same groups of subjects."""
    torch.manual_seed(0)
    encoder = Encoder(8, 4, 2, 1).double().train()
    encoder.bn_groups = 2
    k, batch = 3, 4
    volumes = torch.randn(batch, k, 32, 32, 32, dtype=torch.float64)
    locs = torch.rand(k, 3, dtype=torch.float64)
    by_location = encoder(volumes.transpose(0, 1).reshape(k * batch, 1, 32, 32, 32), locs)[1].view(k, batch, -1)
    by_sample = encoder(volumes.reshape(batch * k, 1, 32, 32, 32), locs.repeat(batch, 1))[1].view(batch, k, -1)
    torch.testing.assert_close(by_location.transpose(0, 1), by_sample, rtol=1e-9, atol=1e-10)
    encoder.bn_groups = 1
    assert not torch.allclose(encoder(volumes[:, :1], locs[:1])[1], by_sample[:, 0])


@pytest.mark.parametrize(
    ("given", "batch", "ranks", "wanted"),
    [
        (None, 128, 1, 4),
        (None, 128, 4, 4),
        (None, 128, 8, 8),
        (None, 16, 2, 4),
        (None, 6, 1, 3),
        (None, 6, 2, 2),
        (None, 3, 1, 1),
        (None, 10, 1, 2),
        (2, 16, 1, 2),
        (1, 16, 1, 1),
        (8, 16, 2, 8),
    ],
)
def test_number_of_groups(given, batch, ranks, wanted):
    assert choose_bn_groups(given, batch, ranks) == wanted


@pytest.mark.parametrize(
    ("given", "batch", "ranks", "message"),
    [
        (3, 12, 2, "--bn-groups 3 must be a multiple of the 2 ranks"),
        (4, 10, 1, "--bn-groups 4 must be a divisor of --batch-size 10"),
        (8, 8, 1, "--bn-groups 8 must be at most half of --batch-size 8"),
    ],
)
def test_invalid_group_numbers_are_refused(given, batch, ranks, message):
    with pytest.raises(UserError, match=message):
        choose_bn_groups(given, batch, ranks)


def test_order_of_the_statistics():
    assert STATISTICS[:5] == ("loss_patch", "loss_neighbor", "loss", "accuracy_patch", "accuracy_neighbor")
