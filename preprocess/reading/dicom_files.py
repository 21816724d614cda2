"""Read the headers of a folder's DICOM files, classify each file, and check that it is complete."""

import contextlib
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID

from preprocess.reading import ScanError
from preprocess.reading.formats import is_dicom

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")  # Enhanced CT, Legacy Converted Enhanced CT
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture: a screenshot, or slices to which a converter gave this class
DIRECTORY = "1.2.840.10008.1.3.10"
# Values of ImageType (0008,0008) of files that are not slices of a volume. MIP and MinIP are projections.
NO_SLICE = re.compile(
    r"LOCALI[SZ]ER|SCOUT|TOPOGRAM|SURVIEW|CT_SOM\d (TOP|PROT)|SCREEN ?(SAVE|SHOT)|DOSE.*|REPORT|PROTOCOL|M(AX|IN)?_?IP"
    r"|PROJECTION( IMAGE)?|BOLUS ?TRACK.*|MONITOR.*"
)
# Matches the RescaleType of maps that are not in HU, such as maps of iodine or atomic number, but not US (unspecified).
NO_HU = re.compile(r"(?!HU|US|H U|$).*", re.IGNORECASE)
TAGS = """
    SOPClassUID SOPInstanceUID Modality ImageType StudyInstanceUID SeriesInstanceUID SeriesNumber SeriesDescription
    ProtocolName ConvolutionKernel AcquisitionNumber TemporalPositionIdentifier TemporalPositionIndex ContrastBolusAgent
    NominalPercentageOfCardiacPhase SliceThickness KVP InstanceNumber GantryDetectorTilt NumberOfFrames SamplesPerPixel
    PhotometricInterpretation
    Rows Columns BitsAllocated BitsStored PixelRepresentation ImagePositionPatient ImageOrientationPatient PixelSpacing
    RescaleSlope RescaleIntercept RescaleType ModalityLUTSequence PixelPaddingValue PixelPaddingRangeLimit
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
""".split()  # noqa: SIM905


class Damaged(Exception):
    """Raised for a file that should be a slice but is incomplete or damaged."""


def read_text(dataset: Dataset, name: str) -> str:
    """Return an element as text, with backslashes between multiple values; ``""`` for a missing element."""
    try:
        value = dataset.get(name)
    except Exception:  # pydicom converts on access and fails on some values that scanners write
        return ""
    if value is None:
        return ""
    many = not isinstance(value, str) and hasattr(value, "__iter__")
    return "\\".join(map(str, value)) if many else str(value).strip()


def read_numbers(dataset: Dataset, name: str, count: int, file: Path) -> np.ndarray | None:
    """Return ``count`` numbers of an element, or None if the element is missing or empty.

    Raises ScanError if the element does not consist of ``count`` finite numbers.
    """
    if name not in dataset:
        return None
    try:
        value = dataset.get(name)
        if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
            return None
        found = np.array(value, dtype=float).reshape(count)
    except Exception:  # pydicom fails on some values that scanners write
        found = np.full(count, np.nan)
    if not np.isfinite(found).all():
        raise ScanError(
            f"{file}: {name} must hold {count} number{'s' * (count > 1)}; export the file again from the original scan"
        )
    return found


def find_exclusion_reason(dataset: Dataset) -> str:
    """Return why a file is not a slice of a CT volume, in a word or two; ``""`` if the file may be a slice."""
    kind, modality = read_text(dataset, "SOPClassUID"), read_text(dataset, "Modality")
    if modality != "CT" and (modality or not kind.startswith(CT)):
        return modality or UID(kind).name
    if kind not in ("", CT, *ENHANCED) and not kind.startswith(CAPTURE):
        return UID(kind).name
    for value in read_text(dataset, "ImageType").upper().split("\\"):
        if NO_SLICE.fullmatch(value.strip()):
            return value.strip().lower()
    if read_text(dataset, "SamplesPerPixel") not in ("", "1"):
        return "colour picture"
    unit = read_text(dataset, "RescaleType")
    return f"map in {unit}" if NO_HU.fullmatch(unit) else ""


def is_secondary_capture(dataset: Dataset) -> bool:
    """Return whether a file has the SOP class of screenshots, which some converters also assign to slices."""
    return read_text(dataset, "SOPClassUID").startswith(CAPTURE)


