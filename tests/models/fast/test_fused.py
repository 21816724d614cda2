"""Compare one fused pass of convolution and ELU with torch's two passes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from models.cnn3d import Encoder
from models.fast import fused
from models.fast.fused import conv_elu
from models.fast.pieces import PATCHES_AT_ONCE
from models.frozen import freeze_at_locations


def operands(channels, out, size, dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(3, channels, *size).to(dtype).contiguous(memory_format=layout)
    kernel = (torch.randn(out, channels, 3, 3, 3) / channels**0.5).to(dtype).contiguous(memory_format=layout)
    return x, kernel, torch.randn(out).to(dtype)


@pytest.mark.parametrize("fuses", (True, False))
@pytest.mark.parametrize("layout", (torch.channels_last_3d, torch.contiguous_format))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)))
@pytest.mark.parametrize("stride, padding", (((1, 1, 1), (1, 1, 1)), ((2, 2, 2), (1, 1, 1)), ((1, 2, 1), (1, 0, 1))))
def test_one_pass_equals_two_passes(monkeypatch, fuses, layout, dtype, tolerance, stride, padding):
    if not fuses:
        monkeypatch.setattr(fused, "_compile_fused_conv_elu", lambda *_: None)
    x, kernel, bias = operands(8, 16, (6, 8, 10), dtype, layout)
    wanted = F.elu(F.conv3d(x.double(), kernel.double(), bias.double(), stride, padding))
    y = conv_elu(x, kernel, bias, stride, padding)
    assert y.dtype == dtype and y.shape == wanted.shape
    assert float((y - wanted).norm() / wanted.norm()) < tolerance


def fused_calls(work):
    """Return how often oneDNN's fused code runs in a call of ``work``."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.name.startswith("Llga") for event in profile.events())


def has_fuser(dtype=torch.float32):
    x, kernel, _ = operands(8, 16, (6, 6, 6), dtype, torch.channels_last_3d)
    return fused._compile_fused_conv_elu(x.shape, kernel.shape, (True, True), x.dtype, 1, 0, 1, 1) is not None


@pytest.mark.skipif(not has_fuser(), reason="this torch has no oneDNN fuser: two passes are taken")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_frozen_encoder_fuses_every_layer(dtype, one_thread):
    if not has_fuser(dtype):
        pytest.skip(f"oneDNN does not fuse {dtype} on this processor: two passes are taken")
    torch.manual_seed(0)
    frozen = freeze_at_locations(Encoder(16, 4, 2, 1).eval(), torch.zeros(1, 3), dtype)[0]
    x = torch.rand(2 * PATCHES_AT_ONCE + 3, 1, 32, 32, 32) * 2 - 1
    frozen(x)  # compiles the fused code
    assert fused_calls(lambda: frozen(x[: 2 * PATCHES_AT_ONCE])) == 2 * 13
    assert fused_calls(lambda: frozen(x[: PATCHES_AT_ONCE - 1])) == 0  # nothing is compiled for so few patches
    first, second, rest = x.split(PATCHES_AT_ONCE)
    apart = torch.cat([frozen(first), frozen(second), frozen(rest)])
    assert torch.equal(frozen(x), apart)


@pytest.mark.skipif(not has_fuser(), reason="this torch has no oneDNN fuser: two passes are taken")
@pytest.mark.parametrize("layouts", ((True, False), (False, True)))
def test_a_kernel_in_another_layout_is_fused_too(layouts):
    x, kernel, bias = operands(8, 16, (6, 6, 6), torch.float32, torch.contiguous_format)
    x, kernel = (
        value.contiguous(memory_format=torch.channels_last_3d) if last else value
        for value, last in zip((x, kernel), layouts)
    )
    conv_elu(x, kernel, bias)
    assert fused_calls(lambda: conv_elu(x, kernel, bias)) == 1


def test_all_calls_round_the_same():
    """TorchScript runs the first call unfused, but every call of ``conv_elu`` must return the fused result."""
    x, kernel, bias = operands(4, 24, (5, 5, 5), torch.float32, torch.channels_last_3d)
    fused._compile_fused_conv_elu.cache_clear()
    first = conv_elu(x, kernel, bias)
    assert all(torch.equal(conv_elu(x, kernel, bias), first) for _ in range(6))


