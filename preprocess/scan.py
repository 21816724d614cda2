"""Read and check chest CT scans.

All images are SimpleITK images with axes (x, y, z), values in Hounsfield units (HU) and lengths in millimetres. Every
stage keeps the physical coordinates (LPS: x to the subject's left, y to the back, z to the head). Other modules read
scans through this module; ``reading/`` has one module for each file format.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from misc.files import is_utf8
from preprocess.reading import EarlierFailure, ScanError, nifti
from preprocess.reading.claims import check_voxel_data_complete, warn_missing_geometry
from preprocess.reading.dicom import read_dicom
from preprocess.reading.formats import check_file_suffix, detect_format, read_head_and_detect_gzip, refuse_foreign_file
from preprocess.reading.itk import catch_itk_errors, check_right_angles, compute_affine
from preprocess.reading.values import AIR, check_extent, check_hounsfield

__all__ = [
    "AIR",
    "FACTS",
    "EarlierFailure",
    "Scan",
    "ScanError",
    "add_warnings",
    "check_extent",
    "check_hounsfield",
    "limit_threads",
    "load_scan",
    "read_image",
    "read_mask",
    "read_scan",
]

FACTS = ("series", "series_uid", "kernel", "spacing", "size", "left_out", "warnings")  # report columns
FRACTION = 0.01  # largest accepted distance of a label from a whole number; rescaling causes small errors
VOXEL = (0.05, 20.0)  # mm; accepted range of voxel sizes; real scans have voxels of 0.3 to 10 mm


class Scan(NamedTuple):
    """A chest CT and the facts about it that go into the report."""

    image: sitk.Image  # HU
    facts: dict[str, str]  # the keys are FACTS


def _read_any_format(path: Path, series: str, warnings: list[str]) -> tuple[sitk.Image, dict[str, str]]:
    """Read an image in any supported format, and the facts about its DICOM series (empty for other formats)."""
    if not is_utf8(path):
        raise ScanError(f"{str(path)!a} has a name that is not UTF-8, so ITK cannot open it; rename it")
    if not path.exists():
        raise ScanError(f"{path} does not exist")
    if path.is_dir():
        return read_dicom(path, series, warnings)
    head, packed = read_head_and_detect_gzip(nifti.find_header_file(path))
    kind = detect_format(head)
    if kind == "DICOM":
        if packed:
            raise ScanError(f"{path} is DICOM compressed with gzip, which is not supported; unpack it with gunzip")
        return read_dicom(path, series, warnings)
    if not kind:
        refuse_foreign_file(path, head, packed)
    check_file_suffix(path, kind, packed)
    header = nifti.read_header(nifti.find_header_file(path)) if kind == "NIfTI" else None
    if header:
        nifti.check_sform_and_qform(path, header, warnings)
        nifti.check_voxel_size_and_offset(path, header)
        nifti.check_data_size(path, header)
    elif kind:
        check_voxel_data_complete(path, kind)
        warn_missing_geometry(path, kind, warnings)
    told: list[str] = []
    with catch_itk_errors(path, "an image", told), nifti.link_if_itk_would_read_another_file(path) as only:
        image = sitk.ReadImage(str(only))
    warnings += told
    image = _drop_extra_axes(image, path)
    if header:
        nifti.check_affine(path, header, compute_affine(image))
    return image, {}


def _drop_extra_axes(image: sitk.Image, path: Path) -> sitk.Image:
    """Drop extra axes of length 1. Raise ScanError unless the result is a single 3-D volume of scalars."""
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = sitk.Extract(image, [*image.GetSize()[:-1], 0])
    if image.GetDimension() != 3:
        raise ScanError(f"{path} has {image.GetDimension()} dimensions, size {image.GetSize()}; provide one 3-D volume")
    if "complex" in image.GetPixelIDTypeAsString():
        raise ScanError(f"{path} has complex values; provide a CT in HU")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{path} has {image.GetNumberOfComponentsPerPixel()} values per voxel, but a CT has one")
    if min(image.GetSize()) < 2:
        raise ScanError(f"{path} has size {image.GetSize()}, but a volume needs at least 2 voxels along each axis")
    return image


def _check_header(image: sitk.Image, path: Path, warnings: list[str]) -> None:
    """Check the header values that every format has.

    Raises ScanError for wrong axes or voxel sizes, and adds a warning if the header looks empty.
    """
    check_right_angles(compute_affine(image), image.GetSize(), f"{path}: its header")
    sizes = " x ".join(f"{length:g}" for length in image.GetSpacing())
    if not VOXEL[0] <= min(image.GetSpacing()) <= max(image.GetSpacing()) <= VOXEL[1]:
        raise ScanError(
            f"{path} has voxels of {sizes} mm, which is impossible for a CT; correct the voxel size in its header"
        )
    plain = all(abs(value) in (0, 1) for value in image.GetDirection())
    if plain and not any(image.GetOrigin()) and set(image.GetSpacing()) == {1.0}:
        warnings.append("the header looks like that of a bare array (voxels of 1 mm, origin 0), not of a scan: "
                        "sizes and orientation may be wrong")  # fmt: skip


def _read_and_check(path: Path, series: str) -> tuple[sitk.Image, dict[str, str], list[str]]:
    warnings: list[str] = []
    image, told = _read_any_format(path, series.strip(), warnings)
    _check_header(image, path, warnings)
    return image, told, warnings


def read_image(path: str | os.PathLike, series: str = "") -> sitk.Image:
    """Read a NIfTI, NRRD, MetaImage or other ITK volume, or a folder of DICOM slices.

    Args:
        path: a file or a folder.
        series: the DICOM series to read from a folder: its number, description, kernel or UID.

    Raises:
        ScanError: the scan is missing, unreadable, truncated or not a single 3-D volume of scalars, or its header
            contradicts the true positions of its voxels.
    """
    return _read_and_check(Path(path), series)[0]


def load_scan(path: str | os.PathLike, series: str = "") -> Scan:
    """Read a chest CT in HU, in its stored orientation, with its facts for the report. Raises ScanError."""
    image, told, warnings = _read_and_check(Path(path), series)
    image = check_hounsfield(image, path, warnings)
    facts = {
        **dict.fromkeys(FACTS, ""),
        **told,
        "spacing": " x ".join(f"{length:.4g}" for length in image.GetSpacing()),
        "size": " x ".join(map(str, image.GetSize())),
        "warnings": "; ".join(warnings),
    }
    return Scan(image, facts)


def add_warnings(facts: dict[str, str], more: list[str]) -> dict[str, str]:
    """Return a copy of a scan's ``facts`` with additional warnings."""
    return {**facts, "warnings": "; ".join(filter(None, [facts["warnings"], *more]))}