def read_header(path: Path) -> Dataset | None:
    """Read the elements in ``TAGS`` from a DICOM file, or return None if the file is not DICOM or is a DICOMDIR.

    Raises:
        Damaged: the file should be a slice, but is cut short or has no pixels.
    """
    with open(path, "rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns about values that are not used here
        if not is_dicom(stream.read(132)):
            if path.suffix.lower() == ".dcm":
                raise Damaged
            return None
        stream.seek(0)
        try:
            dataset = dcmread(stream, stop_before_pixels=True, force=True, specific_tags=TAGS)
            for part in (dataset, dataset.file_meta):
                list(part)  # pydicom decodes a value only when it is accessed
        except Exception as error:  # any failure of pydicom here means that the header is damaged
            raise Damaged from error
        if (
            read_text(dataset, "SOPClassUID") == DIRECTORY
            or read_text(dataset.file_meta, "MediaStorageSOPClassUID") == DIRECTORY
        ):
            return None
        if "SOPClassUID" not in dataset and "MediaStorageSOPClassUID" in dataset.file_meta:
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
        unknown = not read_text(dataset, "Modality") and (is_secondary_capture(dataset) or "SOPClassUID" not in dataset)
        try:
            whole = not (unknown or not find_exclusion_reason(dataset)) or _has_pixels(stream, dataset)
        except (ValueError, TypeError, OverflowError, struct.error) as error:  # a size in the header is not a number
            raise Damaged from error
        if not whole:
            raise Damaged
    return dataset


def _has_pixels(stream: BinaryIO, dataset: Dataset) -> bool:
    """Return whether a file contains all its pixels. ``stream`` is positioned at the pixel data."""
    syntax = UID(read_text(dataset.file_meta, "TransferSyntaxUID") or "1.2.840.10008.1.2")
    if syntax.is_deflated:  # pydicom has already unpacked the whole file, which fails if the file is truncated
        return True
    order = "<" if syntax.is_little_endian else ">"
    head = stream.read(8)
    if len(head) < 8:
        return False
    if syntax.is_implicit_VR:
        length = struct.unpack(f"{order}I", head[4:])[0]
    else:
        word = stream.read(4)
        length = struct.unpack(f"{order}I", word)[0] if len(word) == 4 else 0
    if length == 0xFFFFFFFF:
        return has_all_fragments(stream)
    sizes = [int(read_text(dataset, name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")]
    needed = int(np.prod(sizes, dtype=np.int64)) * int(read_text(dataset, "BitsAllocated") or 16) // 8
    start = stream.tell()
    return min(length, stream.seek(0, 2) - start) >= needed


def has_all_fragments(stream: BinaryIO) -> bool:
    """Return whether compressed pixels, stored in fragments, end with the end marker."""
    start = stream.tell()
    size = stream.seek(0, 2)
    while start + 8 <= size:
        stream.seek(start)
        group, element, length = struct.unpack("<HHI", stream.read(8))
        if (group, element) == (0xFFFE, 0xE0DD):
            return True
        if (group, element) != (0xFFFE, 0xE000):
            return False
        start += 8 + length
    return False


@contextlib.contextmanager
def catch_read_errors(path: Path) -> Iterator[None]:
    """Turn a system error about a file or folder, for example a missing permission, into a ScanError."""
    try:
        yield
    except OSError as error:
        raise ScanError(f"{path} cannot be read: {error.strerror or error}") from error


def read_headers(folder: Path) -> tuple[list[tuple[Path, Dataset]], Counter, list[str]]:
    """Read the headers of the DICOM files in a folder.

    Returns:
        The CT slices, sorted by file name; the number of files left out, by reason; the names of damaged files.
    """
    slices, others, damaged = [], Counter(), []
    with catch_read_errors(folder):
        for path in sorted(folder.iterdir()):
            if not path.is_file() or path.name.startswith(".") or path.name.upper() == "DICOMDIR":
                continue
            try:
                dataset = read_header(path)
            except Damaged:
                damaged.append(path.name)
                continue
            if dataset is None:
                continue
            if reason := find_exclusion_reason(dataset):
                others[reason] += 1
            else:
                slices.append((path, dataset))
    return slices, others, damaged


def find_slice_folders(folder: Path, most: int = 6) -> list[str]:
    """Return up to ``most`` subfolders that contain DICOM files, as paths relative to ``folder``."""
    found = []
    with catch_read_errors(folder):
        for below in sorted(path for path in folder.rglob("*") if path.is_dir()):
            if _has_dicom(below):
                found.append(below.relative_to(folder).as_posix())
                if len(found) == most:
                    break
    return found


def _has_dicom(folder: Path) -> bool:
    """Return whether a folder itself, not a subfolder, contains a DICOM file."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name.upper() != "DICOMDIR":
            with open(path, "rb") as stream:
                if is_dicom(stream.read(132)):
                    return True
    return False
