"""Compare fused BatchNorm and ELU with torch's modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.cnn3d import norm_elu
from models.condconv3d import CondConv3D
from models.fast import norm_elu as entrance
from models.fast import norm_elu_cpu as module
from models.fast.norm_elu_cpu import elu_


def make_norm(channels, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    norm = nn.BatchNorm3d(channels, momentum=0.3).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("channels,size", [(8, 6), (16, 4), (32, 2), (64, 2), (8, 5), (12, 4)])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_values_gradients_and_statistics(channels, size, layout):
    """Volumes of odd size, and channel counts that do not divide 64, use torch's path instead of the fast path."""
    fast = make_norm(channels)
    slow = copy.deepcopy(fast)
    for _step in range(2):
        x = (torch.randn(3, channels, size, size, size, dtype=torch.float64) * 2 + 1).contiguous(memory_format=layout)
        weights = torch.randn_like(x)
        a, b = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone().requires_grad_()
        y, wanted = norm_elu(fast, [a])[0], F.elu(slow(b))
        (y * weights).sum().backward()
        (wanted * weights).sum().backward()
        torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    for (name, ours), theirs in zip(fast.named_parameters(), slow.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=name)
    for name, theirs in slow.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], theirs, rtol=1e-11, atol=1e-12, msg=name)


def test_the_fast_path_is_used_in_the_documented_cases():
    x = torch.randn(2, 8, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    assert entrance.norm_elu(make_norm(8, dtype=torch.float32), [x]) is not None
    assert entrance.norm_elu(make_norm(8, dtype=torch.float32).eval(), [x]) is None
    assert entrance.norm_elu(make_norm(8, dtype=torch.float32), [x.contiguous()]) is None
    assert entrance.norm_elu(nn.SyncBatchNorm(8), [x]) is None


def test_large_mean_keeps_its_precision():
    """Compare the float32 variance of values far from zero with the variance in float64."""
    x = (torch.randn(4, 8, 16, 16, 16) + 300).contiguous(memory_format=torch.channels_last_3d)
    norm = nn.BatchNorm3d(8, momentum=1.0)
    norm_elu(norm, [x])
    wanted = x.double().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(norm.running_var.double(), wanted, rtol=1e-4, atol=0)


def test_bfloat16_input_keeps_float32_statistics():
    x = torch.randn(4, 8, 8, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    norm = make_norm(8, dtype=torch.float32)
    (y,) = norm_elu(norm, [x])
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32
    slow = make_norm(8, dtype=torch.float32)
    z = x.detach().float().requires_grad_()
    wanted = F.elu(slow(z))
    wanted.square().sum().backward()
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad.float(), z.grad, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(norm.running_mean, slow.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, slow.weight.grad, rtol=2e-2, atol=1.0)


def test_one_step_may_use_both_paths():
    """In the last layer, small batches have too few values for the fast path and therefore use torch's path."""
    norm = make_norm(8, dtype=torch.float32)
    x = torch.randn(4, 8, 1, 1, 1), torch.randn(8, 8, 1, 1, 1)
    x = [value.contiguous(memory_format=torch.channels_last_3d).requires_grad_() for value in x]
    assert [module.is_fused_norm_elu_faster(value) for value in x] == [False, True]
    sum(norm_elu(norm, [value])[0].sum() for value in x).backward()
    assert all(value.grad is not None for value in x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.bfloat16, 4e-3), (torch.float64, 0)])
def test_elu(dtype, tolerance):
    x = (torch.randn(40, 64) * 4).to(dtype)
    x.view(-1)[:4] = torch.tensor([0.0, -100.0, -1e-6, float("nan")])
    wanted = F.elu(x.double())
    assert elu_(x) is x
    torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


class Layers(nn.Module):
    """The first two layers of the encoder."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = CondConv3D(1, 8, 3, 2, 1, padding=1), CondConv3D(8, 4, 3, 2, 1, stride=2)
        self.bn1, self.bn2 = nn.BatchNorm3d(8), nn.BatchNorm3d(4)

    def forward(self, x, locs):
        x = norm_elu(self.bn1, [self.conv1(x, locs)])[0]
        return norm_elu(self.bn2, [self.conv2(x, locs)])[0]


@pytest.mark.slow
def test_compiled_it_is_the_same_also_twice_in_a_step():
    """A training step runs the same encoder twice: on patches and on neighbours.

    The backward pass of the first call must not use statistics that the second call has changed.
    """
    torch.manual_seed(0)
    plain = Layers().double().train()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="aot_eager")
    for _step in range(2):  # the second step compiles again, for dynamic sizes
        first, second = (torch.randn(n, 1, 8, 8, 8, dtype=torch.float64) for n in (4, 8))
        locs = torch.rand(3, 3, dtype=torch.float64)
        for encoder in (plain, compiled):
            encoder.zero_grad()
            total = encoder(first, locs[:1]).square().sum() + encoder(second, locs[1:]).sum()
            total.backward()
        for (name, wanted), ours in zip(plain.named_parameters(), compiled.parameters()):
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-6, atol=1e-9, msg=name)
    for name, wanted in plain.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), wanted, rtol=1e-7, atol=1e-10, msg=name)
