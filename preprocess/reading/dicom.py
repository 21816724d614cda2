"""A folder of DICOM slices, or a multi-frame file, as one volume in HU.

Headers are read with pydicom and decide everything: which slices, their order, where they lie. ITK (GDCM) reads the
pixels only, in whatever transfer syntax; what it makes of the headers, which has changed between its versions, is not
used.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.reading import ScanError
from preprocess.reading.dicom_files import (
    Damaged,
    folders_with_slices,
    left_out,
    numbers,
    read_header,
    read_headers,
    text,
)
from preprocess.reading.dicom_geometry import place_slices
from preprocess.reading.dicom_series import Candidate, Frame, candidates, choose
from preprocess.reading.itk import itk_reading
from preprocess.reading.values import fill_padding

# ITK's words on what is checked here, slice by slice, and more strictly
CHECKED = re.compile(r"[Nn]on.?uniform|missing slices|SpacingBetweenSlices|[Nn]on.?orthogonal|spacing", re.IGNORECASE)


def read_dicom(path: Path, series: str, warnings: list[str]) -> tuple[sitk.Image, dict[str, str]]:
    """One CT volume.

    Args:
        path: a folder, or a DICOM file.
        series: which, where there are several.
        warnings: what the report should tell; added to.

    Returns:
        The image, and what the report tells of the series.

    Raises:
        ScanError: no series, several, damaged, or not one volume.
    """
    if path.is_dir():
        slices, others, damaged = read_headers(path)
        if not slices and not damaged:
            raise ScanError(_no_slices(path, others))
    else:
        slices, others, damaged = [_one_file(path)], Counter(), []
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ScanError(f"{path}: copy it again, it has DICOM slices that are cut short or damaged: {damaged[0]}{more}")
    chosen = choose(candidates(slices), series, path, others)
    frames, place = place_slices(chosen.frames, path)
    values = _pixels(frames, path, warnings)
    image = sitk.GetImageFromArray(values)
    image.SetOrigin(place.origin)
    image.SetSpacing(place.spacing)
    image.SetDirection(place.direction)
    return image, _told(chosen, others)


def _told(chosen: Candidate, others: Counter) -> dict[str, str]:
    """What the report tells of a series."""
    parts = (chosen.trait("SeriesNumber"), chosen.trait("SeriesDescription"))
    return {
        "series": " ".join(part for part in parts if part) or chosen.uid,
        "series_uid": chosen.uid,
        "kernel": chosen.trait("ConvolutionKernel"),
        "left_out": ", ".join(f"{count} {what}" for what, count in sorted(others.items())),
    }


VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def _no_slices(folder: Path, others: Counter) -> str:
    """Why a folder cannot be read, and what to give."""
    if others:
        return f"{folder} has no CT slices, only " + ", ".join(f"{count} {what}" for what, count in others.items())
    below = folders_with_slices(folder)
    if not below:
        images = [path.name for path in sorted(folder.iterdir()) if path.name.lower().endswith(VOLUMES)]
        if images:
            return f"{folder} has {len(images)} image files and no DICOM slices; name one of them, such as {images[0]}"
        return f"{folder} is a folder without DICOM slices, and no folder in it has any"
    name = below[0] if len(below) == 1 else ", ".join(below[:5]) + (", ..." if len(below) > 5 else "")
    words = "is a folder without DICOM slices; subfolders are not searched, name the one with the slices"
    return f"{folder} {words} ({name}?)"


def _one_file(path: Path) -> tuple[Path, object]:
    """A multi-frame file's header. Raises ScanError for any other DICOM file, with what to give."""
    try:
        header = read_header(path)
    except Damaged:
        raise ScanError(f"{path} is DICOM, but cut short or damaged; copy it again") from None
    if header is None:
        below = folders_with_slices(path.parent)
        where = f", such as {path.parent / below[0]}" if below else ""
        raise ScanError(f"{path} is a DICOMDIR, a list of files; give the folder with the slices{where}")
    if reason := left_out(header):
        raise ScanError(f"{path} is DICOM, but no CT slice: {reason}")
    if text(header, "NumberOfFrames") in ("", "1"):
        raise ScanError(f"{path} is one slice of a series; give its folder, {path.parent}")
    return path, header


# ------------------------------------------------------------ pixels


