"""Three equivalent implementations of the first two convolutions, which account for 59 % of a step's arithmetic.

Tensor cores multiply blocks of 8 or 16 channels, but these layers have inputs with 1 and 8 channels. The padded
implementation adds input channels that contain zeros. The space-to-depth implementation turns the 8 voxels of a
2 x 2 x 2 cube into channels of one voxel. Space to depth needs more arithmetic than the direct convolution, but its
larger number of channels suits tensor cores.
"""

import torch
import torch.nn.functional as F

from models.condconv3d import channels_last


def convolve_directly(x: torch.Tensor, first_kernel: torch.Tensor, second_kernel: torch.Tensor) -> torch.Tensor:
    """Apply both convolutions, the second with stride 2: (B, 1, 32, 32, 32) -> (B, 8, 16, 16, 16)."""
    return F.conv3d(F.conv3d(x, first_kernel, padding=1), second_kernel, padding=1, stride=2)


def convolve_padded_channels(
    x: torch.Tensor, first_kernel: torch.Tensor, second_kernel: torch.Tensor, padded_channels: int = 8
) -> torch.Tensor:
    """Compute :func:`convolve_directly` after padding the input with zeros to ``padded_channels`` channels."""
    more = padded_channels - x.shape[1]
    x = channels_last(F.pad(x, (0, 0) * 3 + (0, more)))
    return convolve_directly(x, channels_last(F.pad(first_kernel, (0, 0) * 3 + (0, more))), second_kernel)


def space_to_depth(x: torch.Tensor) -> torch.Tensor:
    """Turn 2 x 2 x 2 cubes into channels: (B, C, D, H, W) -> (B, 8 C, D / 2, H / 2, W / 2).

    The new channels are ordered by z, y, x in the cube, then by C.
    """
    batch, channels, depth, height, width = x.shape
    x = x.view(batch, channels, depth // 2, 2, height // 2, 2, width // 2, 2)
    x = x.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(batch, 8 * channels, depth // 2, height // 2, width // 2)
    return channels_last(x)


def convert_kernel_for_space_to_depth(kernel: torch.Tensor) -> torch.Tensor:
    """Convert a kernel for use after :func:`space_to_depth`: (out, in, 3, 3, 3) -> (8 out, 8 in, 3, 3, 3).

    Along each axis, voxel a of an output cube depends on voxel p of the input cube at offset t (a and p are 0 or 1).
    The weight is the kernel element at the offset between these voxels, 2 t + p - a, or 0 outside the kernel.
    """
    out, channels = kernel.shape[:2]
    cubes = kernel.new_zeros(2, 2, 2, out, 2, 2, 2, channels, 3, 3, 3)
    taps = [(a, p, t, 2 * t + p - a) for a in range(2) for p in range(2) for t in (-1, 0, 1) if abs(2 * t + p - a) <= 1]
    for az, pz, tz, kz in taps:
        for ay, py, ty, ky in taps:
            for ax, px, tx, kx in taps:
                tap = kernel[:, :, kz + 1, ky + 1, kx + 1]
                cubes[az, ay, ax, :, pz, py, px, :, tz + 1, ty + 1, tx + 1] = tap
    return cubes.view(8 * out, 8 * channels, 3, 3, 3)


def convert_to_space_to_depth_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """Convert a stride-2 kernel for use after :func:`space_to_depth`: (out, in, 3, 3, 3) -> (out, 8 in, 3, 3, 3)."""
    out, channels = kernel.shape[:2]
    cubes = kernel.new_zeros(out, 2, 2, 2, channels, 3, 3, 3)
    # (voxel within a 2 x 2 x 2 cube, offset of that cube, offset of the kernel element) along one axis
    taps = ((1, -1, -1), (0, 0, 0), (1, 0, 1))
    for pz, tz, kz in taps:
        for py, ty, ky in taps:
            for px, tx, kx in taps:
                cubes[:, pz, py, px, :, tz + 1, ty + 1, tx + 1] = kernel[:, :, kz + 1, ky + 1, kx + 1]
    return cubes.view(out, 8 * channels, 3, 3, 3)


def convolve_by_space_to_depth(
    x: torch.Tensor, first_kernel: torch.Tensor, second_kernel: torch.Tensor
) -> torch.Tensor:
    """Compute :func:`convolve_directly` after :func:`space_to_depth`, with 8 channels, then 64, then 8 again."""
    x = F.conv3d(space_to_depth(x), channels_last(convert_kernel_for_space_to_depth(first_kernel)), padding=1)
    return F.conv3d(x, channels_last(convert_to_space_to_depth_kernel(second_kernel)), padding=1)


WAYS = {
    "plain": convolve_directly,
    "padded to 8": convolve_padded_channels,
    "padded to 16": lambda *given: convolve_padded_channels(*given, 16),
    "cubes": convolve_by_space_to_depth,
}
