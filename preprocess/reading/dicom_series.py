"""Group the slices of a folder into volumes, by series UID and, if one UID mixes volumes, by further elements."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from preprocess.reading import ScanError
from preprocess.reading.dicom_files import ENHANCED, is_secondary_capture, read_numbers, read_text
from preprocess.reading.itk import PLACE
from preprocess.reading.values import MIN_EXTENT

# DICOM element -> its name in messages.
# Slices at the same position belong to different volumes if they differ in an element that MIXED lists.
# Acquisitions that are stacked along z, for example by a step-and-shoot scan, form one volume.
MIXED = {
    "StudyInstanceUID": "study",
    "ConvolutionKernel": "kernel",
    "SeriesNumber": "number",
    "SeriesDescription": "description",
    "TemporalPositionIdentifier": "phase",
    "TemporalPositionIndex": "phase",
    "NominalPercentageOfCardiacPhase": "phase",
    "AcquisitionNumber": "acquisition",
    "StackID": "stack",
    "ImageType": "image type",
    "ContrastBolusAgent": "contrast",
    "KVP": "kVp",
    "SliceThickness": "thickness",
    "Plane": "plane",
    "Matrix": "matrix",
}
MOST_LISTED = 8
# These DICOM elements may change within one volume, so they split a series only if every part is evenly spaced.
LOOSE = ("AcquisitionNumber", "ImageType", "ContrastBolusAgent", "KVP", "SliceThickness")
NONE = "none"  # stands for a missing DICOM element in messages and in the input table


@dataclass
class Frame:
    """One slice: a file, or a frame of a multi-frame file."""

    path: Path
    index: int  # frame number in the file, from 0
    header: Dataset  # header of the file
    position: np.ndarray | None  # centre of the first voxel, LPS in mm
    orientation: np.ndarray | None  # direction of the rows, then of the columns
    spacing: np.ndarray | None  # mm between rows, then between columns
    shape: tuple[int, int]  # rows, columns
    traits: dict[str, str] = field(default_factory=dict)  # values of the DICOM elements that MIXED lists

    @property
    def name(self) -> str:
        """Return the name of the slice for messages."""
        many = read_text(self.header, "NumberOfFrames") not in ("", "1")
        return f"{self.path.name}, frame {self.index + 1}" if many else self.path.name

    @property
    def normal(self) -> np.ndarray | None:
        """Return the normal of the slice, or None if the slice has no orientation."""
        return None if self.orientation is None else np.cross(self.orientation[:3], self.orientation[3:])


def read_frames(path: Path, header: Dataset) -> list[Frame]:
    """Return the slices of a DICOM file. Raises ScanError for values that are not numbers."""
    shape = tuple(int(read_text(header, name) or 0) for name in ("Rows", "Columns"))
    count = int(read_text(header, "NumberOfFrames") or 1)
    if read_text(header, "SOPClassUID") in ENHANCED or "PerFrameFunctionalGroupsSequence" in header:
        own = header.get("PerFrameFunctionalGroupsSequence") or []
        shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        if len(own) != count:
            raise ScanError(f"{path} has {count} frames, but positions for {len(own)} frames; export the series again")
        groups = [(frame, shared) for frame in own]
    else:
        groups = [(header,)] * count

    def find_sequence_item(group: tuple[Dataset, ...], sequence: str) -> Dataset:
        """Return the first item of a frame's sequence, or of the sequence shared by all frames, or else the header."""
        return next((item[sequence][0] for item in group if item.get(sequence)), header)

    frames = []
    for index, group in enumerate(groups):
        place, turn = (
            find_sequence_item(group, "PlanePositionSequence"),
            find_sequence_item(group, "PlaneOrientationSequence"),
        )
        measures = find_sequence_item(group, "PixelMeasuresSequence")
        where = {
            "ConvolutionKernel": find_sequence_item(group, "CTReconstructionSequence"),
            "StackID": find_sequence_item(group, "FrameContentSequence"),
            "TemporalPositionIndex": find_sequence_item(group, "FrameContentSequence"),
            "SliceThickness": measures,
        }
        traits = {name: read_text(where.get(name, header), name) for name in MIXED}
        traits |= {name: normalize_number(traits[name]) for name in ("KVP", "SliceThickness")}
        traits["ImageType"] = (
            read_text(find_sequence_item(group, "CTImageFrameTypeSequence"), "FrameType") or traits["ImageType"]
        )
        traits["Matrix"] = "{} x {}".format(*shape)
        frame = Frame(
            path,
            index,
            header,
            read_numbers(place, "ImagePositionPatient", 3, path),
            read_numbers(turn, "ImageOrientationPatient", 6, path),
            read_numbers(measures, "PixelSpacing", 2, path),
            shape,
            traits,
        )
        if frame.normal is not None:
            traits["Plane"] = ("sagittal", "coronal", "axial")[int(np.abs(frame.normal).argmax())]
        frames.append(frame)
    return frames


