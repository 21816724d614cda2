"""Affine coordinates and trilinear sampling of volumes, with the conventions of MONAI's transforms."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

SAMPLE_CHUNK = 4  # number of samples to resample together; these samples fit into the CPU cache

Parameters = dict[str, Any]


def rotation_matrix(angles: torch.Tensor) -> torch.Tensor:
    """Return rotation matrices about axes 0, 1 and 2, multiplied: (n, 3) radians -> (n, 3, 3).

    The angles have the same signs as in monai.transforms.utils.create_rotate.
    """
    sin, cos = torch.sin(angles), torch.cos(angles)
    zero, one = torch.zeros_like(sin[:, 0]), torch.ones_like(sin[:, 0])

    def make_matrices_from_entries(*entries: torch.Tensor) -> torch.Tensor:
        return torch.stack(entries, dim=1).view(-1, 3, 3)

    s0, s1, s2 = sin.unbind(1)
    c0, c1, c2 = cos.unbind(1)
    first = make_matrices_from_entries(one, zero, zero, zero, c0, -s0, zero, s0, c0)
    second = make_matrices_from_entries(c1, zero, s1, zero, one, zero, -s1, zero, c1)
    third = make_matrices_from_entries(c2, -s2, zero, s2, c2, zero, zero, zero, one)
    return first @ second @ third


def affine_matrix(parameters: Parameters) -> torch.Tensor:
    """Return matrices (n, 3, 4) that map output voxels to input voxels, relative to the patch centre.

    A voxel x is mapped to rotation @ (scale * x + translation).
    """
    rotation = rotation_matrix(parameters["rotation"])
    linear = rotation * parameters["scale"][:, None, :]
    offset = rotation @ parameters["translation"][:, :, None]
    return torch.cat([linear, offset], dim=2)


def voxel_coordinates(matrix: torch.Tensor, size: Sequence[int], offset: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the input coordinates of every output voxel x, (n, 3, *size): centre + matrix (x - centre + offset).

    Args:
        matrix: (n, 3, 4) from :func:`affine_matrix`, in the volumes' dtype.
        size: (D, H, W).
        offset: (n, 3, *size) voxels, or None.
    """
    centre = [(length - 1) / 2 for length in size]
    along = [
        torch.arange(length, dtype=matrix.dtype, device=matrix.device) - middle for length, middle in zip(size, centre)
    ]
    points = []
    for axis in range(3):
        a, b, c, shift = (value[:, None, None] for value in matrix[:, axis].unbind(1))
        plane = a * along[0][:, None] + (b * along[1] + (shift + centre[axis]))  # (n, D, H)
        points.append(plane[..., None] + (c * along[2])[:, None])
    voxels = torch.stack(points, dim=1)
    if offset is not None:
        voxels += torch.einsum("nij,njdhw->nidhw", matrix[:, :, :3], offset)
    return voxels


def sample_trilinearly(volumes: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Sample volumes trilinearly at (n, 3, *size) voxel coordinates -> (n, C, *size). Borders are replicated."""
    if volumes.device.type != "cpu":
        return _sample_volumes(volumes, voxels)
    out = torch.empty_like(volumes)
    for some, where, to in zip(volumes.split(SAMPLE_CHUNK), voxels.split(SAMPLE_CHUNK), out.split(SAMPLE_CHUNK)):
        _sample_slices(some, where, to)
    return out


def _sample_volumes(volumes: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Sample with F.grid_sample, where -1 and 1 are the outer faces of the outermost voxels."""
    grid = torch.stack([(voxels[:, axis] + 0.5) * (2 / volumes.shape[2 + axis]) - 1 for axis in (2, 1, 0)], dim=-1)
    return F.grid_sample(volumes, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _sample_slices(volumes: torch.Tensor, voxels: torch.Tensor, out: torch.Tensor) -> None:
    """Sample trilinearly into ``out``, as two bilinear samplings: in the slices below and above each point.

    torch's sampler is vectorised for images but not for volumes. The slices are therefore stacked into one tall
    image. A second set of channels holds, for each slice, the next slice. The image's height and width are padded to a
    power of two plus one, so that coordinates are scaled without rounding. On one core with AVX-512, an affine
    transform of a 32^3 patch takes 0.4 ms, compared with 1.4 ms with torch's sampler for volumes.
    """
    count, channels, depth, height, width = volumes.shape
    z, y, x = (
        voxels[:, axis].clamp(0, length - 1) for axis, length in enumerate((depth, height, width))
    )  # (n, D, H, W)
    rows, columns = 1 << (depth * height + height).bit_length(), 1 << width.bit_length()
    image = volumes.new_empty(count, 2 * channels, rows + 1, columns + 1)
    used = depth * height
    flat = volumes.reshape(count, channels, used, width)
    image[:, :channels, :used, :width] = flat
    image[:, channels:, : used - height, :width] = flat[:, :, height:]
    # The padding is read with a weight of 0, so its values must be finite (0 times infinity is NaN).
    image[:, :channels, used : used + height + 1] = 0
    image[:, channels:, used - height : used + height + 1] = 0
    image[:, :, :, width : width + 1] = 0

    below = z.floor()
    share = z.sub_(below)[:, None]
    grid = volumes.new_empty(count, depth, height * width, 2)
    flat_grid = grid.view(count, depth, height, width, 2)
    torch.mul(x.sub_(columns / 2), 2 / columns, out=flat_grid[..., 0])
    torch.add(below.mul_(2 * height / rows).sub_(1), y, alpha=2 / rows, out=flat_grid[..., 1])
    both = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    both = both.view(count, 2, channels, depth, height, width)
    torch.lerp(both[:, 0], both[:, 1], share, out=out)
