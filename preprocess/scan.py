"""Chest CT scans: read and checked. SimpleITK throughout, so axes are (x, y, z).

Every image is in Hounsfield units (HU) and millimetres, and keeps its physical coordinates
(LPS: x to the patient's left, y to the back, z to the head) through each step.
"""

import contextlib
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from misc.command import UserError

AIR = -1024  # HU; what lies outside a scan
MIN_EXTENT = 50.0  # mm along each axis
MAX_HU = 32767
AIR_BELOW = -850  # HU; air is -1000 and a good part of a lung below this, but not where values are halved or shifted
PADDING_BELOW = -1500  # HU; lower values are a scanner's padding, higher ones noise around air


class ScanError(UserError):
    """One subject's scan, mask or transform cannot be used; the message says why."""


class EarlierFailure(ScanError):
    """An earlier step failed for this subject, and has told why."""


@contextlib.contextmanager
def _itk_errors(path: Path, what: str) -> Iterator[None]:
    """Turn ITK's many-line exceptions into one line that names the file."""
    try:
        yield
    except RuntimeError as error:
        raise ScanError(f"{path} cannot be read as {what}: {_itk_reason(str(error))}") from error


def _itk_reason(text: str) -> str:
    if "Unable to determine ImageIO reader" in text:
        return "its content is none of NIfTI, NRRD and MetaImage; damaged, or another kind of file"
    if "MetaImageIO" in text and "File cannot be read" in text:  # ITK's own last line is that of errno, unrelated
        return "its data are cut short, or the data file that its header names is missing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" not in line[:9]), lines[-1] if lines else "")[:200]


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
    # ITK fills what a cut NIfTI lacks with a constant and says nothing; the other formats' readers refuse.
    pair = re.sub(r"\.hdr(\.gz)?$", ".img", path.name)  # the older form of two files
    data = next((file for file in (path.with_name(pair), path.with_name(f"{pair}.gz")) if file.is_file()), path)
    found = _unpacked_bytes(data)
    with _itk_errors(path, "an image"):
        image = sitk.ReadImage(str(path))
    if found < (expected := _nifti_bytes(image)):
        raise ScanError(f"{data} is cut short: {found} bytes of {expected:.0f}; copy it again")
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


def _unpacked_bytes(path: Path) -> int:
    """Bytes in a file, unpacked where it is gzip, whose checksum is compared (about 5 ms/MB, once a step).

    Raises:
        ScanError: the gzip stream is cut or damaged.
    """
    with open(path, "rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return path.stat().st_size
    found = 0
    try:
        with gzip.open(path) as stream:
            while block := len(stream.read(1 << 20)):
                found += block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(f"{path} is cut short or damaged ({error}); copy it again") from error
    return found


def _nifti_bytes(image: sitk.Image) -> float:
    """Bytes that an image's NIfTI header asks for; 0 where it was read from another format."""
    if not image.HasMetaDataKey("vox_offset"):
        return 0
    header = {key: float(image.GetMetaData(key)) for key in ("vox_offset", "bitpix", "dim[0]")}
    values = np.prod([float(image.GetMetaData(f"dim[{axis}]")) for axis in range(1, int(header["dim[0]"]) + 1)])
    return header["vox_offset"] + values * header["bitpix"] / 8


def _cut_slices(folder: Path, read: set[str], sop_class: str) -> list[str]:
    """Names of files beside the ``read`` ones that should be slices of the class but are damaged.

    GDCM leaves a slice that is cut short out of its series; at the volume's end no gap would show it.
    """
    import pydicom

    cut = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or str(path) in read or path.name.startswith(".") or path.name == "DICOMDIR":
            continue
        with open(path, "rb") as stream:
            if stream.read(132)[128:] != b"DICM" and path.suffix.lower() != ".dcm":
                continue
        try:
            other = pydicom.filereader.read_file_meta_info(path).MediaStorageSOPClassUID != sop_class
        except Exception:  # whatever pydicom trips over, the file's first bytes are damaged
            other = False
        if not other:
            cut.append(path.name)
    return cut


def _read_dicom(folder: Path) -> sitk.Image:
    """The series with most slices in a folder; a gap between slices, or a damaged slice, is an error."""
    reader = sitk.ImageSeriesReader()
    with _itk_errors(folder, "a DICOM series"):
        series = [reader.GetGDCMSeriesFileNames(str(folder), one) for one in reader.GetGDCMSeriesIDs(str(folder))]
        if not series:
            below = next((entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()), None)
            hint = f"; subfolders are not searched, name the one with the slices ({below}?)" if below else ""
            raise ScanError(f"{folder} is a folder without DICOM slices{hint}")
        names = max(series, key=len)
        reader.SetFileNames(names)
        reader.MetaDataDictionaryArrayUpdateOn()
        image = reader.Execute()
    cut = _cut_slices(folder, {name for one in series for name in one}, reader.GetMetaData(0, "0008|0016"))
    if cut:
        raise ScanError(
            f"{folder} has DICOM slices that are cut short or damaged: {cut[0]}"
            + (f" and {len(cut) - 1} more" if len(cut) > 1 else "")
        )
    if len(names) < 2:
        raise ScanError(f"{folder} has no DICOM series of more than one slice")
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
    air = float((values < AIR_BELOW).mean())
    tissue = float(((values > -200) & (values < 300)).mean())
    if air < 0.01 or tissue < 0.01:
        raise ScanError(
            f"{seen}: not HU of a chest; {air:.1%} of the voxels are air (below {AIR_BELOW}) and {tissue:.1%} soft "
            "tissue (-200 to 300), at least 1% of each is expected"
        )
    values = np.where(values < PADDING_BELOW, AIR, np.minimum(values, MAX_HU))
    whole = values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
    checked = sitk.GetImageFromArray(values.astype(np.int16 if whole else np.float32))
    checked.CopyInformation(image)
    return checked


def check_extent(image: sitk.Image, path: str | os.PathLike) -> None:
    """Raise ScanError where a volume is too thin for a chest: a localizer, or a few slices of a scan."""
    extent = [count * spacing for count, spacing in zip(image.GetSize(), image.GetSpacing())]
    if min(extent) < MIN_EXTENT:
        size = " x ".join(f"{length:.0f}" for length in extent)
        raise ScanError(f"{path} spans {size} mm in {image.GetSize()[2]} slices, which is no whole chest")


def read_scan(path: str | os.PathLike) -> sitk.Image:
    """A chest CT in HU, in the orientation it is stored in. Raises ScanError."""
    return check_hounsfield(read_image(path), path)


def read_mask(path: str | os.PathLike) -> sitk.Image:
    """A label volume as uint8. Raises ScanError."""
    image = read_image(path)
    labels = sitk.GetArrayViewFromImage(image)
    if labels.min() < 0 or labels.max() > 255:
        raise ScanError(f"{path} has values from {labels.min()} to {labels.max()}; a mask has small whole labels")
    return sitk.Cast(image, sitk.sitkUInt8)


def limit_threads(threads: int) -> None:
    """Threads of ITK's filters in this process; its warnings, of many lines each, are off: our errors say more."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, threads))
