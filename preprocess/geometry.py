"""Orientation, resampling, padding and grids of images. Axes are (x, y, z), points are LPS in mm."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from misc.command import UserError
from misc.files import write_via_temporary_path
from preprocess.reading import ScanError
from preprocess.reading.nifti import check_data_size, read_header
from preprocess.scan import AIR
from preprocess.spline import resample_spline

ISO_SPACING = 1.0  # mm
SLAB = 1 << 24  # number of voxels converted to float32 at a time; a whole scan would need 0.9 GB
OPPOSITE = {(first, second) for pair in ("LR", "PA", "SI") for first in pair for second in pair}
PADDING = 60  # voxels of air around the resampled scan, the published value


def find_orientation(image: sitk.Image) -> str:
    """Return three letters for the directions of the index axes, for example LPS or LAS."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())


def orient(image: sitk.Image, orientation: str) -> sitk.Image:
    """Permute and flip the index axes to ``orientation``; every voxel keeps its physical position.

    Patches are cut along the index axes from their lowest corner, so these axes must have the atlas orientation.
    """
    own = find_orientation(image)
    if own == orientation:
        return image
    if all(axes in OPPOSITE for axes in zip(own, orientation)):
        # If the axes need only flips, avoid the additional copy that DICOMOrient makes.
        return sitk.Flip(image, [first != second for first, second in zip(own, orientation)], False)
    return sitk.DICOMOrient(image, orientation)


def iterate_slabs(image: sitk.Image, step: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the slice range (first, end) of each slab of about SLAB voxels; slabs start at multiples of ``step``."""
    columns, rows, slices = image.GetSize()
    thickness = max(1, SLAB // (columns * rows * step)) * step
    for first in range(0, slices, thickness):
        yield first, min(first + thickness, slices)


def average_blocks(
    image: sitk.Image, factors: Sequence[int], select: Callable[[sitk.Image], sitk.Image] = lambda slab: slab
) -> sitk.Image:
    """Apply ``select`` to each slab of an image and average blocks of ``factors`` (x, y, z) voxels to float32.

    The result is the same as ITK's BinShrink of the whole image. Incomplete blocks at the end of an axis are left out.
    """
    factors = [min(factor, count) for factor, count in zip(factors, image.GetSize())]
    made = []
    for first, last in iterate_slabs(image, factors[2]):
        if last - first >= factors[2]:
            # RegionOfInterest is faster than slicing with [].
            slab = sitk.RegionOfInterest(image, [*image.GetSize()[:2], last - first], [0, 0, first])
            made.append(sitk.BinShrink(sitk.Cast(select(slab), sitk.sitkFloat32), factors))
    whole = sitk.GetImageFromArray(np.concatenate([sitk.GetArrayViewFromImage(part) for part in made]))
    whole.SetOrigin(made[0].GetOrigin())
    whole.SetSpacing(made[0].GetSpacing())
    whole.SetDirection(made[0].GetDirection())
    return whole


def resample_to_slab(moving: sitk.Image, grid: sitk.Image, first: int, last: int) -> np.ndarray:
    """Resample an image linearly to slices ``first`` to ``last`` (exclusive) of ``grid``.

    Returns an array (z, y, x), which is 0 outside the image.
    """
    size = [*grid.GetSize()[:2], last - first]
    origin = grid.TransformIndexToPhysicalPoint([0, 0, first])
    where = (origin, grid.GetSpacing(), grid.GetDirection())
    return sitk.GetArrayFromImage(sitk.Resample(moving, size, sitk.Transform(), sitk.sitkLinear, *where, 0.0))


def resample_isotropic(image: sitk.Image) -> sitk.Image:
    """Resample an image to 1 mm by cubic B-splines, with unchanged axes and origin.

    Voxels outside the image are set to -1024 HU. The size is that of the published code: floor(nx sx), floor(ny sy),
    floor((nz - 1) sz) for nx, ny, nz voxels of sx, sy, sz mm.
    """
    size, spacing = image.GetSize(), image.GetSpacing()
    wanted = int(size[0] * spacing[0]), int(size[1] * spacing[1]), int((size[2] - 1) * spacing[2])
    return resample_spline(image, wanted, ISO_SPACING, AIR)


def pad_with_air(image: sitk.Image) -> sitk.Image:
    """Pad with 60 voxels of -1024 HU on every side; the physical positions of the original voxels do not change."""
    return sitk.ConstantPad(image, [PADDING] * 3, [PADDING] * 3, AIR)


def have_same_grid(first: sitk.Image, second: sitk.Image) -> bool:
    """Return whether two images have the same voxel grid in physical space."""
    return (
        first.GetSize() == second.GetSize()
        and np.allclose(first.GetOrigin(), second.GetOrigin(), atol=1e-2)
        and np.allclose(first.GetSpacing(), second.GetSpacing(), atol=1e-4)
        and np.allclose(first.GetDirection(), second.GetDirection(), atol=1e-4)
    )


def write_image(image: sitk.Image, path: Path) -> None:
    """Write a compressed NIfTI file and verify that it is complete.

    ITK does not report a full disk, so this function reads the header again and checks the length of the data.

    Raises:
        UserError: the file is incomplete.
    """
    with write_via_temporary_path(path) as aside:
        sitk.WriteImage(image, str(aside), useCompression=True)
        try:
            check_data_size(aside, read_header(aside))
        except ScanError as error:
            raise make_incomplete_write_error(path) from error


def write_transform(transform: sitk.Transform, path: Path) -> None:
    """Write a transform file and read it again. Raises UserError if the file is incomplete."""
    with write_via_temporary_path(path) as aside:
        sitk.WriteTransform(transform, str(aside))
        try:
            written = sitk.ReadTransform(str(aside)).GetParameters()
        except RuntimeError as error:
            raise make_incomplete_write_error(path) from error
        if written != transform.GetParameters():
            raise make_incomplete_write_error(path)


def make_incomplete_write_error(path: Path) -> UserError:
    """Return the error for a file that was written incompletely."""
    free = shutil.disk_usage(path.parent).free
    return UserError(f"{path} could not be written completely; check the disk, which has {free / 1e6:.0f} MB free")
