"""Convolution of a single-channel volume, with two voxels combined into one voxel of two channels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from models import fast


def convolve_one_channel_in_pairs(
    inputs: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None,
    conv_settings: tuple,
    convolve: Callable[..., torch.Tensor] = F.conv3d,
) -> torch.Tensor | None:
    """Run a 3 x 3 x 3 convolution of one channel with padding 1 on the CPU.

    The output voxels 2 X and 2 X + 1 of a line form a pair, which depends on the input voxels 2 X - 1 to 2 X + 2 of
    the line. After the line is padded with one voxel at both ends, input voxels 2 X - 1 to 2 X + 2 form two pairs.
    Each pair of input voxels becomes one voxel with two channels, which halves the width. The kernel over pairs has
    2 x out output channels and a width of 2, and a quarter of its taps are zero. oneDNN has fast code for two channels
    but not for one.

    Args:
        inputs: (B, 1, D, H, W).
        kernel: (out, 1, 3, 3, 3).
        bias: (out,) or None.
        conv_settings: stride, padding, dilation and groups of the convolution.
        convolve: F.conv3d, or a function that also applies an elementwise operation to the result.

    Returns:
        (B, out, D, H, W), channels last, or None if this fast path does not apply.
    """
    one_channel = kernel.shape[1:] == (1, 3, 3, 3) and inputs.shape[-1] % 2 == 0 and inputs.is_contiguous()
    if not (fast.is_enabled() and inputs.device.type == "cpu" and one_channel):
        return None
    if conv_settings != ((1, 1, 1), (1, 1, 1), (1, 1, 1), 1):
        return None
    batch, _, depth, height, width = inputs.shape
    out = kernel.shape[0]
    pairs = F.pad(inputs[:, 0], (1, 1)).view(batch, depth, height, width // 2 + 1, 2).permute(0, 4, 1, 2, 3)
    taps = torch.stack([F.pad(kernel, (0, 1)), F.pad(kernel, (1, 0))])  # (2, out, 1, 3, 3, 4)
    taps = taps.reshape(2 * out, 3, 3, 2, 2).permute(0, 4, 1, 2, 3)  # (2 out, 2, 3, 3, 2)
    both = convolve(
        pairs.contiguous(memory_format=torch.channels_last_3d),
        taps.contiguous(memory_format=torch.channels_last_3d),
        None if bias is None else bias.repeat(2),
        padding=(1, 1, 0),
    ).contiguous(memory_format=torch.channels_last_3d)
    return both.permute(0, 2, 3, 4, 1).reshape(batch, depth, height, width, out).permute(0, 4, 1, 2, 3)
