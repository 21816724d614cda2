"""Chest CT scans: read, checked, oriented, resampled. SimpleITK throughout, so axes are (x, y, z).

Every image here is in Hounsfield units (HU) and millimetres, and keeps its physical coordinates
(LPS: x to the patient's left, y to the back, z to the head) through each step.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

AIR = -1024  # HU; what lies outside a scan
ISO_SPACING = 1.0  # mm
PADDING = 60  # voxels of air around the resampled scan, as published
MAX_HU = 32767
PADDING_BELOW = -1500  # HU; lower values are a scanner's padding, higher ones noise around air


class ScanError(ValueError):
    """One subject's scan, mask or transform cannot be used; the message says why."""


@contextlib.contextmanager
def _itk_errors(path: Path, what: str) -> Iterator[None]:
    """Turn ITK's many-line exceptions into one line that names the file."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" not in line[:9]), lines[-1] if lines else "")
        raise ScanError(f"{path} cannot be read as {what}: {reason[:200]}") from error


def read_image(path: str | os.PathLike) -> sitk.Image:
    """Read a NIfTI, NRRD, MetaImage or other ITK volume, or a folder of DICOM slices.

    Raises:
        ScanError: missing, unreadable, not one 3-D volume of scalars, or slices missing.
    """
    path = Path(path)
    if not path.exists():
        raise ScanError(f"{path} does not exist")
    if path.is_dir():
        return _read_dicom(path)
    with _itk_errors(path, "an image"):
        image = sitk.ReadImage(str(path))
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        raise ScanError(
            f"{path} has {image.GetDimension()} dimensions, size {image.GetSize()}; a scan is one 3-D volume"
        )
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{path} has {image.GetNumberOfComponentsPerPixel()} values per voxel; a CT has one")
    if min(image.GetSize()) < 2:
        raise ScanError(f"{path} has size {image.GetSize()}; a volume needs at least 2 voxels along each axis")
    return image


def _read_dicom(folder: Path) -> sitk.Image:
    """The series with most slices in a folder; a gap between slices is an error."""
    reader = sitk.ImageSeriesReader()
    with _itk_errors(folder, "a DICOM series"):
        series = reader.GetGDCMSeriesIDs(str(folder))
        if not series:
            raise ScanError(f"{folder} is a folder without DICOM slices")
        names = max((reader.GetGDCMSeriesFileNames(str(folder), one) for one in series), key=len)
        if len(names) < 2:
            raise ScanError(f"{folder} has no DICOM series of more than one slice")
        reader.SetFileNames(names)
        reader.MetaDataDictionaryArrayUpdateOn()
        image = reader.Execute()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{folder} is not one 3-D volume with one value per voxel")

    if reader.HasMetaDataKey(0, "0020|0032"):  # ImagePositionPatient, mm
        places = np.array(
            [[float(v) for v in reader.GetMetaData(i, "0020|0032").split("\\")] for i in range(len(names))]
        )
        normal = np.array(image.GetDirection()).reshape(3, 3)[:, 2]
        gaps = np.abs(np.diff(places @ normal))
        if gaps.min() <= 0:
            raise ScanError(f"{folder} has two slices at one place; keep one reconstruction in the folder")
        if gaps.max() > 1.1 * np.median(gaps):
            raise ScanError(f"{folder} lacks slices: steps between {gaps.min():.2f} and {gaps.max():.2f} mm")
    return image


def check_hounsfield(image: sitk.Image, path: str | os.PathLike) -> sitk.Image:
    """Make sure that values can be HU of a chest; return them as int16, or float32 where fractional.

    Padding (below -1500 HU, NaN too) becomes -1024, so that interpolation does not ring at its edge.
    Noise around air is left alone here; patches are clipped at -1024 after resampling.

    Raises:
        ScanError: the values cannot be HU; the message gives the range and the usual cause.
    """
    values = sitk.GetArrayViewFromImage(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=AIR, posinf=MAX_HU, neginf=AIR)
    low, high = float(values.min()), float(values.max())
    seen = f"{path} has values from {low:g} to {high:g}"
    if low == high:
        raise ScanError(f"{seen}: the image is empty")
    if high <= 5:
        raise ScanError(f"{seen}: not HU; intensities look rescaled, give the original CT")
    if low >= 0:
        raise ScanError(f"{seen}: not HU, air is about -1000; the rescale intercept (often -1024) was not applied")
    air = float((values < -500).mean())
    tissue = float(((values > -200) & (values < 300)).mean())
    if air < 0.01 or tissue < 0.01:
        raise ScanError(
            f"{seen}: not HU of a chest; {air:.1%} of the voxels are air (below -500) and {tissue:.1%} soft tissue "
            "(-200 to 300), at least 1% of each is expected"
        )
    values = np.where(values < PADDING_BELOW, AIR, np.minimum(values, MAX_HU))
    whole = values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
    checked = sitk.GetImageFromArray(values.astype(np.int16 if whole else np.float32))
    checked.CopyInformation(image)
    return checked


def read_scan(path: str | os.PathLike) -> sitk.Image:
    """A chest CT in HU, in the orientation it is stored in. Raises ScanError."""
    return check_hounsfield(read_image(path), path)


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
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(sitk.sitkBSpline)
    resample.SetDefaultPixelValue(AIR)
    resample.SetOutputSpacing([ISO_SPACING] * 3)
    resample.SetOutputOrigin(image.GetOrigin())
    resample.SetOutputDirection(image.GetDirection())
    resample.SetSize([int(size[0] * spacing[0]), int(size[1] * spacing[1]), int((size[2] - 1) * spacing[2])])
    return resample.Execute(image)


def pad(image: sitk.Image) -> sitk.Image:
    """60 voxels of -1024 on every side; index 0 moves, physical places do not."""
    return sitk.ConstantPad(image, [PADDING] * 3, [PADDING] * 3, AIR)


def read_mask(path: str | os.PathLike) -> sitk.Image:
    """A label volume as uint8. Raises ScanError."""
    image = read_image(path)
    labels = sitk.GetArrayViewFromImage(image)
    if labels.min() < 0 or labels.max() > 255:
        raise ScanError(f"{path} has values from {labels.min()} to {labels.max()}; a mask has small whole labels")
    return sitk.Cast(image, sitk.sitkUInt8)


def read_atlas_mask(path: str | os.PathLike) -> sitk.Image:
    """The atlas's lung mask: 0 outside, 50 right lung, 100 left lung.

    Raises:
        ScanError: it has other labels or lacks one of the two.
    """
    mask = read_mask(path)
    labels = np.unique(sitk.GetArrayViewFromImage(mask)).tolist()
    if labels != [0, 50, 100]:
        raise ScanError(
            f"--atlas-mask {path} has labels {labels[:8]}; it must have 0 (outside), 50 (right lung), 100 (left)"
        )
    return mask


def write_image(image: sitk.Image, path: Path) -> None:
    """Write aside in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as aside:
        name = os.path.join(aside, path.name)
        sitk.WriteImage(image, name, useCompression=True)
        os.replace(name, path)


def limit_threads(threads: int) -> None:
    """Threads of ITK's filters in this process."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, threads))
