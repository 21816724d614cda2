"""Read a folder of DICOM slices, or a multi-frame file, as one volume in HU.

pydicom reads the headers, which determine the slices of the volume, their order and their positions. ITK (GDCM) decodes
only the pixels, in any transfer syntax. ITK's interpretation of the headers is not used, because it differs between
versions of ITK.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.reading import ScanError
from preprocess.reading.dicom_files import (
    Damaged,
    find_exclusion_reason,
    find_slice_folders,
    read_header,
    read_headers,
    read_numbers,
    read_text,
)
from preprocess.reading.dicom_geometry import sort_slices
from preprocess.reading.dicom_series import Candidate, Frame, choose_series, group_slices
from preprocess.reading.itk import catch_itk_errors
from preprocess.reading.values import fill_padding

# Drop ITK's warnings that match this pattern, because this package checks the header of every slice more strictly.
CHECKED = re.compile(r"[Nn]on.?uniform|missing slices|SpacingBetweenSlices|[Nn]on.?orthogonal|spacing", re.IGNORECASE)


def read_dicom(path: Path, series: str, warnings: list[str]) -> tuple[sitk.Image, dict[str, str]]:
    """Read one CT volume.

    Args:
        path: a folder, or a DICOM file.
        series: the series to read if the folder has several.
        warnings: list to which warnings for the report are appended.

    Returns:
        The image, and the report's columns about the series.

    Raises:
        ScanError: no series or several series match, a slice is damaged, or the slices do not form one volume.
    """
    if path.is_dir():
        slices, others, damaged = read_headers(path)
        if not slices and not damaged:
            raise ScanError(explain_no_slices(path, others))
    else:
        slices, others, damaged = [read_multiframe_header(path)], Counter(), []
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ScanError(
            f"{path}: copy the folder again, because these DICOM slices are cut short or damaged: {damaged[0]}{more}"
        )
    chosen = choose_series(group_slices(slices), series, path, others)
    frames, place = sort_slices(chosen.frames, path)
    values = read_voxels_in_hu(frames, path, warnings)
    image = sitk.GetImageFromArray(values)
    image.SetOrigin(place.origin)
    image.SetSpacing(place.spacing)
    image.SetDirection(place.direction)
    return image, describe_series(chosen, others)


def describe_series(chosen: Candidate, others: Counter) -> dict[str, str]:
    """Return the report's columns about a series."""
    parts = (chosen.get_element_text("SeriesNumber"), chosen.get_element_text("SeriesDescription"))
    return {
        "series": " ".join(part for part in parts if part) or chosen.uid,
        "series_uid": chosen.uid,
        "kernel": chosen.get_element_text("ConvolutionKernel"),
        "left_out": ", ".join(f"{count} {what}" for what, count in sorted(others.items())),
    }


VOLUMES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


def explain_no_slices(folder: Path, others: Counter) -> str:
    """Return the message for a folder without CT slices, with advice on which path to use."""
    if others:
        return f"{folder} has no CT slices, only " + ", ".join(f"{count} {what}" for what, count in others.items())
    below = find_slice_folders(folder)
    if not below:
        images = [path.name for path in sorted(folder.iterdir()) if path.name.lower().endswith(VOLUMES)]
        if images:
            return f"{folder} has {len(images)} image files and no DICOM slices; name one file, for example {images[0]}"
        return f"{folder} and its subfolders have no DICOM slices; name another folder or file"
    name = below[0] if len(below) == 1 else ", ".join(below[:5]) + (", ..." if len(below) > 5 else "")
    words = "is a folder without DICOM slices; subfolders are not searched, so give the folder that contains the slices"
    return f"{folder} {words} ({name}?)"


def read_multiframe_header(path: Path) -> tuple[Path, object]:
    """Return the path and header of a multi-frame file. Raises ScanError with advice if the file is not multi-frame."""
    try:
        header = read_header(path)
    except Damaged:
        raise ScanError(f"{path} is DICOM, but cut short or damaged; copy it again") from None
    if header is None:
        below = find_slice_folders(path.parent)
        where = f", for example {path.parent / below[0]}" if below else ""
        raise ScanError(
            f"{path} is a DICOMDIR, which is only a list of files; give the folder that contains the slices{where}"
        )
    if reason := find_exclusion_reason(header):
        raise ScanError(f"{path} is DICOM, but not a CT slice: {reason}")
    if read_text(header, "NumberOfFrames") in ("", "1"):
        raise ScanError(f"{path} is one slice of a series; give its folder, {path.parent}")
    return path, header


# ------------------------------------------------------------ pixels


