"""Compare the conditional convolution with a loop over samples that computes the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import condconv3d
from models.condconv3d import CondConv3D


def convolve_literally(layer: CondConv3D, inputs: torch.Tensor, locs: torch.Tensor) -> torch.Tensor:
    """Compute kernel = sum_e sigmoid(fc(loc))_e weight_e, and convolve each sample with its own kernel."""
    share = inputs.shape[0] // locs.shape[0]
    outputs = []
    for index, sample in enumerate(inputs):
        loc = locs[index // share]
        kernel = torch.zeros_like(layer.weight[0])
        for expert in range(layer.num_experts):
            score = sum(layer._routing_fn.fc.weight[expert, i] * loc[i] for i in range(len(loc)))
            score = score + layer._routing_fn.fc.bias[expert]
            kernel = kernel + 1 / (1 + torch.exp(-score)) * layer.weight[expert]
        outputs.append(
            F.conv3d(sample[None], kernel, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        )
    return torch.cat(outputs)


CASES = [  # columns: batch, blocks, experts, kernel, stride, padding, dilation, groups, bias
    (4, 1, 8, 3, 1, 1, 1, 1, True),
    (6, 2, 3, 3, 2, 1, 1, 1, True),
    (6, 3, 1, 3, 1, 1, 1, 1, True),
    (5, 5, 4, 3, 2, 1, 1, 1, True),
    (7, 1, 2, (3, 1, 3), 1, (1, 0, 1), 1, 1, False),
    (3, 3, 5, 3, (1, 2, 1), 2, 2, 2, True),
    (1, 1, 2, 3, 1, 0, 1, 4, True),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, memory_format):
    batch, blocks, experts, kernel, stride, padding, dilation, groups, bias = case
    torch.manual_seed(batch * 100 + experts)
    layer = CondConv3D(4, 8, kernel, experts, 1, stride, padding, dilation, groups, bias).double()
    nn.init.normal_(layer.weight)
    results = []
    inputs = torch.randn(batch, 4, 7, 6, 8, dtype=torch.float64)
    locs = torch.rand(blocks, 3, dtype=torch.float64) * 2 - 1
    for function in (layer, lambda *a: convolve_literally(layer, *a)):
        x = inputs.clone().contiguous(memory_format=memory_format).requires_grad_()
        where = locs.clone().requires_grad_()
        output = function(x, where)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        gradients = torch.autograd.grad((output * weights).sum(), [x, where, *layer.parameters()])
        results.append([output, *gradients])
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_circular_padding_equals_conv3d():
    torch.manual_seed(0)
    layer = CondConv3D(2, 3, 3, 2, 1, padding=1, padding_mode="circular").double()
    x, loc = torch.randn(2, 2, 5, 5, 5, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    plain = nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular").double()
    plain.weight.data = layer.mix_kernels(loc)[0].detach()
    plain.bias.data = layer.bias.detach()
    torch.testing.assert_close(layer(x, loc), plain(x))


def test_two_coordinates_give_six_routing_inputs():
    layer = CondConv3D(1, 1, 3, 2, num_coordinates=2)
    assert layer._routing_fn.fc.in_features == 6


def test_parameter_names():
    names = [name for name, _ in CondConv3D(1, 8, 3, 4, 1).named_parameters()]
    assert sorted(names) == ["_routing_fn.fc.bias", "_routing_fn.fc.weight", "bias", "weight"]


def test_initial_bound_counts_the_output_channels():
    """For the 6-D weight, Kaiming's rule uses fan-in = out * in * 27, so |w| <= 1 / sqrt(fan-in)."""
    torch.manual_seed(0)
    layer = CondConv3D(16, 32, 3, 8, 1)
    bound = 1 / math.sqrt(32 * 16 * 27)
    for parameter in (layer.weight, layer.bias):
        assert float(parameter.detach().abs().max()) <= bound
    assert float(layer.weight.detach().abs().max()) > 0.999 * bound
    assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("blocks", [0, 3])
def test_blocks_must_divide_the_batch(blocks):
    with pytest.raises(ValueError, match=f"a batch of 4 samples cannot be divided evenly among {blocks} locations"):
        CondConv3D(1, 1, 3, 2, 1)(torch.zeros(4, 1, 5, 5, 5), torch.zeros(blocks, 3))


@pytest.mark.parametrize("width,quick", [(6, True), (7, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_channel_two_voxels_at_a_time(width, quick, bias, monkeypatch):
    """The fast path for one input channel gives the values, layout and gradients of torch's convolution."""
    torch.manual_seed(0)
    taken = []
    pairs = condconv3d.convolve_one_channel_in_pairs

    def note(result):
        if result is not None:
            taken.append(1)
        return result

    monkeypatch.setattr(condconv3d, "convolve_one_channel_in_pairs", lambda *inputs: note(pairs(*inputs)))
    x = torch.randn(3, 1, 4, 5, width, dtype=torch.float64).requires_grad_()
    kernel = torch.randn(8, 1, 3, 3, 3, dtype=torch.float64).requires_grad_()
    offset = torch.randn(8, dtype=torch.float64).requires_grad_() if bias else None
    parameters = [x, kernel] + ([offset] if bias else [])
    y = condconv3d.dense_conv3d(x, kernel, offset, (1, 1, 1), (1, 1, 1))
    wanted = F.conv3d(x, kernel, offset, padding=1)
    assert bool(taken) == quick
    assert not quick or y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(y, parameters, weights), torch.autograd.grad(wanted, parameters, weights)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
