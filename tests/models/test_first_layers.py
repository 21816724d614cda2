"""Our code for the frozen encoder's first two layers, against torch's convolutions of the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from models import first_layers
from models.frozen import PIECE, freeze

from .test_frozen import trained_encoder

needs_it = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                first_layers.load(dtype) is None, reason="no C compiler, or a CPU without AVX-512 or AVX512-BF16"
            ),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
)


def layers(dtype, scale=0.3):
    torch.manual_seed(0)
    kernels = torch.randn(8, 1, 3, 3, 3) * scale, torch.randn(8, 8, 3, 3, 3) * scale
    biases = torch.randn(8) * scale, torch.randn(8) * scale
    return [tuple(value.to(dtype) for value in values) for values in (kernels, biases)]


def literal(x, kernels, biases):
    """In float64, rounded to the dtype after each layer."""
    dtype = x.dtype
    for kernel, bias, stride in zip(kernels, biases, (1, 2)):
        x = F.elu(F.conv3d(x.double(), kernel.double(), bias.double(), stride, 1)).to(dtype)
    return x


@needs_it
@pytest.mark.parametrize("count", (1, 5))
def test_every_voxel_is_the_convolutions(count, dtype):
    kernels, biases = layers(dtype)
    x = (torch.rand(count, 1, 32, 32, 32) * 2 - 1).to(dtype)
    made = first_layers.first_layers(kernels, biases)(x)
    wanted = literal(x, kernels, biases)
    assert made.shape == wanted.shape == (count, 8, 16, 16, 16) and made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    error = (made.double() - wanted.double()).norm() / wanted.double().norm()
    if dtype == torch.float32:
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=3e-6)
        assert error < 5e-7
    else:  # one rounding of the layer between, anywhere; but most voxels are equal bit by bit
        torch.testing.assert_close(made, wanted, rtol=2**-7, atol=0.03)
        assert error < 1e-3


@needs_it
def test_one_voxel_at_a_time_reaches_what_it_should(dtype):
    """A corner, an edge, odd and even places: exact, because each sum has a single term and ELU no exponential."""
    kernels = torch.arange(1, 217).remainder(13).add(1).view(8, 1, 3, 3, 3), torch.eye(8).view(8, 8, 1, 1, 1)
    kernels = kernels[0].to(dtype), kernels[1].expand(8, 8, 3, 3, 3).to(dtype)
    biases = torch.zeros(8).to(dtype), torch.zeros(8).to(dtype)
    fast = first_layers.first_layers(kernels, biases)
    for place in ((0, 0, 0), (31, 31, 31), (0, 31, 16), (15, 16, 17), (30, 1, 31), (7, 8, 0)):
        x = torch.zeros(1, 1, 32, 32, 32).to(dtype)
        x[(0, 0, *place)] = 2
        assert torch.equal(fast(x), literal(x, kernels, biases)), place


@needs_it
def test_patches_do_not_see_each_other(dtype):
    kernels, biases = layers(dtype)
    x = (torch.rand(3, 1, 32, 32, 32) * 2 - 1).to(dtype)
    fast = first_layers.first_layers(kernels, biases)
    assert torch.equal(fast(x), torch.cat([fast(x[index : index + 1]) for index in range(3)]))


@needs_it
def test_elu_from_end_to_end(dtype):
    """-1 far below zero, the number itself above, and the exponential between."""
    kernels = torch.zeros(8, 1, 3, 3, 3).to(dtype), torch.zeros(8, 8, 3, 3, 3).to(dtype)
    for numbers in ([-1e30, -200.0, -20.0, -1.0, -1e-3, 0.0, 3.0, 1e30], torch.linspace(-9, -0.01, 8).tolist()):
        second = torch.tensor(numbers).to(dtype)
        fast = first_layers.first_layers(kernels, (torch.zeros(8).to(dtype), second))
        made = fast(torch.zeros(1, 1, 32, 32, 32).to(dtype))
        wanted = F.elu(second.double()).to(dtype)
        rtol = 5e-7 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(made[0, :, 3, 4, 5], wanted, rtol=rtol, atol=2e-7)


@needs_it
def test_what_is_no_number_stays_so(dtype):
    """Features of a diverged checkpoint must not look like features."""
    kernels, biases = layers(dtype)
    kernels[0][3, 0, 1, 1, 1] = torch.nan
    made = first_layers.first_layers(kernels, biases)(torch.ones(1, 1, 32, 32, 32).to(dtype))
    assert made.isnan().all()


@needs_it
def test_other_patches_are_refused(dtype):
    """The C code takes the sizes for granted."""
    fast = first_layers.first_layers(*layers(dtype))
    other = torch.float16
    for x in (torch.zeros(1, 1, 32, 32, 16).to(dtype), torch.zeros(1, 32, 32, 32).to(dtype)):
        with pytest.raises(ValueError, match=r"patches are \(B, 1, 32, 32, 32\)"):
            fast(x)
    with pytest.raises(ValueError, match="float16"):
        fast(torch.zeros(1, 1, 32, 32, 32, dtype=other))


@needs_it
def test_the_frozen_encoder_takes_it_and_means_the_same(monkeypatch, dtype, one_thread):
    encoder, loc = trained_encoder(), torch.tensor([[0.5, -0.7, 0.1]])
    x = torch.rand(PIECE + 3, 1, 32, 32, 32) * 2 - 1
    ours = freeze(encoder, loc, dtype)[0]
    monkeypatch.setattr(first_layers, "load", lambda dtype: None)
    usual = freeze(encoder, loc, dtype)[0]
    assert ours._first_two is not None and usual._first_two is None
    with torch.no_grad():
        exact = encoder(x, loc)[1]
    errors = [float((frozen(x) - exact).norm() / exact.norm()) for frozen in (ours, usual)]
    assert max(errors) < (1e-5 if dtype == torch.float32 else 1e-2) and errors[0] < 2 * errors[1]


@pytest.mark.parametrize("compiler", ("", "false", "no-such-compiler", "true", 'gcc "'))
def test_without_it_nothing_is_said_and_features_are_made(monkeypatch, tmp_path, capfd, fresh, compiler):
    monkeypatch.setenv("CC", compiler)  # 'true' succeeds and makes nothing
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    frozen = freeze(trained_encoder(), torch.zeros(1, 3), torch.bfloat16)[0]
    assert first_layers.compiled() is None and frozen._first_two is None
    assert torch.isfinite(frozen(torch.rand(2, 1, 32, 32, 32))).all()
    assert capfd.readouterr() == ("", "")


@needs_it
def test_it_is_compiled_once_and_leaves_nothing(monkeypatch, tmp_path, fresh, dtype):
    monkeypatch.setattr(first_layers.tempfile, "tempdir", str(tmp_path))
    first = first_layers.first_layers(*layers(dtype))
    monkeypatch.setattr(first_layers.subprocess, "run", None)  # no compiler is called again
    second = first_layers.first_layers(*layers(dtype))
    x = torch.rand(1, 1, 32, 32, 32).to(dtype)
    assert torch.equal(first(x), second(x)) and not list(tmp_path.iterdir())


@pytest.fixture
def fresh():
    """Forget what was loaded, before the test and after it."""

    def forget():
        first_layers.load.cache_clear()
        first_layers.compiled.cache_clear()

    forget()
    yield
    forget()