def normalize_number(value: str) -> str:
    """Return a number in its shortest form, so that 120.0 equals 120; return other text unchanged."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


@dataclass
class Candidate:
    """A group of slices that may form one volume."""

    frames: list[Frame]
    apart: list[str] = field(default_factory=list)  # names of the DICOM elements by which the series was split

    def get_element_text(self, name: str) -> str:
        """Return the first slice's value of an element in MIXED; ``""`` for a missing element."""
        return self.frames[0].traits.get(name, "")

    @property
    def uid(self) -> str:
        """Return the SeriesInstanceUID."""
        return read_text(self.frames[0].header, "SeriesInstanceUID")

    @cached_property
    def slice_stack_length(self) -> float:
        """Return the length of the slice stack in mm, or 0 if a position is missing."""
        return float(np.ptp(compute_slice_positions(self.frames))) if have_positions(self.frames) else 0.0

    @property
    def selectable_names(self) -> list[str]:
        """Return the names by which the input table can select this group of slices."""
        own = [
            self.uid,
            self.get_element_text("SeriesNumber"),
            self.get_element_text("SeriesDescription"),
            self.get_element_text("ConvolutionKernel"),
        ]
        for name in self.apart:
            own += [self.get_element_text(name), f"{MIXED[name]} {self.get_element_text(name) or NONE}"]
        return [name.strip().lower() for name in own if name]

    def matches_name(self, series: str) -> bool:
        """Return whether ``series`` is a name of this group of slices, or several names separated by semicolons."""
        return (
            all(part.strip().lower() in self.selectable_names for part in series.split(";"))
            or series.lower() in self.selectable_names
        )

    def __str__(self) -> str:
        parts = []
        if number := self.get_element_text("SeriesNumber"):
            parts.append(f"number {number}")
        parts.append(self.get_element_text("SeriesDescription") or "no description")
        if kernel := self.get_element_text("ConvolutionKernel"):
            parts.append(f"kernel {kernel}")
        shown = ("SeriesNumber", "SeriesDescription", "ConvolutionKernel")
        parts += [f"{MIXED[name]} {self.get_element_text(name) or NONE}" for name in self.apart if name not in shown]
        parts.append(f"{len(self.frames)} slices")
        if len(self.frames) > 1 and self.slice_stack_length:
            parts.append(f"{self.slice_stack_length / (len(self.frames) - 1):.2f} mm apart")
        return ", ".join(parts)


def have_positions(frames: list[Frame]) -> bool:
    """Return whether every slice has a position and an orientation."""
    return all(frame.position is not None and frame.normal is not None for frame in frames)


def compute_slice_positions(frames: list[Frame]) -> np.ndarray:
    """Return the positions of the slices along the normal of the first slice, in mm."""
    return np.array([frame.position @ frames[0].normal for frame in frames])


def do_slice_groups_overlap(groups: list[list[Frame]]) -> bool:
    """Return whether two groups of two or more slices overlap by more than half of the shorter group's length."""
    normal = groups[0][0].normal
    for first, second in combinations([group for group in groups if len(group) > 1], 2):
        if abs(first[0].normal @ second[0].normal) < 0.9:
            return True  # the orientations differ, for example axial and coronal
        low, high = zip(*((min(at), max(at)) for at in ([f.position @ normal for f in g] for g in (first, second))))
        shorter = min(high[0] - low[0], high[1] - low[1])
        if min(high) - max(low) > 0.5 * shorter:
            return True
    return False


def are_slices_evenly_spaced_per_group(slice_groups: list[list[Frame]]) -> bool:
    """Return whether the slices within every group are evenly spaced."""
    heights = [np.sort([frame.position @ part[0].normal for frame in part]) for part in slice_groups]
    return all(np.ptp(np.diff(height)) < 2 * PLACE for height in heights if len(height) > 2)


