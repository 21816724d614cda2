"""Patches of a scan at the atlas's locations."""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from misc.sizes import HU_MAX, HU_MIN
from preprocess.geometry import PADDING, orient, orientation_of, pad, resample_isotropic
from preprocess.scan import ScanError


class Patches(NamedTuple):
    """What is cut from one scan."""

    patches: np.ndarray  # (L, p, p, p) int16 HU, each (z, y, x)
    corners: np.ndarray  # (L, 3) int64, lowest corner (x, y, z) in ``volume``
    outside: np.ndarray  # (L,) voxels of each patch that lie outside the scan
    volume: sitk.Image  # the padded scan at 1 mm
    values: np.ndarray  # its voxels, (z, y, x) int16 HU


def map_corners(table: np.ndarray, atlas: sitk.Image, transform: sitk.Transform, volume: sitk.Image) -> np.ndarray:
    """Corners (L, 3) in atlas voxels -> (L, 3) int64 in voxels of ``volume``, both (x, y, z).

    Index to point by the atlas, point to point by the transform, point to index by the volume, with
    SimpleITK's own rounding.
    """
    corners = np.empty_like(table)
    for row, corner in enumerate(table):
        point = transform.TransformPoint(atlas.TransformIndexToPhysicalPoint([int(value) for value in corner]))
        corners[row] = volume.TransformPhysicalPointToIndex(point)
    return corners


def cut_patches(volume: np.ndarray, corners: np.ndarray, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut cubes from a volume; voxels outside it are -1024.

    Args:
        volume: (z, y, x) int16.
        corners: (L, 3) lowest corners (x, y, z), possibly outside the volume.

    Returns:
        Patches (L, p, p, p), each (z, y, x); and the number of each patch's voxels outside, (L,).
    """
    patches = np.full((len(corners), *[patch_size] * 3), HU_MIN, dtype=np.int16)
    outside = np.zeros(len(corners), dtype=np.int64)
    size = np.array(volume.shape)
    for row, corner in enumerate(corners[:, ::-1]):  # (x, y, z) -> (z, y, x)
        low, high = np.clip(corner, 0, size), np.clip(corner + patch_size, 0, size)
        source = tuple(slice(a, b) for a, b in zip(low, high))
        target = tuple(slice(a, b) for a, b in zip(low - corner, high - corner))
        patches[row][target] = volume[source]
        outside[row] = patch_size**3 - np.prod(high - low)
    return patches, outside


def patches_of(
    scan: sitk.Image, transform: sitk.Transform, atlas: sitk.Image, table: np.ndarray, patch_size: int
) -> Patches:
    """Cut a scan at the atlas's locations.

    The scan is brought to the atlas's orientation, resampled to 1 mm, padded by 60 voxels of air and
    clipped to [-1024, 240] HU. What lies outside it is -1024.

    Args:
        scan: in HU, any orientation and spacing.
        transform: atlas points -> scan points.
        atlas: its lung mask.
        table: (L, 3) corners (x, y, z), atlas voxels.
        patch_size: p, in voxels.
    """
    volume = pad(resample_isotropic(orient(scan, orientation_of(atlas))))
    values = sitk.GetArrayFromImage(volume)  # (z, y, x)
    if values.dtype.kind == "f":
        values = np.rint(values)
    values = np.clip(values, HU_MIN, HU_MAX).astype(np.int16)
    corners = map_corners(table, atlas, transform, volume)
    patches, _ = cut_patches(values, corners, patch_size)
    # The padding is outside the scan too.
    inner = values[PADDING:-PADDING, PADDING:-PADDING, PADDING:-PADDING]
    _, outside = cut_patches(inner, corners - PADDING, patch_size)
    return Patches(patches, corners, outside, volume, values)


def check_inside(cut: Patches, name: object) -> None:
    """Raise ScanError where every patch lies outside the scan."""
    if len(cut.patches) and (cut.outside == cut.patches[0].size).all():
        raise ScanError(f"every patch lies outside {name}: its transform belongs to another scan")


def share_inside(corners: np.ndarray, patch_size: int, volume: sitk.Image, mask: sitk.Image) -> float:
    """Share of patch centres that lie in the mask. corners: voxels (x, y, z) of ``volume``."""
    labels = sitk.GetArrayViewFromImage(mask)
    size = np.array(mask.GetSize())
    inside = 0
    for corner in corners:
        point = volume.TransformContinuousIndexToPhysicalPoint([float(value) + patch_size // 2 for value in corner])
        index = np.array(mask.TransformPhysicalPointToIndex(point))
        if (index >= 0).all() and (index < size).all():
            inside += bool(labels[tuple(index[::-1])])
    return inside / len(corners)
