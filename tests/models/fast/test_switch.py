"""Test that a CPU gives the same training step and features with all fast paths on and with all fast paths off."""

import copy
import subprocess
import sys

import pytest
import torch

from data.augment import Augmentation
from data.dataset import PatchBatch
from data.views import convert_hu_to_input
from models import cnn3d
from models import fast as switch
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.fast import fused, pairs
from models.fast.norm_elu import norm_elu as fast_norm_elu
from models.fast.pieces import PATCHES_AT_ONCE
from models.frozen import freeze_at_locations
from models.step import Descent, LocationTable, TrainingStep, make_optimizer

from ...conftest import ROOT, calibrate, step_views


def test_fast_paths_can_be_switched_off():
    assert switch.is_enabled()
    with switch.disable_fast_paths():
        assert not switch.is_enabled()
        with switch.disable_fast_paths():
            pass
        assert not switch.is_enabled()
    assert switch.is_enabled()
    code = "from models import fast as switch; print(switch.is_enabled())"
    for value, wanted in (("off", "False"), ("", "True")):
        environment = {"DRASCLR_FAST": value, "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", code]
        assert (
            subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True).stdout == f"{wanted}\n"
        )


def test_a_training_step_both_ways(monkeypatch, rel):
    """Train two steps with and without the fast paths, and compare losses, weights, statistics and queue."""
    torch.manual_seed(0)
    fast = DrasCLR(Encoder, 4, 16, 8, 2, 1, 12, 0.9, 0.2, True).train()
    plain = copy.deepcopy(fast)
    generator = torch.Generator().manual_seed(1)
    volumes = torch.randint(-1024, 241, (6, 3, 32, 32, 32), dtype=torch.int16, generator=generator)
    neighbors = torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]]).numpy()
    table = LocationTable.from_arrays(torch.rand(4, 3, generator=generator).numpy(), neighbors, torch.device("cpu"))
    taken = []
    monkeypatch.setattr(cnn3d, "fast_norm_elu", lambda *given: taken.append(fast_norm_elu(*given)) or taken[-1])

    def steps(model):
        descend, losses = Descent(make_optimizer(model, 0.01, 0.9, 1e-4)), []
        for step in range(2):
            batch = PatchBatch(0, 1, step, volumes[:, 0].contiguous(), volumes[:, 1:].contiguous())
            views = step_views(batch, Augmentation("agc"), 0, range(1), torch.device("cpu"))
            loss, figures, _ = TrainingStep(model, table)(1, views, 1.0)
            descend(loss)
            losses.append(figures)
        return torch.stack(losses)

    ours = steps(fast)
    assert sum(value is not None for value in taken) > 20
    taken.clear()
    with switch.disable_fast_paths():
        wanted = steps(plain)
    assert all(value is None for value in taken)
    assert rel(ours[0, :3], wanted[0, :3]) < 1e-5
    assert rel(ours[1, :3], wanted[1, :3]) < 1e-4  # a step amplifies rounding errors; the observed error is 1.6e-5
    for (name, value), other in zip(fast.state_dict().items(), plain.state_dict().values()):
        assert not other.is_floating_point() or float((value - other).norm()) < 1e-3 * float(other.norm()) + 1e-6, name


def test_extraction_with_and_without_fast_paths(monkeypatch, rel):
    torch.manual_seed(0)
    encoder = Encoder(24, 6, 2, 1)
    calibrate(encoder)
    hu = torch.randint(-1024, 241, (2 * PATCHES_AT_ONCE + 5, 32, 32, 32), dtype=torch.int16)
    frozen = freeze_at_locations(encoder, torch.tensor([[0.3, -0.2, 0.9]]))[0]
    called = []
    monkeypatch.setattr(
        fused,
        "_compile_fused_conv_elu",
        lambda *given, way=fused._compile_fused_conv_elu: called.append(1) or way(*given),
    )
    monkeypatch.setattr(pairs.fast, "is_enabled", lambda way=switch.is_enabled: called.append(2) or way())
    ours = frozen(hu, convert_hu_to_input)
    assert 1 in called and 2 in called
    called.clear()
    with switch.disable_fast_paths():
        wanted = frozen(hu, convert_hu_to_input)
    assert 1 not in called
    assert ours.shape == (2 * PATCHES_AT_ONCE + 5, 24) and rel(ours, wanted) < 1e-5
    with torch.no_grad():
        assert rel(ours, encoder(convert_hu_to_input(hu), torch.tensor([[0.3, -0.2, 0.9]]))[1]) < 1e-5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's memory settings are Linux's")
def test_memory_settings_follow_the_switch(monkeypatch):
    from models.fast import memory

    called = []
    monkeypatch.setattr(
        memory.ctypes, "CDLL", lambda _: type("C", (), {"mallopt": lambda *given: called.append(given)})
    )
    with switch.disable_fast_paths():
        memory.keep_freed_memory_in_process()
    assert not called
    memory.keep_freed_memory_in_process()
    assert len(called) == 3
