"""Test that a run can start from another run's encoder, and that errors name the flag to change."""

import pytest
import torch

from misc import process
from misc.run.resume import ResumeError, describe_initialization
from models.builder import DrasCLR
from models.checkpoint import CheckpointError, add_module_prefix, save_checkpoint
from models.cnn3d import Encoder
from models.state import Started, TrainingState, load_initial_weights


def model(locations=6, rep_dim=8, moco_dim=4, experts=2, keys=6, mlp=True, seed=0):
    torch.manual_seed(seed)
    return DrasCLR(Encoder, locations, rep_dim, moco_dim, experts, 1, keys, 0.9, 0.2, mlp)


@pytest.fixture
def weights(tmp_path):
    """Write a checkpoint after three epochs; return its path and model."""
    given = model()
    path = tmp_path / "checkpoint_patch_0003.pth.tar"
    save_checkpoint(path, {"epoch": 3, "state_dict": add_module_prefix(given.state_dict())})
    return path, given


def differing_names(first, second, part=""):
    other = second.state_dict()
    return {name for name, value in first.state_dict().items() if part in name and not torch.equal(value, other[name])}


def test_another_queue_and_other_locations(weights):
    path, given = weights
    fresh = model(locations=9, keys=12, seed=1)
    queue = fresh.state_dict()["queue"].clone()
    started = load_initial_weights(fresh, path)
    assert not differing_names(fresh.encoder_q, given.encoder_q) and not differing_names(
        fresh.encoder_k, given.encoder_q
    )
    assert torch.equal(fresh.state_dict()["queue"], queue)
    assert started == Started(3, True, (6, 6))
    assert describe_initialization(path, *started) == (
        f"starting from the encoder of {path} after 3 epochs, projection also loaded; queue and optimiser start fresh "
        "(the checkpoint's queue of 6 locations with 6 keys each is not loaded)"
    )


@pytest.mark.parametrize("choice", [dict(moco_dim=5), dict(mlp=False)])
def test_a_projection_of_another_size_is_not_copied(weights, choice):
    path, given = weights
    fresh, untouched = model(**choice, seed=1), model(**choice, seed=1)
    started = load_initial_weights(fresh, path)
    assert "projection not loaded, because its size differs" in describe_initialization(path, *started)
    assert not differing_names(fresh.encoder_q.fc, untouched.encoder_q.fc)
    assert not differing_names(fresh.encoder_q.conv4, given.encoder_q.conv4)
    assert not differing_names(fresh.encoder_k, fresh.encoder_q)


@pytest.mark.parametrize(
    ("choice", "advice"), [(dict(rep_dim=16), "use --rep-dim 8"), (dict(experts=3), "use --num-experts 2")]
)
def test_another_encoder_is_refused_with_the_flag_to_change(weights, choice, advice):
    with pytest.raises(ResumeError, match=advice):
        load_initial_weights(model(**choice), weights[0])


def test_non_finite_weights_are_refused(weights, tmp_path):
    _, given = weights
    with torch.no_grad():
        given.encoder_q.conv4.weight[0, 0, 0, 0, 0, 0] = float("nan")
    save_checkpoint(tmp_path / "bad.pth.tar", {"state_dict": given.state_dict()})
    with pytest.raises(CheckpointError, match="not finite"):
        load_initial_weights(model(), tmp_path / "bad.pth.tar")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_initial_weights(model(), tmp_path / "none.pth.tar")


def test_a_delayed_save_writes_the_state_at_the_call(tmp_path):
    given = model()
    optimizer = torch.optim.SGD(given.encoder_q.parameters(), lr=0.1, momentum=0.9)
    optimizer.zero_grad()
    given.encoder_q(torch.randn(3, 1, 32, 32, 32), torch.zeros(1, 3))[0].sum().backward()
    optimizer.step()
    state = TrainingState(given, optimizer, torch.device("cpu"), "custom", {"lr": 0.1, "gamma": [0.5, 4.5]})
    state.save(tmp_path / "now.pth.tar", 1, 4)
    write = state.copy_for_saving(tmp_path / "later.pth.tar", 1, 4)
    with torch.no_grad():
        for value in (*given.parameters(), *given.buffers()):
            value.zero_()
    write()
    now, later = (torch.load(tmp_path / f"{name}.pth.tar", weights_only=True) for name in ("now", "later"))
    assert set(now) == set(later) and now["config"] == later["config"] and now["step"] == later["step"]
    for name, value in now["state_dict"].items():
        assert torch.equal(value, later["state_dict"][name]) and value.stride() == later["state_dict"][name].stride()
    for index, entry in now["optimizer"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], later["optimizer"]["state"][index]["momentum_buffer"])
    assert torch.equal(now["rng_state"], later["rng_state"])


def test_arithmetic_settings_reach_torch():
    try:
        process.set_arithmetic(tf32=True, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        process.set_arithmetic(tf32=False, deterministic=False)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