def _pixels(frames: list[Frame], folder: Path, warnings: list[str]) -> np.ndarray:
    """(slices, rows, columns) in HU, padding as air."""
    lut = next((frame.name for frame in frames if "ModalityLUTSequence" in frame.header), None)
    if lut:
        raise ScanError(f"{folder}: {lut} has its HU in a table (ModalityLUTSequence), which is not read; convert it")
    inverted = next((f.name for f in frames if text(f.header, "PhotometricInterpretation") == "MONOCHROME1"), None)
    if inverted:  # GDCM turns the values over, which are HU as they stand
        raise ScanError(
            f"{folder}: {inverted} is MONOCHROME1, dark where dense, which is not read; export it as MONOCHROME2"
        )
    told: list[str] = []
    many = text(frames[0].header, "NumberOfFrames") not in ("", "1")
    values = _of_one_file(frames, told) if many else _of_files(frames, folder, told)
    warnings += [warning for warning in told if not CHECKED.search(warning)]
    paddings = {index: _padding(frame) for index, frame in enumerate(frames)}
    for padding in sorted({found for found in paddings.values() if found}):
        where = [index for index, found in paddings.items() if found == padding]
        values = fill_padding(values, padding, slice(None) if len(where) == len(frames) else where, warnings)
    return values


def _rescale(frame: Frame) -> tuple[float, float]:
    """Slope and intercept from stored values to HU."""
    groups = (frame.header.get("PerFrameFunctionalGroupsSequence"), frame.header.get("SharedFunctionalGroupsSequence"))
    items = [group[frame.index if number == 0 else 0] for number, group in enumerate(groups) if group]
    found = [item.PixelValueTransformationSequence[0] for item in items if item.get("PixelValueTransformationSequence")]
    slope, intercept = (
        numbers((found or [frame.header])[0], name, 1, frame.path) for name in ("RescaleSlope", "RescaleIntercept")
    )
    return (1.0 if slope is None else float(slope[0])), (0.0 if intercept is None else float(intercept[0]))


def _of_files(frames: list[Frame], folder: Path, told: list[str]) -> np.ndarray:
    """Slices of a file each, in their order."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(frame.path) for frame in frames])
    names = ("BitsAllocated", "BitsStored", "PixelRepresentation")
    kinds = {(_rescale(frame), *(text(frame.header, name) for name in names)) for frame in frames}
    if len(kinds) > 1:  # ITK takes the first slice's type for all, and cuts off what it cannot hold
        reader.SetOutputPixelType(sitk.sitkFloat32)
    intercepts = [_rescale(frame)[1] for frame in frames]
    other = next((frame for frame, value in zip(frames, intercepts) if value != intercepts[0]), None)
    if other:
        told.append(f"the rescale intercept differs from slice to slice, first at {other.name}: look at the picture")
    with itk_reading(folder, "a DICOM series", told):
        image = reader.Execute()
    return sitk.GetArrayFromImage(image)


def _of_one_file(frames: list[Frame], told: list[str]) -> np.ndarray:
    """Frames of a multi-frame file, in their order."""
    path = frames[0].path
    scales = {_rescale(frame) for frame in frames}
    if len(scales) > 1:  # ITK applies one to all
        raise ScanError(f"{path}: its frames differ in rescale slope or intercept; export it as one file a slice")
    with itk_reading(path, "a multi-frame DICOM file", told):
        image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image)
    count = int(text(frames[0].header, "NumberOfFrames"))
    if values.shape != (count, *frames[0].shape):
        raise ScanError(f"{path} has {count} frames, of which ITK reads {values.shape}; export it as one file a slice")
    return values[[frame.index for frame in frames]]


def _padding(frame: Frame) -> tuple[tuple[float, float], ...]:
    """HU that a slice's padding may have, lowest and highest, as stored and as ITK reads them; empty without padding.

    The element may be signed where the pixels are not, or the other way round, and ITK drops bits above those stored.
    """
    first = numbers(frame.header, "PixelPaddingValue", 1, frame.path)
    if first is None:
        return ()
    last = numbers(frame.header, "PixelPaddingRangeLimit", 1, frame.path)
    ends = [int(first[0]), int((first if last is None else last)[0])]
    slope, intercept = _rescale(frame)
    found = []
    for bits in {int(text(frame.header, "BitsAllocated") or 16), int(text(frame.header, "BitsStored") or 16)}:
        read = [end % (1 << bits) for end in ends]
        if text(frame.header, "PixelRepresentation") == "1":
            read = [end - (1 << bits) if end >= 1 << (bits - 1) else end for end in read]
        if abs(read[1] - read[0]) == abs(ends[1] - ends[0]):  # else the range is torn at the end of the bits
            found += [tuple(sorted(slope * end + intercept for end in read))]
    return tuple(sorted(set(found)))