def read_scan(path: str | os.PathLike, series: str = "") -> sitk.Image:
    """Read a chest CT in HU, in its stored orientation; see read_image for the arguments. Raises ScanError."""
    return load_scan(path, series).image


def read_mask(path: str | os.PathLike) -> sitk.Image:
    """Read a label volume as uint8. Raises ScanError."""
    image = read_image(path)
    labels = sitk.GetArrayViewFromImage(image)
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        off = float(np.nanmax(np.abs(labels - whole), initial=0.0))
        if not np.isfinite(labels).all() or off > FRACTION:
            raise ScanError(
                f"{path} has labels up to {off:.2f} away from a whole number, so it was interpolated or rescaled; "
                "resample the original mask with nearest neighbour"
            )
        rounded = sitk.GetImageFromArray(whole)
        rounded.CopyInformation(image)
        image, labels = rounded, whole
    if labels.min() < 0 or labels.max() > 255:
        raise ScanError(f"{path} has values from {labels.min()} to {labels.max()}, but mask labels must be 0 to 255")
    return sitk.Cast(image, sitk.sitkUInt8)


def limit_threads(threads: int) -> None:
    """Set the number of threads of ITK filters in this process.

    This function also turns off the long warnings that ITK filters print, but not the collection of warnings from file
    readers.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, threads))
