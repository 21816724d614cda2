"""BatchNorm3d followed by ELU on a CPU, in chunks that fit in the CPU cache."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

LOG2_E = 1.4426950408889634
CHUNK = 16384  # rows per chunk; a row has VECTOR values, so a chunk is 4 MB in float32
VECTOR = 64  # values per row; for rows of about this length or longer, memory bandwidth limits torch's kernels


def is_fused_norm_elu_faster(x: torch.Tensor) -> bool:
    """Return whether x is on the CPU and channels-last with few channels.

    For channels-last tensors with few channels, torch's BatchNorm is a scalar loop over the channels.
    For 32 float32 volumes with 8 channels at 32^3, a forward and backward pass takes 43 ms with torch's BatchNorm and
    ELU, and 17 ms with this module (2 cores with AVX-512).
    """
    channels = x.shape[1]
    return (
        x.device.type == "cpu"
        and channels < VECTOR
        and VECTOR % channels == 0
        and x.numel() % VECTOR == 0
        and x.numel() > channels
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def apply_norm_elu(norm: nn.BatchNorm3d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return elu(norm(x)) for x (B, C, D, H, W), and the mean and biased variance of the batch, (C,) each."""
    return _NormELU.apply(x, norm.weight, norm.bias, norm.eps)


def elu_(x: torch.Tensor) -> torch.Tensor:
    """Compute ELU in place as max(x, exp(min(x, 0)) - 1), with the exponential as a power of two.

    torch's ELU spends most of its time in expm1. Measured for 64 volumes with 8 channels at 32^3, on 2 cores with AVX2:
    a forward and backward pass through BatchNorm and ELU takes 47 ms with torch's ELU and 35 ms with this function.
    The absolute error of this function is below 2e-7. If x is not float32, this function calls torch's ELU.
    """
    if x.dtype != torch.float32:
        return F.elu_(x)
    below = x.clamp(max=0).mul_(LOG2_E).exp2_().sub_(1)
    return torch.maximum(x, below, out=x)


def _view_as_rows(x: torch.Tensor) -> torch.Tensor:
    """View channels-last (B, C, D, H, W) as (rows, VECTOR), with VECTOR / C neighbouring voxels in each row."""
    return x.permute(0, 2, 3, 4, 1).reshape(-1, VECTOR)


def _view_as_volume(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Invert :func:`_view_as_rows`."""
    batch, channels, *size = shape
    return rows.view(batch, *size, channels).permute(0, 4, 1, 2, 3)


def _iterate_chunks(*rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Iterate over all tensors together in chunks of rows that stay in the cache between two operations."""
    return zip(*(tensor.split(CHUNK) for tensor in rows))


class _NormELU(torch.autograd.Function):
    """BatchNorm in training mode and ELU over (rows, VECTOR). Columns of the same channel share one mean and SD."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows, channels = _view_as_rows(x), weight.numel()
        repeat = VECTOR // channels
        columns = weight.new_zeros(VECTOR), weight.new_ones(VECTOR)  # the values are unused; only their dtype matters
        means, variances = torch.ops.aten.batch_norm_update_stats(rows, *columns, 0.0)
        means, variances = means.view(repeat, channels), variances.view(repeat, channels)
        mean = means.mean(0)
        variance = variances.mean(0) + means.var(0, correction=0)  # mean column variance + variance of column means

        tiled = [value.repeat(repeat) for value in (weight.detach(), bias.detach(), mean, variance)]
        y = torch.empty_like(rows)
        unused = weight.new_empty(0), weight.new_empty(0)
        for piece, out in _iterate_chunks(rows, y):
            torch.ops.aten.native_batch_norm.out(
                piece, *tiled, False, 0.0, eps, out=out, save_mean=unused[0], save_invstd=unused[1]
            )
            elu_(out)
        ctx.save_for_backward(rows, y, tiled[0], tiled[2], tiled[3])
        ctx.eps, ctx.shape = eps, x.shape
        ctx.mark_non_differentiable(mean, variance)
        return _view_as_volume(y, x.shape), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        rows, y, weight, mean, variance = ctx.saved_tensors
        channels = ctx.shape[1]
        repeat = VECTOR // channels
        grad = _view_as_rows(grad.contiguous(memory_format=torch.channels_last_3d))
        grad_x = torch.empty_like(rows)
        sums = []
        for incoming, values, piece, out in _iterate_chunks(grad, y, rows, grad_x):
            torch.ops.aten.elu_backward.grad_input(incoming, 1.0, 1.0, 1.0, True, values, grad_input=out)
            sums.append(
                torch.ops.aten.native_batch_norm_backward(
                    out, piece, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
                )[1:]
            )
        grad_weight, grad_bias = (torch.stack(parts).view(-1, channels).sum(0) for parts in zip(*sums))

        # d loss / d x = scale * (g - mean(g) - x_hat * mean(g x_hat)), a linear function of g and x
        count = rows.numel() // channels
        inverse = torch.rsqrt(variance[:channels] + ctx.eps)
        scale = weight[:channels] * inverse
        slope = -scale * inverse * grad_weight / count
        offset = -scale * grad_bias / count - slope * mean[:channels]
        scale, slope, offset = (value.repeat(repeat) for value in (scale, slope, offset))
        for piece, out in _iterate_chunks(rows, grad_x):
            if out.dtype == scale.dtype:
                out.mul_(scale).addcmul_(piece, slope).add_(offset)
            else:  # compute in scale's dtype and round only once, at the end
                out.copy_((out * scale).addcmul_(piece.to(scale.dtype), slope).add_(offset))
        return _view_as_volume(grad_x, ctx.shape), grad_weight, grad_bias, None
