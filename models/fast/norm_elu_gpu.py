"""BatchNorm3d followed by ELU on a GPU, for all groups of a batch at once.

torch's BatchNorm gives each channel to one of a GPU's multiprocessors, and the first layers, the largest, have 8
channels for more than a hundred of them. Here every sample's channel has its own partial statistics, which are then
put together, by the kernels that torch has for BatchNorm over several GPUs. Measured on an H100 (2026-11-26) with one
group, a step of 128 in bf16: the GPU is busy for 28 ms of it, before (on an H200) for 71. It takes more launches, and
a step of one group waits for its launches: 73 ms torch's way, 75 to 103 this way. So one group is left to torch;
several, which torch takes one after another, with as many launches each, were not timed apart.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


def is_faster(x: torch.Tensor, groups: int) -> bool:
    """Whether x (B, C, D, H, W) is on a GPU in several groups, each of more than one value a channel."""
    return x.device.type == "cuda" and groups > 1 and x.numel() > x.shape[1] * groups  # one value has no variance


def apply(
    norm: nn.BatchNorm3d, x: torch.Tensor, groups: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """elu(norm(x)), and the first group's mean and biased variance, (C,) each.

    Args:
        groups, blocks: as in :func:`models.cnn3d.norm_elu`.
    """
    return _NormELU.apply(x, norm.weight, norm.bias, norm.eps, groups, blocks)


class _NormELU(torch.autograd.Function):
    """Training-mode BatchNorm and ELU, and the first group's mean and variance, (C,) each."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, groups, blocks):
        channels = x.shape[1]
        rows = x.contiguous().view(1, x.shape[0] * channels, -1)  # a "channel" is a sample's channel
        means, inverses = torch.batch_norm_stats(rows, eps)  # (B * C,) each
        spread = (blocks, groups, -1, channels)
        between, mean = torch.var_mean(means.view(spread), dim=(0, 2), correction=0)  # (groups, C) each
        variance = (inverses.view(spread).pow(-2) - eps).mean(dim=(0, 2)).clamp_(min=0) + between
        inverse = torch.rsqrt(variance + eps)
        table = torch.stack([weight.detach().expand_as(mean), bias.detach().expand_as(mean), mean, inverse])
        ctx.own = len(x) // blocks // groups  # samples of a group in a block
        table = _to_samples(table, blocks, ctx.own)  # (4, B * C)
        y = F.elu_(torch.batch_norm_elemt(rows, *table, eps))
        ctx.save_for_backward(rows, y, table)
        ctx.shape, ctx.groups, ctx.blocks = x.shape, groups, blocks
        first = mean[0], variance[0]
        ctx.mark_non_differentiable(*first)
        return y.view(x.shape), *first

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        rows, y, table = ctx.saved_tensors
        weight, _, mean, inverse = table
        grad = torch.ops.aten.elu_backward(grad.contiguous().view(rows.shape), 1.0, 1.0, 1.0, True, y)
        wanted = True, False, False
        sum_dy, sum_dy_xmu, *_ = torch.batch_norm_backward_reduce(grad, rows, mean, inverse, weight, *wanted)
        spread = (ctx.blocks, ctx.groups, -1, ctx.shape[1])
        sums = torch.stack([sum_dy, sum_dy_xmu, sum_dy_xmu * inverse]).view(3, *spread)
        sums = sums.sum(dim=(1, 3))  # (3, groups, C)
        grad_bias, _, grad_weight = sums.sum(dim=1)  # (C,) each
        sum_dy, sum_dy_xmu = _to_samples(sums[:2], ctx.blocks, ctx.own)  # (B * C,) each
        count = rows.numel() // ctx.shape[1] // ctx.groups
        total = torch.full((1,), count, dtype=torch.int32, device=rows.device)
        grad = torch.batch_norm_backward_elemt(grad, rows, mean, inverse, weight, sum_dy, sum_dy_xmu, total)
        return grad.view(ctx.shape), grad_weight, grad_bias, None, None, None


def _to_samples(values: torch.Tensor, blocks: int, own: int) -> torch.Tensor:
    """(n, groups, C) of every group -> (n, B * C) of every sample."""
    n, groups, channels = values.shape
    return values[:, None, :, None].expand(n, blocks, groups, own, channels).reshape(n, -1)
