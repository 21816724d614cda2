"""Our code for the frozen encoder's first two layers, against torch's convolutions of the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from models import first_layers
from models.frozen import PIECE, freeze

from .test_frozen import trained_encoder

needs_it = pytest.mark.skipif(first_layers.load() is None, reason="no C compiler, or a CPU without AVX512-BF16")


def layers(scale=0.3):
    torch.manual_seed(0)
    kernels = torch.randn(8, 1, 3, 3, 3) * scale, torch.randn(8, 8, 3, 3, 3) * scale
    biases = torch.randn(8) * scale, torch.randn(8) * scale
    return [tuple(value.bfloat16() for value in values) for values in (kernels, biases)]


def literal(x, kernels, biases):
    """In float64, rounded to bfloat16 after each layer."""
    for kernel, bias, stride in zip(kernels, biases, (1, 2)):
        x = F.elu(F.conv3d(x.double(), kernel.double(), bias.double(), stride, 1)).bfloat16()
    return x


@needs_it
@pytest.mark.parametrize("count", (1, 5))
def test_every_voxel_is_the_convolutions(count):
    kernels, biases = layers()
    x = (torch.rand(count, 1, 32, 32, 32) * 2 - 1).bfloat16()
    made = first_layers.first_layers(kernels, biases)(x)
    wanted = literal(x, kernels, biases)
    assert made.shape == wanted.shape == (count, 8, 16, 16, 16) and made.dtype == torch.bfloat16
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(made, wanted, rtol=2**-7, atol=0.03)  # one rounding of the layer between, anywhere
    error = (made.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < 1e-3  # most voxels are equal bit by bit


@needs_it
def test_one_voxel_at_a_time_reaches_what_it_should():
    """A corner, an edge, odd and even places: exact, because each sum has a single term and ELU no exponential."""
    kernels = torch.arange(1, 217).remainder(13).add(1).view(8, 1, 27).float()
    kernels = kernels.view(8, 1, 3, 3, 3).bfloat16(), torch.eye(8).view(8, 8, 1, 1, 1).expand(8, 8, 3, 3, 3).bfloat16()
    biases = torch.zeros(8).bfloat16(), torch.zeros(8).bfloat16()
    fast = first_layers.first_layers(kernels, biases)
    for place in ((0, 0, 0), (31, 31, 31), (0, 31, 16), (15, 16, 17), (30, 1, 31), (7, 8, 0)):
        x = torch.zeros(1, 1, 32, 32, 32).bfloat16()
        x[(0, 0, *place)] = 2
        assert torch.equal(fast(x), literal(x, kernels, biases)), place


@needs_it
def test_elu_from_end_to_end():
    """-1 far below zero, the number itself above, and the exponential between."""
    kernels = torch.zeros(8, 1, 3, 3, 3), torch.zeros(8, 8, 3, 3, 3)
    second = torch.tensor([-1e30, -200.0, -20.0, -1.0, -1e-3, 0.0, 3.0, 1e30])
    biases = torch.zeros(8).bfloat16(), second.bfloat16()
    fast = first_layers.first_layers(tuple(kernel.bfloat16() for kernel in kernels), biases)
    made = fast(torch.zeros(1, 1, 32, 32, 32).bfloat16())
    wanted = F.elu(second.bfloat16().double()).bfloat16()
    torch.testing.assert_close(made[0, :, 3, 4, 5], wanted, rtol=2**-8, atol=1e-7)


@needs_it
def test_what_is_no_number_stays_so():
    """Features of a diverged checkpoint must not look like features."""
    kernels, biases = layers()
    kernels[0][3, 0, 1, 1, 1] = torch.nan
    made = first_layers.first_layers(kernels, biases)(torch.ones(1, 1, 32, 32, 32).bfloat16())
    assert made.isnan().all()


@needs_it
def test_the_frozen_encoder_takes_it_and_means_the_same(monkeypatch):
    encoder, loc = trained_encoder(), torch.tensor([[0.5, -0.7, 0.1]])
    x = torch.rand(PIECE + 3, 1, 32, 32, 32) * 2 - 1
    ours = freeze(encoder, loc, torch.bfloat16)[0]
    monkeypatch.setattr(first_layers, "load", lambda: None)
    usual = freeze(encoder, loc, torch.bfloat16)[0]
    assert ours._first_two is not None and usual._first_two is None
    with torch.no_grad():
        exact = encoder(x, loc)[1]
    errors = []
    for frozen in (ours, usual):
        errors.append(float((frozen(x) - exact).norm() / exact.norm()))
    assert max(errors) < 1e-2 and errors[0] < 1.2 * errors[1]
    assert freeze(encoder, loc)[0]._first_two is None  # float32


@pytest.mark.parametrize("reason", ("no compiler", "a compiler that fails", "a cache that cannot be written"))
def test_without_it_nothing_is_said_and_features_are_made(monkeypatch, tmp_path, capfd, reason):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("file" if "cache" in reason else "cache")))
    if reason == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    elif reason == "a compiler that fails":
        monkeypatch.setenv("CC", "false")
    first_layers.load.cache_clear()
    try:
        frozen = freeze(trained_encoder(), torch.zeros(1, 3), torch.bfloat16)[0]
        assert first_layers.load() is None and frozen._first_two is None
        assert torch.isfinite(frozen(torch.rand(2, 1, 32, 32, 32))).all()
    finally:
        first_layers.load.cache_clear()
    assert capfd.readouterr() == ("", "")


@needs_it
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in (None, "false"):  # the second time no compiler is called
        first_layers.load.cache_clear()
        if compiler:
            monkeypatch.setattr(first_layers.subprocess, "run", None)
        try:
            assert first_layers.load() is not None
        finally:
            first_layers.load.cache_clear()
    assert [path.suffix for path in (tmp_path / "drasclr").iterdir()] == [".so"]
