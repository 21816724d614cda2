"""Where voxels lie: orientation, resampling, padding, grids. Axes are (x, y, z), places LPS in mm."""

import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from misc.command import UserError
from misc.files import whole_file
from preprocess.reading.errors import ScanError
from preprocess.reading.nifti import check_whole, read_header
from preprocess.scan import AIR
from preprocess.spline import resample_spline

ISO_SPACING = 1.0  # mm
PADDING = 60  # voxels of air around the resampled scan, as published


def orientation_of(image: sitk.Image) -> str:
    """Three letters, where each index axis points, such as LPS or LAS."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())


def orient(image: sitk.Image, orientation: str) -> sitk.Image:
    """Permute and flip index axes to ``orientation``; every voxel keeps its physical place.

    A patch is cut along index axes from its lowest corner, so they must point the atlas's way.
    """
    return image if orientation_of(image) == orientation else sitk.DICOMOrient(image, orientation)


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