def test_one_compiled_function_per_shape():
    x, kernel, bias = operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d)
    fused._compile_fused_conv_elu.cache_clear()
    for factor in (1.0, -2.0):
        conv_elu(x, kernel * factor, bias)
        assert torch.allclose(conv_elu(x, kernel * factor, bias), F.elu(F.conv3d(x, kernel * factor, bias)), atol=1e-5)
    assert fused._compile_fused_conv_elu.cache_info().misses == 1
    assert torch.allclose(conv_elu(x[:2], kernel, bias), F.elu(F.conv3d(x[:2], kernel, bias)), atol=1e-5)
    assert fused._compile_fused_conv_elu.cache_info().misses == 2


@pytest.mark.parametrize("gone", ("trace", "enable_onednn_fusion", "fails"))
def test_a_torch_without_the_fuser(monkeypatch, gone):
    def fails(*_, **__):
        raise RuntimeError("Running oneDNN Graph fuser is only supported with MKLDNN builds.")

    if gone == "fails":
        monkeypatch.setattr(torch.jit, "trace", fails)
    else:
        monkeypatch.delattr(torch.jit, gone)
    fused._compile_fused_conv_elu.cache_clear()
    x, kernel, bias = operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d)
    assert torch.allclose(conv_elu(x, kernel, bias), F.elu(F.conv3d(x, kernel, bias)), atol=1e-5)
    assert fused._compile_fused_conv_elu(x.shape, kernel.shape, (True, True), x.dtype, 1, 0, 1, 1) is None
    fused._compile_fused_conv_elu.cache_clear()


@pytest.mark.parametrize("before", (False, True))
def test_the_users_fuser_setting_is_kept(before):
    x, kernel, bias = operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d)
    fused._compile_fused_conv_elu.cache_clear()
    torch.jit.enable_onednn_fusion(before)
    try:
        conv_elu(x, kernel, bias)
        assert torch.jit.onednn_fusion_enabled() == before
    finally:
        torch.jit.enable_onednn_fusion(False)


def test_cases_with_two_passes():
    x, kernel, bias = operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d)
    assert torch.allclose(conv_elu(x, kernel, None, padding="same"), F.elu(F.conv3d(x, kernel, padding=1)), atol=1e-5)
    assert torch.allclose(
        conv_elu(x, kernel, bias, padding="same"), F.elu(F.conv3d(x, kernel, bias, padding=1)), atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):  # the compiled code must not contain autocast's casts
        assert conv_elu(x, kernel, bias).dtype == torch.bfloat16
    assert conv_elu(x, kernel, bias).dtype == torch.float32
    x, kernel, bias = x.double(), kernel.double(), bias.double()
    assert torch.allclose(conv_elu(x, kernel, bias), F.elu(F.conv3d(x, kernel, bias)), atol=1e-12)


@pytest.mark.skipif(not has_fuser(), reason="this torch has no oneDNN fuser: two passes are taken")
def test_parallel_threads_compile_once_and_restore_the_fuser(monkeypatch):
    """If two threads switched the fuser at the same time, the fuser could stay on, or one thread could run unfused."""
    trace = torch.jit.trace

    def slow(*args, **flags):
        time.sleep(0.3)
        return trace(*args, **flags)

    monkeypatch.setattr(torch.jit, "trace", slow)
    fused._compile_fused_conv_elu.cache_clear()
    before = torch.jit.onednn_fusion_enabled()
    jobs = [operands(4, out, (5, 5, 5), torch.float32, torch.channels_last_3d) for out in (8, 8, 16)]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda job: conv_elu(*job), jobs))
    assert torch.jit.onednn_fusion_enabled() == before and fused._compile_fused_conv_elu.cache_info().misses == 2
    assert torch.equal(made[0], made[1])
    for job in jobs:
        assert fused_calls(lambda job=job: conv_elu(*job)) == 1
