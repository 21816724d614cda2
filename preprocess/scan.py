"""Chest CT scans: read and checked. SimpleITK throughout, so axes are (x, y, z).

Every image is in Hounsfield units (HU) and millimetres, and keeps its physical coordinates
(LPS: x to the patient's left, y to the back, z to the head) through each step. This is the door;
``reading/`` has a module for each kind of file.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from misc.files import is_utf8
from preprocess.reading import EarlierFailure, ScanError, nifti
from preprocess.reading.claims import check_claim, check_frame
from preprocess.reading.dicom import read_dicom
from preprocess.reading.formats import check_name, check_stranger, head_of, kind_of
from preprocess.reading.itk import affine_of, check_right_angles, itk_reading
from preprocess.reading.values import AIR, check_extent, check_hounsfield

__all__ = [
    "AIR",
    "FACTS",
    "EarlierFailure",
    "Scan",
    "ScanError",
    "check_extent",
    "check_hounsfield",
    "limit_threads",
    "load_scan",
    "read_image",
    "read_mask",
    "read_scan",
    "with_warnings",
]

FACTS = ("series", "series_uid", "kernel", "spacing", "size", "left_out", "warnings")  # columns of a report
FRACTION = 0.01  # that a label may be off a whole number, as rescaled values are
VOXEL = (0.05, 20.0)  # mm; a scan's voxels are 0.3 to 10 mm long


class Scan(NamedTuple):
    """A chest CT, and what the report tells of it."""

    image: sitk.Image  # HU
    facts: dict[str, str]  # by FACTS


def _read(path: Path, series: str, warnings: list[str]) -> tuple[sitk.Image, dict[str, str]]:
    """An image of any format, and what its file tells of the series."""
    if not is_utf8(path):
        raise ScanError(f"{str(path)!a} has a name that is not UTF-8, which ITK cannot open; rename it")
    if not path.exists():
        raise ScanError(f"{path} does not exist")
    if path.is_dir():
        return read_dicom(path, series, warnings)
    head, packed = head_of(nifti.header_file(path))
    kind = kind_of(head)
    if kind == "DICOM":
        if packed:
            raise ScanError(f"{path} is DICOM packed with gzip, which is not read; unpack it with gunzip")
        return read_dicom(path, series, warnings)
    if not kind:
        check_stranger(path, head, packed)
    check_name(path, kind, packed)
    header = nifti.read_header(nifti.header_file(path)) if kind == "NIfTI" else None
    if header:
        nifti.check_forms(path, header, warnings)
        nifti.check_sizes(path, header)
        nifti.check_whole(path, header)
    elif kind:
        check_claim(path, kind)
        check_frame(path, kind, warnings)
    told: list[str] = []
    with itk_reading(path, "an image", told), nifti.alone(path) as only:
        image = sitk.ReadImage(str(only))
    warnings += told
    image = _one_volume(image, path)
    if header:
        nifti.check_placed(path, header, affine_of(image))
    return image, {}


def _one_volume(image: sitk.Image, path: Path) -> sitk.Image:
    """Raise ScanError unless an image is one 3-D volume of scalars; further axes of length 1 are dropped."""
    while image.GetDimension() > 3 and image.GetSize()[-1] == 1:
        image = sitk.Extract(image, [*image.GetSize()[:-1], 0])
    if image.GetDimension() != 3:
        raise ScanError(
            f"{path} has {image.GetDimension()} dimensions, size {image.GetSize()}; a scan is one 3-D volume"
        )
    if "complex" in image.GetPixelIDTypeAsString():
        raise ScanError(f"{path} has complex values; a CT has HU")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{path} has {image.GetNumberOfComponentsPerPixel()} values per voxel; a CT has one")
    if min(image.GetSize()) < 2:
        raise ScanError(f"{path} has size {image.GetSize()}; a volume needs at least 2 voxels along each axis")
    return image


def _check_header(image: sitk.Image, path: Path, warnings: list[str]) -> None:
    """What any format's header may have wrong: axes, voxel sizes, or nothing in it at all."""
    check_right_angles(affine_of(image), image.GetSize(), f"{path}: its header")
    sizes = " x ".join(f"{length:g}" for length in image.GetSpacing())
    if not VOXEL[0] <= min(image.GetSpacing()) <= max(image.GetSpacing()) <= VOXEL[1]:
        raise ScanError(f"{path} has voxels of {sizes} mm, which no CT has; its header is not in millimetres")
    plain = all(abs(value) in (0, 1) for value in image.GetDirection())
    if plain and not any(image.GetOrigin()) and set(image.GetSpacing()) == {1.0}:
        warnings.append("the header is that of a bare array (voxels of 1 mm, origin 0), as no scanner writes it: sizes "
                        "and orientation may be wrong")  # fmt: skip


def _load(path: Path, series: str) -> tuple[sitk.Image, dict[str, str], list[str]]:
    warnings: list[str] = []
    image, told = _read(path, series.strip(), warnings)
    _check_header(image, path, warnings)
    return image, told, warnings


def read_image(path: str | os.PathLike, series: str = "") -> sitk.Image:
    """Read a NIfTI, NRRD, MetaImage or other ITK volume, or a folder of DICOM slices.

    Args:
        path: a file, or a folder.
        series: which of a folder's DICOM series: its number, description, kernel or UID.

    Raises:
        ScanError: missing, unreadable, cut short, not one 3-D volume of scalars, or its voxels are not all where
            the volume puts them.
    """
    return _load(Path(path), series)[0]


def load_scan(path: str | os.PathLike, series: str = "") -> Scan:
    """A chest CT in HU, in the orientation it is stored in, with what the report tells of it. Raises ScanError."""
    image, told, warnings = _load(Path(path), series)
    image = check_hounsfield(image, path, warnings)
    facts = {
        **dict.fromkeys(FACTS, ""),
        **told,
        "spacing": " x ".join(f"{length:.4g}" for length in image.GetSpacing()),
        "size": " x ".join(map(str, image.GetSize())),
        "warnings": "; ".join(warnings),
    }
    return Scan(image, facts)


def with_warnings(facts: dict[str, str], more: list[str]) -> dict[str, str]:
    """A scan's facts with further warnings."""
    return {**facts, "warnings": "; ".join(filter(None, [facts["warnings"], *more]))}


def read_scan(path: str | os.PathLike, series: str = "") -> sitk.Image:
    """A chest CT in HU, in the orientation it is stored in; see read_image. Raises ScanError."""
    return load_scan(path, series).image


def read_mask(path: str | os.PathLike) -> sitk.Image:
    """A label volume as uint8. Raises ScanError."""
    image = read_image(path)
    labels = sitk.GetArrayViewFromImage(image)
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        off = float(np.nanmax(np.abs(labels - whole), initial=0.0))
        if not np.isfinite(labels).all() or off > FRACTION:
            raise ScanError(
                f"{path} has labels that are not whole numbers, up to {off:.2f} off: it was interpolated or rescaled; "
                "resample the original mask with nearest neighbour"
            )
        rounded = sitk.GetImageFromArray(whole)
        rounded.CopyInformation(image)
        image, labels = rounded, whole
    if labels.min() < 0 or labels.max() > 255:
        raise ScanError(f"{path} has values from {labels.min()} to {labels.max()}; a mask has small whole labels")
    return sitk.Cast(image, sitk.sitkUInt8)


def limit_threads(threads: int) -> None:
    """Threads of ITK's filters in this process; their warnings, of many lines each, are off. A reader's are kept."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(max(1, threads))
