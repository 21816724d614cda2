"""Lay windows over the lungs of a scan, and turn one value per window into a map on the grid of the scan."""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from preprocess.patches import Patches


class Windows(NamedTuple):
    """Windows over the lungs, one every ``stride`` voxels, each as large as a patch.

    Attributes:
        corners: (n, 3) lowest corners (x, y, z) in the padded volume.
        places: (n,) row, in the location table, of the location nearest to each window.
        cells: (n,) flat index of each window in ``grid``.
        grid: number of cells (z, y, x). Each cell is a cube of ``stride`` voxels with the same centre as its window.
        origin: (x, y, z) of the lowest voxel of the first cell in the padded volume.
        stride: edge length of a cell in voxels.
    """

    corners: np.ndarray
    places: np.ndarray
    cells: np.ndarray
    grid: tuple[int, int, int]
    origin: np.ndarray
    stride: int


def place_windows_over_lungs(
    scan_patches: Patches,
    mask: sitk.Image,
    atlas_corners: np.ndarray,
    atlas: sitk.Image,
    transform: sitk.Transform,
    stride: int,
    patch_size: int,
) -> Windows | None:
    """Place a window at the centre of each grid cell that contains lung. Returns None if the volume contains no lung.

    The network was only trained at the locations in ``atlas_corners``. Each window is therefore mapped to
    the atlas by the inverse of the registration, and is encoded with the nearest location in ``atlas_corners``.

    Args:
        scan_patches: result of preprocess.patches.cut_scan.
        mask: lung mask of the scan, on any grid.
        atlas_corners: (L, 3) corners (x, y, z) in atlas voxels.
        atlas: lung mask of the atlas.
        transform: maps atlas points to scan points.
        stride: distance between windows in voxels.
        patch_size: edge length of a window in voxels.
    """
    lungs = (
        sitk.GetArrayFromImage(sitk.Resample(mask, scan_patches.volume, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
        > 0
    )
    along = [np.flatnonzero(lungs.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]  # z, y, x
    if not len(along[0]):
        return None
    low = np.array([index[0] for index in along])
    grid = tuple(int(-(-(index[-1] + 1 - index[0]) // stride)) for index in along)
    box = np.zeros([cells * stride for cells in grid], dtype=bool)
    inner = lungs[tuple(slice(start, start + length) for start, length in zip(low, box.shape))]
    box[tuple(slice(0, length) for length in inner.shape)] = inner
    blocks = box.reshape(grid[0], stride, grid[1], stride, grid[2], stride)
    cells = np.flatnonzero(blocks.any(axis=(1, 3, 5)))
    centres = np.stack(np.unravel_index(cells, grid), axis=1) * stride + low + stride // 2  # (n, 3): z, y, x
    corners = centres[:, ::-1] - patch_size // 2  # (n, 3): x, y, z
    return Windows(
        corners,
        _find_nearest_locations(corners, scan_patches.volume, atlas_corners, atlas, transform),
        cells,
        grid,
        low[::-1],
        stride,
    )


def _find_nearest_locations(
    corners: np.ndarray, volume: sitk.Image, table: np.ndarray, atlas: sitk.Image, transform: sitk.Transform
) -> np.ndarray:
    """Return, for each corner, the row of the nearest location in the table, (n,)."""
    from scipy.spatial import cKDTree

    back = transform.GetInverse()
    points = [back.TransformPoint(volume.TransformIndexToPhysicalPoint(corner.tolist())) for corner in corners]
    on_atlas = [atlas.TransformPhysicalPointToContinuousIndex(point) for point in points]
    return cKDTree(table).query(np.asarray(on_atlas))[1]


def resample_to_scan(
    values: np.ndarray, windows: Windows, volume: sitk.Image, scan: sitk.Image, mask: sitk.Image
) -> sitk.Image:
    """Interpolate one value per window (n,) linearly on the grid of the scan; the result is 0 outside the mask.

    The interpolation uses only cells with a window, so that values at the border of the lung are not mixed with 0.
    """
    cells, known = (np.zeros(int(np.prod(windows.grid)), dtype=np.float32) for _ in range(2))
    cells[windows.cells], known[windows.cells] = values, 1
    first = (
        windows.origin + windows.stride // 2 - 0.5
    ).tolist()  # the centre of a window with an even number of voxels lies between two voxels
    origin = volume.TransformContinuousIndexToPhysicalPoint(first)
    images = []
    for array in (cells, known):
        image = sitk.GetImageFromArray(array.reshape(windows.grid))
        image.SetOrigin(origin)
        image.SetSpacing([windows.stride * length for length in volume.GetSpacing()])
        image.SetDirection(volume.GetDirection())
        images.append(sitk.GetArrayFromImage(sitk.Resample(image, scan, sitk.Transform(), sitk.sitkLinear, 0.0)))
    sums, weights = images
    inside = (sitk.GetArrayViewFromImage(mask) > 0) & (weights > 1e-3)
    result = np.divide(sums, weights, out=np.zeros_like(sums), where=inside)
    image = sitk.GetImageFromArray(result)
    image.CopyInformation(scan)
    return image
