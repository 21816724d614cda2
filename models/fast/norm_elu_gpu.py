"""BatchNorm3d followed by ELU on a GPU: Triton kernels for all groups of a batch at once, channels last.

torch processes one group after another. torch reads the result of a layer five times in the forward pass (mean and
variance, normalisation, ELU) and once more in the backward pass. This module reads the result of a layer twice in the
forward pass and twice in the backward pass. The backward kernels recompute the ELU. The mean and the sum of squares of
successive tiles are merged (Chan, Golub and LeVeque, 1979). The order of merging is fixed, so the result is
reproducible to the bit.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from models.condconv3d import channels_last

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

TILE = 4096  # values per tile
PROGRAMS = 1024  # maximum number of Triton programs per input block, over all groups; an H100 has 132 multiprocessors
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # supported data types of the blocks; sums are in float32


def can_fuse_norm_elu(blocks: Sequence[torch.Tensor], groups: int) -> bool:
    """Return whether the blocks (n, C, D, H, W) are on a GPU for which Triton can compile the kernels.

    Each group must also have more than one value per channel, because one value has no variance.
    """
    x = blocks[0]
    enough = len(blocks) * x.numel() > x.shape[1] * groups
    return x.device.type == "cuda" and x.dtype in DTYPES and enough and _can_compile(x.device)


def apply_norm_elu(
    norm: nn.BatchNorm3d, blocks: Sequence[torch.Tensor], groups: int, track: bool
) -> list[torch.Tensor]:
    """Compute elu(norm(x)) for all blocks, and update the running statistics if ``track`` is set.

    Args:
        norm: a BatchNorm layer with weight and bias, running statistics and a fixed momentum.
        blocks, groups, track: see :func:`models.cnn3d.norm_elu`.
    """
    running = None
    if track:
        norm.num_batches_tracked += 1
        # The kernel updates these statistics in place, which is safe because no backward pass uses their values.
        running = norm.running_mean.detach(), norm.running_var.detach(), norm.momentum
    return list(_NormELU.apply(norm.weight, norm.bias, running, norm.eps, groups, *blocks))


@functools.lru_cache
def _can_compile(device: torch.device) -> bool:
    """Return whether Triton can compile the kernels for a device. Triton needs a C compiler."""
    if triton is None:
        return False
    try:
        apply_norm_elu(nn.BatchNorm3d(8).to(device), [torch.zeros(2, 8, 2, 2, 2, device=device)], 1, True)
    except Exception as error:  # raised by Triton, the C compiler or the GPU driver
        warnings.warn(f"Triton cannot compile here ({error}); using torch's slower BatchNorm", stacklevel=2)
        return False
    return True


class Layout(NamedTuple):
    """Memory layout of a block and its division into tiles."""

    rows: int  # voxels per group in a block
    channels: int
    tiles: int  # Triton programs per group
    tile_rows: int  # rows per tile
    columns: int  # channels, rounded up to a power of two

    @classmethod
    def from_block(cls, block: torch.Tensor, groups: int) -> "Layout":
        rows, channels = block.numel() // block.shape[1] // groups, block.shape[1]
        columns = triton.next_power_of_2(channels)
        tile_rows = max(1, TILE // columns)
        return cls(rows, channels, min(triton.cdiv(rows, tile_rows), max(1, PROGRAMS // groups)), tile_rows, columns)


class _NormELU(torch.autograd.Function):
    """Compute elu(norm(x)) for blocks (n, C, D, H, W), with separate statistics for each group."""

    @staticmethod
    def forward(ctx, weight, bias, running, eps, groups, *blocks):
        blocks = [channels_last(block) for block in blocks]
        layout = Layout.from_block(blocks[0], groups)
        _, channels, tiles, *tile = layout
        partial = weight.new_empty(len(blocks) * tiles, groups, 3, channels, dtype=torch.float32)
        for block, part in zip(blocks, partial.split(tiles)):
            _tile_moments[tiles, groups](block, part, layout.rows, channels, *tile)
        moments = weight.new_empty(groups, 2, channels, dtype=torch.float32)  # mean, 1 / SD
        means, variances, momentum = running or (moments, moments, 0.0)  # unused without running statistics
        track = running is not None
        _merge_moments[groups,](partial, moments, means, variances, len(partial), momentum, eps, channels, *tile, track)
        results = [torch.empty_like(block) for block in blocks]
        for block, result in zip(blocks, results):
            _normalize[tiles, groups](block, result, moments, weight, bias, layout.rows, channels, *tile)
        ctx.save_for_backward(weight, bias, moments, *blocks)
        ctx.groups = groups
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        weight, bias, moments, *blocks = ctx.saved_tensors
        layout, groups = Layout.from_block(blocks[0], ctx.groups), ctx.groups
        rows, channels, tiles, *tile = layout
        grads = [channels_last(grad) for grad in grads]
        partial = weight.new_empty(len(blocks) * tiles, groups, 2, channels, dtype=torch.float32)
        for block, grad, part in zip(blocks, grads, partial.split(tiles)):
            _tile_gradients[tiles, groups](block, grad, part, moments, weight, bias, rows, channels, *tile)
        sums = partial.sum(dim=0)  # (groups, 2, C): sums of g and of g x_hat; g is the gradient at the ELU's input
        results = [torch.empty_like(block) for block in blocks]
        count = rows * len(blocks)
        for block, grad, result in zip(blocks, grads, results):
            _compute_input_gradient[tiles, groups](
                block, grad, result, sums, moments, weight, bias, 1.0 / count, rows, channels, *tile
            )
        grad_bias, grad_weight = sums.sum(dim=0)  # (C,) each
        return grad_weight, grad_bias, None, None, None, *results


if triton is not None:

    @triton.jit
    def _tile_moments(x, partial, rows, CHANNELS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Compute count, mean and sum of squared deviations of every channel over the tiles of one Triton program."""
        tile, group = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, COLUMNS)
        inside = column < CHANNELS
        count = 0.0
        mean = tl.zeros([COLUMNS], tl.float32)
        squares = tl.zeros([COLUMNS], tl.float32)
        for start in range(tile * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
            row = start + tl.arange(0, TILE_ROWS)
            valid = (row < rows)[:, None] & inside[None, :]
            offset = (group.to(tl.int64) * rows + row)[:, None] * CHANNELS + column[None, :]
            values = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
            new = tl.minimum(rows - start, TILE_ROWS).to(tl.float32)
            tile_mean = tl.sum(values, axis=0) / new
            away = tl.where(valid, values - tile_mean[None, :], 0.0)
            total = count + new
            apart = tile_mean - mean
            mean += apart * (new / total)
            squares += tl.sum(away * away, axis=0) + apart * apart * (count * new / total)
            count = total
        into = partial + (tile * tl.num_programs(1) + group) * 3 * CHANNELS + column
        tl.store(into, tl.zeros([COLUMNS], tl.float32) + count, mask=inside)
        tl.store(into + CHANNELS, mean, mask=inside)
        tl.store(into + 2 * CHANNELS, squares, mask=inside)

    @triton.jit
    def _merge_moments(
        partial,
        moments,
        running_mean,
        running_var,
        parts,
        momentum,
        eps,
        CHANNELS: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TRACK: tl.constexpr,
    ):
        """Merge the partial statistics of a group into its mean and 1 / SD. Group 0 updates the running statistics."""
        group, groups = tl.program_id(0), tl.num_programs(0)
        column = tl.arange(0, COLUMNS)
        inside = column < CHANNELS
        count = tl.zeros([COLUMNS], tl.float32)
        mean = tl.zeros([COLUMNS], tl.float32)
        squares = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, parts, TILE_ROWS):
            part = start + tl.arange(0, TILE_ROWS)
            valid = (part < parts)[:, None] & inside[None, :]
            source = partial + (part * groups + group)[:, None] * 3 * CHANNELS + column[None, :]
            counts = tl.load(source, mask=valid, other=0.0)
            means = tl.load(source + CHANNELS, mask=valid, other=0.0)
            new = tl.maximum(tl.sum(counts, axis=0), 1.0)  # a count of 1 in padding columns avoids a division by 0
            new_mean = tl.sum(counts * means, axis=0) / new
            away = means - new_mean[None, :]
            new_squares = tl.sum(tl.load(source + 2 * CHANNELS, mask=valid, other=0.0) + counts * away * away, axis=0)
            total = count + new
            apart = new_mean - mean
            mean += apart * (new / total)
            squares += new_squares + apart * apart * (count * new / total)
            count = total
        variance = squares / count
        into = moments + group * 2 * CHANNELS + column
        tl.store(into, mean, mask=inside)
        tl.store(into + CHANNELS, 1.0 / tl.sqrt(variance + eps), mask=inside)
        if TRACK:  # noqa: SIM102 (TRACK is a compile-time constant, and group is a run-time value)
            if group == 0:
                before = tl.load(running_mean + column, mask=inside, other=0.0)
                tl.store(running_mean + column, before + momentum * (mean - before), mask=inside)
                before = tl.load(running_var + column, mask=inside, other=0.0)
                unbiased = squares / tl.maximum(count - 1.0, 1.0)
                tl.store(running_var + column, before + momentum * (unbiased - before), mask=inside)

    @triton.jit
    def _load_scale(moments, weight, bias, group, CHANNELS: tl.constexpr, column, inside):
        """Load mean, 1 / SD, weight and bias of each channel in float32."""
        source = moments + group * 2 * CHANNELS + column
        mean = tl.load(source, mask=inside, other=0.0)
        inverse = tl.load(source + CHANNELS, mask=inside, other=0.0)
        weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        return mean, inverse, weight, bias

    @triton.jit
    def _normalize(
        x, y, moments, weight, bias, rows, CHANNELS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """Compute y = elu((x - mean) / SD * weight + bias)."""
        tile, group = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, COLUMNS)
        inside = column < CHANNELS
        mean, inverse, scale, shift = _load_scale(moments, weight, bias, group, CHANNELS, column, inside)
        for start in range(tile * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
            row = start + tl.arange(0, TILE_ROWS)
            valid = (row < rows)[:, None] & inside[None, :]
            offset = (group.to(tl.int64) * rows + row)[:, None] * CHANNELS + column[None, :]
            values = tl.load(x + offset, mask=valid, other=0.0).to(tl.float32)
            z = (values - mean[None, :]) * inverse[None, :] * scale[None, :] + shift[None, :]
            z = tl.where(z > 0, z, tl.exp(tl.minimum(z, 0.0)) - 1.0)
            tl.store(y + offset, z.to(y.dtype.element_ty), mask=valid)

    @triton.jit
    def _load_gradient(x, grad, offset, valid, mean, inverse, scale, shift):
        """Compute x_hat = (x - mean) / SD and the gradient g at the ELU's input; g is 0 where ``valid`` is False."""
        x_hat = (tl.load(x + offset, mask=valid, other=0.0).to(tl.float32) - mean[None, :]) * inverse[None, :]
        g = tl.load(grad + offset, mask=valid, other=0.0).to(tl.float32)
        z = x_hat * scale[None, :] + shift[None, :]
        g = tl.where(z > 0, g, g * tl.exp(tl.minimum(z, 0.0)))
        return x_hat, g

    @triton.jit
    def _tile_gradients(
        x,
        grad,
        partial,
        moments,
        weight,
        bias,
        rows,
        CHANNELS: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Sum g, the gradient at the ELU's input, and g * x_hat over the tiles of one Triton program."""
        tile, group = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, COLUMNS)
        inside = column < CHANNELS
        mean, inverse, scale, shift = _load_scale(moments, weight, bias, group, CHANNELS, column, inside)
        sums = tl.zeros([COLUMNS], tl.float32)
        products = tl.zeros([COLUMNS], tl.float32)
        for start in range(tile * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
            row = start + tl.arange(0, TILE_ROWS)
            valid = (row < rows)[:, None] & inside[None, :]
            offset = (group.to(tl.int64) * rows + row)[:, None] * CHANNELS + column[None, :]
            x_hat, g = _load_gradient(x, grad, offset, valid, mean, inverse, scale, shift)
            sums += tl.sum(g, axis=0)
            products += tl.sum(g * x_hat, axis=0)
        into = partial + (tile * tl.num_programs(1) + group) * 2 * CHANNELS + column
        tl.store(into, sums, mask=inside)
        tl.store(into + CHANNELS, products, mask=inside)

    @triton.jit
    def _compute_input_gradient(
        x,
        grad,
        result,
        sums,
        moments,
        weight,
        bias,
        share,
        rows,
        CHANNELS: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Compute d loss / d x = weight / SD * (g - mean(g) - x_hat * mean(g * x_hat)).

        ``share`` is 1 / (number of values per channel and group).
        """
        tile, group = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, COLUMNS)
        inside = column < CHANNELS
        mean, inverse, scale, shift = _load_scale(moments, weight, bias, group, CHANNELS, column, inside)
        source = sums + group * 2 * CHANNELS + column
        mean_g = tl.load(source, mask=inside, other=0.0) * share
        mean_product = tl.load(source + CHANNELS, mask=inside, other=0.0) * share
        for start in range(tile * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
            row = start + tl.arange(0, TILE_ROWS)
            valid = (row < rows)[:, None] & inside[None, :]
            offset = (group.to(tl.int64) * rows + row)[:, None] * CHANNELS + column[None, :]
            x_hat, g = _load_gradient(x, grad, offset, valid, mean, inverse, scale, shift)
            g = (g - mean_g[None, :] - x_hat * mean_product[None, :]) * (scale * inverse)[None, :]
            tl.store(result + offset, g.to(result.dtype.element_ty), mask=valid)
