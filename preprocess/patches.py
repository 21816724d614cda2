"""Cut patches from a scan at the atlas locations."""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from misc.sizes import HU_MAX, HU_MIN
from preprocess.geometry import PADDING, find_orientation, orient, pad_with_air, resample_isotropic
from preprocess.scan import ScanError


class Patches(NamedTuple):
    """The patches of one scan, and the volume that they are cut from."""

    patches: np.ndarray  # (L, p, p, p) int16 HU, each (z, y, x)
    corners: np.ndarray  # (L, 3) int64, lowest corner (x, y, z) in ``volume``
    outside: np.ndarray  # (L,) number of voxels of each patch that lie outside the scan
    volume: sitk.Image  # the scan, resampled to 1 mm and padded
    values: np.ndarray  # voxels of ``volume``, (z, y, x) int16 HU


def map_corners(table: np.ndarray, atlas: sitk.Image, transform: sitk.Transform, volume: sitk.Image) -> np.ndarray:
    """Map corners (L, 3), each (x, y, z), from atlas voxels to int64 voxels of ``volume``.

    The atlas maps voxel indices to atlas points, and the transform maps atlas points to scan points. The volume maps
    scan points to voxel indices, with SimpleITK's rounding.
    """
    corners = np.empty_like(table)
    for row, corner in enumerate(table):
        point = transform.TransformPoint(atlas.TransformIndexToPhysicalPoint([int(value) for value in corner]))
        corners[row] = volume.TransformPhysicalPointToIndex(point)
    return corners


def cut_patches(volume: np.ndarray, corners: np.ndarray, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut patches from a volume; patch voxels outside the volume are -1024.

    Args:
        volume: (z, y, x) int16.
        corners: (L, 3) lowest corners (x, y, z), possibly outside the volume.
        patch_size: p, in voxels.

    Returns:
        Patches (L, p, p, p), each (z, y, x), and the number of voxels of each patch outside the volume, (L,).
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


def cut_scan(
    scan: sitk.Image, transform: sitk.Transform, atlas: sitk.Image, table: np.ndarray, patch_size: int
) -> Patches:
    """Cut patches from a scan at the atlas locations.

    The scan is reoriented to the atlas, resampled to 1 mm, padded with 60 voxels of air and clipped to [-1024, 240] HU.
    Voxels outside the scan are -1024.

    Args:
        scan: chest CT in HU, any orientation and spacing.
        transform: maps atlas points to scan points.
        atlas: lung mask of the atlas.
        table: (L, 3) corners (x, y, z) in atlas voxels.
        patch_size: p, in voxels.
    """
    volume = pad_with_air(resample_isotropic(orient(scan, find_orientation(atlas))))
    values = sitk.GetArrayFromImage(volume)  # (z, y, x)
    if values.dtype.kind == "f":
        values = np.rint(values)
    values = np.clip(values, HU_MIN, HU_MAX).astype(np.int16)
    corners = map_corners(table, atlas, transform, volume)
    patches, _ = cut_patches(values, corners, patch_size)
    # Voxels in the padding also count as outside the scan.
    inner = values[PADDING:-PADDING, PADDING:-PADDING, PADDING:-PADDING]
    _, outside = cut_patches(inner, corners - PADDING, patch_size)
    return Patches(patches, corners, outside, volume, values)


def check_any_patch_inside_scan(patches: Patches, scan_name: object) -> None:
    """Raise ScanError if every patch lies outside the scan."""
    if len(patches.patches) and (patches.outside == patches.patches[0].size).all():
        raise ScanError(
            f"every patch lies outside {scan_name}, so the transform belongs to another scan; register this scan again"
        )


def measure_share_inside(corners: np.ndarray, patch_size: int, volume: sitk.Image, mask: sitk.Image) -> float:
    """Return the fraction of patch centres that lie in the mask; ``corners`` are voxels (x, y, z) of ``volume``."""
    labels = sitk.GetArrayViewFromImage(mask)
    size = np.array(mask.GetSize())
    inside = 0
    for corner in corners:
        point = volume.TransformContinuousIndexToPhysicalPoint([float(value) + patch_size // 2 for value in corner])
        index = np.array(mask.TransformPhysicalPointToIndex(point))
        if (index >= 0).all() and (index < size).all():
            inside += bool(labels[tuple(index[::-1])])
    return inside / len(corners)