def split_mixed_series(candidate: Candidate) -> list[Candidate]:
    """Split slices of overlapping volumes by the first DICOM element in MIXED that separates the volumes."""
    if not have_positions(candidate.frames):
        return [candidate]
    for name in MIXED:
        groups: dict[str, list[Frame]] = {}
        for frame in candidate.frames:
            groups.setdefault(frame.traits.get(name, ""), []).append(frame)
        parts = list(groups.values())
        if (
            len(groups) > 1
            and do_slice_groups_overlap(parts)
            and (name not in LOOSE or are_slices_evenly_spaced_per_group(parts))
        ):
            found = [Candidate(frames, [*candidate.apart, name]) for frames in parts]
            return [part for whole in found for part in split_mixed_series(whole)]
    return [candidate]


def group_slices(slices: list[tuple[Path, Dataset]]) -> list[Candidate]:
    """Group CT slices into candidates for a volume. Raises ScanError for values that are not numbers."""
    series: dict[tuple, list[Frame]] = {}
    for path, header in slices:
        frames = read_frames(path, header)
        whole = path.name if len(frames) > 1 else ""  # a multi-frame file is always a separate volume
        series.setdefault((read_text(header, "SeriesInstanceUID"), whole), []).extend(frames)
    return [part for frames in series.values() for part in split_mixed_series(Candidate(frames))]


def choose_series(found: list[Candidate], series: str, folder: Path, others: Counter) -> Candidate:
    """Choose the one DICOM series to read.

    Args:
        found: the candidate volumes, at least one.
        series: the series named in the input table; ``""`` if the table names no series.
        folder: the folder, for error messages.
        others: numbers of files left out, by reason; this function adds the slices of the other candidates.

    Raises:
        ScanError: several candidates match, or no candidate matches ``series``. The error lists the available series.
    """
    advice = (
        "select one in a column `series` of the table by its number, description, kernel or UID, or by several "
        "of these separated by ;"
    )
    if series:
        called = [one for one in found if one.matches_name(series)]
        if not called:
            raise ScanError(f"{folder.name} has no CT series called {series!r}; it has {list_series(found)}")
        if len(called) > 1:
            raise ScanError(
                f"{folder.name} has {len(called)} CT series called {series!r}; {advice}: {list_series(called)}"
            )
        return called[0]
    kept = found
    for of_a_chest in (  # ignore a condition that no candidate meets
        lambda one: not is_secondary_capture(one.frames[0].header),
        lambda one: one.slice_stack_length >= MIN_EXTENT,
    ):
        kept = [one for one in kept if of_a_chest(one)] or kept
    if len(kept) > 2 and all(len(one.frames) == 1 for one in kept):
        raise ScanError(
            f"{folder} has {len(kept)} series of one slice each, probably because anonymisation gave every slice its "
            "own SeriesInstanceUID; anonymise the scan again, with one new UID per series"
        )
    if len(kept) > 1:
        raise ScanError(f"{folder.name} has {describe_candidates(kept)}; {advice}: {list_series(kept)}")
    for one in found:
        if one is not kept[0]:
            others["secondary capture" if is_secondary_capture(one.frames[0].header) else "CT of a few slices"] += len(
                one.frames
            )
    return kept[0]


def describe_candidates(kept: list[Candidate]) -> str:
    """Describe several candidates for an error message: several series, or one series in which volumes are mixed."""
    if len({one.uid for one in kept}) > 1:
        return f"{len(kept)} CT series"
    names = {name: [one.get_element_text(name) or NONE for one in kept] for name in kept[0].apart}
    told = "; ".join(f"{MIXED[name]} {', '.join(dict.fromkeys(values))}" for name, values in names.items())
    return f"one CT series in which {len(kept)} volumes are mixed ({told or 'one per file'})"


def list_series(found: list[Candidate]) -> str:
    """List the series, sorted by their descriptions; a UID is added where descriptions are identical."""
    lines = [str(one) for one in found]
    lines = sorted(f"{line}, UID {one.uid}" if lines.count(line) > 1 else line for line, one in zip(lines, found))
    more = f"; and {len(lines) - MOST_LISTED} more" if len(lines) > MOST_LISTED else ""
    return "; ".join(f"({number}) {line}" for number, line in enumerate(lines[:MOST_LISTED], start=1)) + more
