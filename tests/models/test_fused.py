"""Convolution and ELU in one pass against the two of torch."""

import pytest
import torch
import torch.nn.functional as F

from models import fused
from models.fused import conv_elu


def operands(channels, out, size, dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(3, channels, *size).to(dtype).contiguous(memory_format=layout)
    kernel = (torch.randn(out, channels, 3, 3, 3) / channels**0.5).to(dtype).contiguous(memory_format=layout)
    return x, kernel, torch.randn(out).to(dtype)


@pytest.mark.parametrize("fuses", (True, False))
@pytest.mark.parametrize("layout", (torch.channels_last_3d, torch.contiguous_format))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)))
@pytest.mark.parametrize("stride, padding", (((1, 1, 1), (1, 1, 1)), ((2, 2, 2), (1, 1, 1)), ((1, 2, 1), (1, 0, 1))))
def test_as_the_two(monkeypatch, fuses, layout, dtype, tolerance, stride, padding):
    if not fuses:
        monkeypatch.setattr(fused, "_one_pass", lambda *_: None)
    x, kernel, bias = operands(8, 16, (6, 8, 10), dtype, layout)
    wanted = F.elu(F.conv3d(x.double(), kernel.double(), bias.double(), stride, padding))
    y = conv_elu(x, kernel, bias, stride, padding)
    assert y.dtype == dtype and y.shape == wanted.shape
    assert float((y - wanted).norm() / wanted.norm()) < tolerance


def test_every_call_rounds_alike():
    """TorchScript runs its first calls unfused; none of them may reach a caller."""
    x, kernel, bias = operands(4, 24, (5, 5, 5), torch.float32, torch.channels_last_3d)
    first = conv_elu(x, kernel, bias)
    assert all(torch.equal(conv_elu(x, kernel, bias), first) for _ in range(6))


def test_one_function_for_every_kernel_and_one_for_each_shape():
    x, kernel, bias = operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d)
    fused._one_pass.cache_clear()
    for factor in (1.0, -2.0):
        conv_elu(x, kernel * factor, bias)
        assert torch.allclose(conv_elu(x, kernel * factor, bias), F.elu(F.conv3d(x, kernel * factor, bias)), atol=1e-5)
    assert fused._one_pass.cache_info().misses == 1
    assert torch.allclose(conv_elu(x[:2], kernel, bias), F.elu(F.conv3d(x[:2], kernel, bias)), atol=1e-5)
    assert fused._one_pass.cache_info().misses == 2


def test_a_torch_without_the_fuser(monkeypatch):
    def gone(*_, **__):
        raise AttributeError("module 'torch.jit' has no attribute 'trace'")

    monkeypatch.setattr(torch.jit, "trace", gone)
    fused._one_pass.cache_clear()
    x, kernel, bias = operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d)
    assert torch.allclose(conv_elu(x, kernel, bias), F.elu(F.conv3d(x, kernel, bias)), atol=1e-5)
    fused._one_pass.cache_clear()


def test_other_dtypes_and_the_users_setting():
    x, kernel, bias = (value.double() for value in operands(4, 8, (6, 6, 6), torch.float32, torch.channels_last_3d))
    assert torch.allclose(conv_elu(x, kernel, bias), F.elu(F.conv3d(x, kernel, bias)), atol=1e-12)
    assert not torch.jit.onednn_fusion_enabled()