def read_voxels_in_hu(frames: list[Frame], folder: Path, warnings: list[str]) -> np.ndarray:
    """Return the voxels (slices, rows, columns) in HU, with padding set to air."""
    lut = next((frame.name for frame in frames if "ModalityLUTSequence" in frame.header), None)
    if lut:
        raise ScanError(
            f"{folder}: slice {lut} maps values to HU by a lookup table (ModalityLUTSequence), which cannot be read; "
            "export the series with a rescale slope and intercept"
        )
    inverted = next((f.name for f in frames if read_text(f.header, "PhotometricInterpretation") == "MONOCHROME1"), None)
    if inverted:  # GDCM would invert the stored values, which are already HU
        raise ScanError(
            f"{folder}: {inverted} is MONOCHROME1 (inverted grey), which cannot be read; export it as MONOCHROME2"
        )
    told: list[str] = []
    many = read_text(frames[0].header, "NumberOfFrames") not in ("", "1")
    values = (
        read_voxels_from_multiframe_file(frames, told) if many else read_voxels_from_slice_files(frames, folder, told)
    )
    warnings += [warning for warning in told if not CHECKED.search(warning)]
    paddings = {index: read_padding_ranges(frame) for index, frame in enumerate(frames)}
    for padding in sorted({found for found in paddings.values() if found}):
        where = [index for index, found in paddings.items() if found == padding]
        values = fill_padding(values, padding, slice(None) if len(where) == len(frames) else where, warnings)
    return values


def read_rescale(frame: Frame) -> tuple[float, float]:
    """Return the slope and intercept that convert stored values to HU."""
    groups = (frame.header.get("PerFrameFunctionalGroupsSequence"), frame.header.get("SharedFunctionalGroupsSequence"))
    items = [group[frame.index if number == 0 else 0] for number, group in enumerate(groups) if group]
    found = [item.PixelValueTransformationSequence[0] for item in items if item.get("PixelValueTransformationSequence")]
    slope, intercept = (
        read_numbers((found or [frame.header])[0], name, 1, frame.path) for name in ("RescaleSlope", "RescaleIntercept")
    )
    return (1.0 if slope is None else float(slope[0])), (0.0 if intercept is None else float(intercept[0]))


def read_voxels_from_slice_files(frames: list[Frame], folder: Path, warnings: list[str]) -> np.ndarray:
    """Return the voxels (slices, rows, columns) of a series with one file per slice, in the order of ``frames``."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(frame.path) for frame in frames])
    names = ("BitsAllocated", "BitsStored", "PixelRepresentation")
    kinds = {(read_rescale(frame), *(read_text(frame.header, name) for name in names)) for frame in frames}
    if len(kinds) > 1:  # ITK would use the first slice's pixel type for all slices and clip their values
        reader.SetOutputPixelType(sitk.sitkFloat32)
    intercepts = [read_rescale(frame)[1] for frame in frames]
    other = next((frame for frame, value in zip(frames, intercepts) if value != intercepts[0]), None)
    if other:
        warnings.append(f"the rescale intercept differs between slices, first at {other.name}; check the picture")
    with catch_itk_errors(folder, "a DICOM series", warnings):
        image = reader.Execute()
    return sitk.GetArrayFromImage(image)


def read_voxels_from_multiframe_file(frames: list[Frame], warnings: list[str]) -> np.ndarray:
    """Return the voxels (slices, rows, columns) of a multi-frame file, in the order of ``frames``."""
    path = frames[0].path
    scales = {read_rescale(frame) for frame in frames}
    if len(scales) > 1:  # ITK applies one slope and intercept to all frames
        raise ScanError(f"{path}: its frames differ in rescale slope or intercept; export it as one file per slice")
    with catch_itk_errors(path, "a multi-frame DICOM file", warnings):
        image = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(image)
    count = int(read_text(frames[0].header, "NumberOfFrames"))
    if values.shape != (count, *frames[0].shape):
        raise ScanError(
            f"{path} has {count} frames, but ITK reads an array of shape {values.shape}; "
            "export it as one file per slice"
        )
    return values[[frame.index for frame in frames]]


def read_padding_ranges(frame: Frame) -> tuple[tuple[float, float], ...]:
    """Return the possible HU ranges (lowest, highest) of a slice's padding; empty if the slice declares no padding.

    A slice can have several padding ranges, because the padding element and the pixels may differ in signedness, and
    ITK drops the bits above BitsStored.
    """
    first = read_numbers(frame.header, "PixelPaddingValue", 1, frame.path)
    if first is None:
        return ()
    last = read_numbers(frame.header, "PixelPaddingRangeLimit", 1, frame.path)
    ends = [int(first[0]), int((first if last is None else last)[0])]
    slope, intercept = read_rescale(frame)
    found = []
    for bits in {int(read_text(frame.header, "BitsAllocated") or 16), int(read_text(frame.header, "BitsStored") or 16)}:
        read = [end % (1 << bits) for end in ends]
        if read_text(frame.header, "PixelRepresentation") == "1":
            read = [end - (1 << bits) if end >= 1 << (bits - 1) else end for end in read]
        if abs(read[1] - read[0]) == abs(ends[1] - ends[0]):  # ignore a range that wraps around at the highest bit
            found += [tuple(sorted(slope * end + intercept for end in read))]
    return tuple(sorted(set(found)))
