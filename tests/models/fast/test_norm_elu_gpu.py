"""norm_elu_gpu.py: its arithmetic with the four kernels written out for the CPU, and itself on a GPU."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import fast
from models.cnn3d import norm_elu
from models.fast import norm_elu as entrance
from models.fast import norm_elu_gpu as gpu


def stats(x, eps):
    var, mean = torch.var_mean(x, dim=(0, 2), correction=0)
    return mean, torch.rsqrt(var + eps)


def elemt(x, weight, bias, mean, inverse, eps):
    wide = [value[None, :, None] for value in (weight, bias, mean, inverse)]
    return (x - wide[2]) * wide[3] * wide[0] + wide[1]


def reduce(grad, x, mean, inverse, weight, *wanted):
    return grad.sum(dim=(0, 2)), (grad * (x - mean[None, :, None])).sum(dim=(0, 2)), None, None


def backward(grad, x, mean, inverse, weight, sum_dy, sum_dy_xmu, count):
    wide = [value[None, :, None] for value in (mean, inverse, weight, sum_dy / count, sum_dy_xmu / count)]
    return (grad - wide[3] - (x - wide[0]) * wide[1] ** 2 * wide[4]) * wide[1] * wide[2]


def taken_everywhere(monkeypatch):
    """Wherever a tensor is, and of one group too."""
    monkeypatch.setattr(gpu, "is_faster", lambda *_: True)


def written_out(monkeypatch):
    """The kernels that only GPUs have, as torch's documentation of BatchNorm defines them."""
    taken_everywhere(monkeypatch)
    kernels = {"stats": stats, "elemt": elemt, "backward_reduce": reduce, "backward_elemt": backward}
    for name, function in kernels.items():
        monkeypatch.setattr(torch, f"batch_norm_{name}", function)


def one_group_after_another(norm, x, groups, blocks):
    parts = x.unflatten(0, (blocks, groups, -1)).unbind(1)
    done = []
    for group, part in enumerate(parts):
        layer = norm if group == 0 else copy.deepcopy(norm)
        layer.weight, layer.bias = norm.weight, norm.bias
        done.append(F.elu(layer(part.flatten(0, 1))).unflatten(0, (blocks, -1)))
    return torch.stack(done, dim=1).flatten(0, 2)


SHAPES = [(12, 8, 4, 4, 4), (12, 3, 2, 2, 2), (24, 5, 1, 1, 1)]


def both(x, groups, blocks, tolerance):
    torch.manual_seed(0)
    norm = nn.BatchNorm3d(x.shape[1]).to(x)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    other = copy.deepcopy(norm)
    weights = torch.randn_like(x)
    results = []
    for layer, way in ((norm, entrance.norm_elu), (other, one_group_after_another)):
        inputs = x.clone().requires_grad_()
        y = way(layer, inputs, groups, blocks)
        (y * weights).sum().backward()
        results.append((y.detach(), inputs.grad, layer.weight.grad, layer.bias.grad, dict(layer.named_buffers())))
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups, blocks", [(1, 1), (2, 1), (4, 1), (2, 3), (1, 3)])
def test_every_group_as_one_after_another(monkeypatch, shape, groups, blocks):
    written_out(monkeypatch)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 2
    both(x, groups, blocks, dict(rtol=1e-9, atol=1e-9))


def test_a_channel_without_spread_has_a_finite_gradient(monkeypatch):
    written_out(monkeypatch)
    norm = nn.BatchNorm3d(2).double()
    x = torch.ones(4, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    y = entrance.norm_elu(norm, x, 2)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all() and not y.detach().any()


def test_without_tracking_the_running_statistics_stay(monkeypatch):
    written_out(monkeypatch)
    norm = nn.BatchNorm3d(3).double()
    entrance.norm_elu(norm, torch.randn(4, 3, 2, 2, 2, dtype=torch.float64), track=False)
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (12, 8, 32, 32, 32)])
@pytest.mark.parametrize("groups, blocks", [(1, 1), (4, 1), (2, 3)])
def test_on_a_gpu(monkeypatch, shape, groups, blocks):
    taken_everywhere(monkeypatch)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cuda() * 3 + 2
    both(x, groups, blocks, dict(rtol=1e-8, atol=1e-8))
    both(x.float(), groups, blocks, dict(rtol=1e-3, atol=1e-4))


@pytest.mark.parametrize(
    ("change", "groups"),
    [({}, 1), ({"momentum": None}, 2), ({"affine": False}, 2), ({"track_running_stats": False}, 2)],
)
def test_what_it_leaves_to_torch(monkeypatch, change, groups):
    """Judged as on a GPU, by a tensor that says it is on one."""

    class There(torch.Tensor):
        device = torch.device("cuda")

    x = torch.randn(4, 3, 2, 2, 2).as_subclass(There)
    monkeypatch.setattr(gpu, "apply", lambda *_: ("taken", torch.zeros(3), torch.ones(3)))
    assert entrance.norm_elu(nn.BatchNorm3d(3), x, 2) == "taken"
    assert entrance.norm_elu(nn.BatchNorm3d(3, **change), x, groups) is None
    assert entrance.norm_elu(nn.BatchNorm3d(3).eval(), x, 2) is None
    assert entrance.norm_elu(nn.BatchNorm3d(3), x[:2, :, :1, :1, :1], 2) is None  # a value a group
    with fast.plain():
        assert entrance.norm_elu(nn.BatchNorm3d(3), x, 2) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_on_a_gpu_takes_it_to_the_same_numbers(monkeypatch, dtype):
    x = torch.randn(8, 8, 16, 16, 16, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    norms, results, calls, taken = [nn.BatchNorm3d(8).cuda() for _ in range(2)], [], [], gpu.apply
    monkeypatch.setattr(gpu, "apply", lambda *given: calls.append(1) or taken(*given))
    for norm, way in zip(norms, (contextlib.nullcontext, fast.plain)):
        inputs = x.clone().requires_grad_()
        with way():
            y = norm_elu(norm, inputs, groups=4)
        assert len(calls) == 1  # by the first way alone
        y.float().square().sum().backward()
        results.append((y.detach(), inputs.grad, dict(norm.named_buffers())))
    torch.testing.assert_close(*results, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=2e-2)
