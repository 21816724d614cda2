"""Windows over the lungs of a scan, and a map on the scan's own grid from a value for each."""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from preprocess.patches import Patches


class Windows(NamedTuple):
    """Patches that a network sees, at every ``stride`` voxels over the lungs.

    Attributes:
        corners: (n, 3) lowest corners (x, y, z) in the padded volume.
        places: (n,) rows of the table whose location each window is read as: the nearest.
        cells: (n,) flat numbers in ``grid``.
        grid: (z, y, x) cells of ``stride`` voxels; a window's centre is its cell's.
        origin: (x, y, z) of the first cell's lowest voxel in the padded volume.
    """

    corners: np.ndarray
    places: np.ndarray
    cells: np.ndarray
    grid: tuple[int, int, int]
    origin: np.ndarray
    stride: int


def lay_windows(
    cut: Patches,
    mask: sitk.Image,
    table: np.ndarray,
    atlas: sitk.Image,
    transform: sitk.Transform,
    stride: int,
    patch_size: int,
) -> Windows | None:
    """Windows whose cells hold lung; None where the mask is empty in the volume.

    A window is read with the kernels of the table's location that is nearest on the atlas, by the
    inverse of the scan's registration: the network knows no others.

    Args:
        cut: of preprocess.patches.patches_of.
        mask: the scan's lung mask, on any grid.
        table: (L, 3) corners (x, y, z), atlas voxels.
        transform: atlas points -> scan points.
    """
    lungs = sitk.GetArrayFromImage(sitk.Resample(mask, cut.volume, sitk.Transform(), sitk.sitkNearestNeighbor, 0)) > 0
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
    centres = np.stack(np.unravel_index(cells, grid), axis=1) * stride + low + stride // 2  # (n, 3), z y x
    corners = centres[:, ::-1] - patch_size // 2  # (n, 3), x y z
    return Windows(corners, _nearest(corners, cut.volume, table, atlas, transform), cells, grid, low[::-1], stride)


def _nearest(corners, volume: sitk.Image, table: np.ndarray, atlas: sitk.Image, transform: sitk.Transform):
    """The table's row nearest to each corner, (n,)."""
    from scipy.spatial import cKDTree

    back = transform.GetInverse()
    points = [back.TransformPoint(volume.TransformIndexToPhysicalPoint(corner.tolist())) for corner in corners]
    on_atlas = [atlas.TransformPhysicalPointToContinuousIndex(point) for point in points]
    return cKDTree(table).query(np.asarray(on_atlas))[1]


def to_scan(values: np.ndarray, windows: Windows, volume: sitk.Image, scan: sitk.Image, mask: sitk.Image) -> sitk.Image:
    """A value for each window (n,) -> float32 on the scan's grid, between windows linear, 0 outside the mask.

    Only the cells that have a window are interpolated, so the lung's rim is no mixture with air.
    """
    cells, known = (np.zeros(int(np.prod(windows.grid)), dtype=np.float32) for _ in range(2))
    cells[windows.cells], known[windows.cells] = values, 1
    first = (windows.origin + windows.stride // 2 - 0.5).tolist()  # a window of even size has no middle voxel
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
