"""Where voxels lie: orientation, resampling, padding, grids. Axes are (x, y, z), places LPS in mm."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from misc.command import UserError
from misc.files import whole_file
from preprocess.reading import ScanError
from preprocess.reading.nifti import check_whole, read_header
from preprocess.scan import AIR
from preprocess.spline import resample_spline

ISO_SPACING = 1.0  # mm
SLAB = 1 << 24  # voxels that are float32 at one time: a whole scan would be 0.9 GB
OPPOSITE = {(first, second) for pair in ("LR", "PA", "SI") for first in pair for second in pair}
PADDING = 60  # voxels of air around the resampled scan, as published


def orientation_of(image: sitk.Image) -> str:
    """Three letters, where each index axis points, such as LPS or LAS."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())


def orient(image: sitk.Image, orientation: str) -> sitk.Image:
    """Permute and flip index axes to ``orientation``; every voxel keeps its physical place.

    A patch is cut along index axes from its lowest corner, so they must point the atlas's way.
    """
    own = orientation_of(image)
    if own == orientation:
        return image
    if all(axes in OPPOSITE for axes in zip(own, orientation)):
        # The filter of ITK that does all makes one more copy, also of axes that are in order.
        return sitk.Flip(image, [first != second for first, second in zip(own, orientation)], False)
    return sitk.DICOMOrient(image, orientation)


def slabs(image: sitk.Image, step: int = 1) -> Iterator[tuple[int, int]]:
    """First and last slice, the last excluded, of pieces of some SLAB voxels; each starts at a multiple of ``step``."""
    columns, rows, slices = image.GetSize()
    thickness = max(1, SLAB // (columns * rows * step)) * step
    for first in range(0, slices, thickness):
        yield first, min(first + thickness, slices)


def block_means(
    image: sitk.Image, factors: Sequence[int], select: Callable[[sitk.Image], sitk.Image] = lambda slab: slab
) -> sitk.Image:
    """Float32 means of blocks of ``factors`` (x, y, z) voxels, of what ``select`` makes of them, a slab at a time.

    As ITK's BinShrink of the whole; blocks that the image does not fill are left out.
    """
    factors = [min(factor, count) for factor, count in zip(factors, image.GetSize())]
    made = []
    for first, last in slabs(image, factors[2]):
        if last - first >= factors[2]:
            slab = sitk.RegionOfInterest(image, [*image.GetSize()[:2], last - first], [0, 0, first])  # fast, [] is not
            made.append(sitk.BinShrink(sitk.Cast(select(slab), sitk.sitkFloat32), factors))
    whole = sitk.GetImageFromArray(np.concatenate([sitk.GetArrayViewFromImage(part) for part in made]))
    whole.SetOrigin(made[0].GetOrigin())
    whole.SetSpacing(made[0].GetSpacing())
    whole.SetDirection(made[0].GetDirection())
    return whole


def on_slab(moving: sitk.Image, grid: sitk.Image, first: int, last: int) -> np.ndarray:
    """An image on slices ``first`` to ``last`` of another one's grid, linear, 0 outside, (z, y, x)."""
    size = [*grid.GetSize()[:2], last - first]
    origin = grid.TransformIndexToPhysicalPoint([0, 0, first])
    where = (origin, grid.GetSpacing(), grid.GetDirection())
    return sitk.GetArrayFromImage(sitk.Resample(moving, size, sitk.Transform(), sitk.sitkLinear, *where, 0.0))


def resample_isotropic(image: sitk.Image) -> sitk.Image:
    """Cubic B-spline to 1 mm on the image's own axes and origin; outside it -1024.

    The size, floor(nx sx), floor(ny sy), floor((nz - 1) sz), is the published code's.
    """
    size, spacing = image.GetSize(), image.GetSpacing()
    wanted = int(size[0] * spacing[0]), int(size[1] * spacing[1]), int((size[2] - 1) * spacing[2])
    return resample_spline(image, wanted, ISO_SPACING, AIR)


def pad(image: sitk.Image) -> sitk.Image:
    """60 voxels of -1024 on every side; index 0 moves, physical places do not."""
    return sitk.ConstantPad(image, [PADDING] * 3, [PADDING] * 3, AIR)


def same_grid(first: sitk.Image, second: sitk.Image) -> bool:
    """Whether two images have the same voxels in the same places."""
    return (
        first.GetSize() == second.GetSize()
        and np.allclose(first.GetOrigin(), second.GetOrigin(), atol=1e-2)
        and np.allclose(first.GetSpacing(), second.GetSpacing(), atol=1e-4)
        and np.allclose(first.GetDirection(), second.GetDirection(), atol=1e-4)
    )


def write_image(image: sitk.Image, path: Path) -> None:
    """A whole NIfTI file, compressed.

    Raises:
        UserError: it is not whole. ITK says nothing of a disk that is full, so the file is read again.
    """
    with whole_file(path) as aside:
        sitk.WriteImage(image, str(aside), useCompression=True)
        try:
            check_whole(aside, read_header(aside))
        except ScanError as error:
            raise not_written(path) from error


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """A whole file of a transform. Raises UserError where it is not."""
    with whole_file(path) as aside:
        sitk.WriteTransform(transform, str(aside))
        try:
            written = sitk.ReadTransform(str(aside)).GetParameters()
        except RuntimeError as error:
            raise not_written(path) from error
        if written != transform.GetParameters():
            raise not_written(path)


def not_written(path: Path) -> UserError:
    """The error of a file that a library has written half of."""
    free = shutil.disk_usage(path.parent).free
    return UserError(f"{path} could not be written whole; is the disk full? It has {free / 1e6:.0f} MB free")
