"""Which slices of a folder make one volume: series, and what is mixed under the UID of one."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from preprocess.reading import ScanError
from preprocess.reading.dicom_files import ENHANCED, is_capture, numbers, text
from preprocess.reading.itk import PLACE
from preprocess.reading.values import MIN_EXTENT

# What tells volumes under one SeriesInstanceUID apart, where slices with different values share a place: element,
# and its name in messages. Stacked acquisitions, as sequential scanners number them, are one volume.
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
# Scanners change these from slice to slice of one volume too: they tell volumes apart only where each is an even stack.
LOOSE = ("AcquisitionNumber", "ImageType", "ContrastBolusAgent", "KVP", "SliceThickness")
NONE = "none"  # for a trait that slices lack, in messages and in the table


@dataclass
class Frame:
    """One slice: a file, or a frame of a multi-frame file."""

    path: Path
    index: int  # of the frame in its file
    header: Dataset  # the file's
    position: np.ndarray | None  # mm, LPS, of the first voxel's centre
    orientation: np.ndarray | None  # of the rows, then of the columns
    spacing: np.ndarray | None  # mm between rows, then between columns
    shape: tuple[int, int]  # rows, columns
    traits: dict[str, str] = field(default_factory=dict)  # by MIXED's names

    @property
    def name(self) -> str:
        """For messages."""
        many = text(self.header, "NumberOfFrames") not in ("", "1")
        return f"{self.path.name}, frame {self.index + 1}" if many else self.path.name

    @property
    def normal(self) -> np.ndarray | None:
        return None if self.orientation is None else np.cross(self.orientation[:3], self.orientation[3:])


def frames_of(path: Path, header: Dataset) -> list[Frame]:
    """A file's slices. Raises ScanError for values that are no numbers."""
    shape = tuple(int(text(header, name) or 0) for name in ("Rows", "Columns"))
    count = int(text(header, "NumberOfFrames") or 1)
    if text(header, "SOPClassUID") in ENHANCED or "PerFrameFunctionalGroupsSequence" in header:
        own = header.get("PerFrameFunctionalGroupsSequence") or []
        shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
        if len(own) != count:
            raise ScanError(f"{path} has {count} frames, and the places of {len(own)}; export the series again")
        groups = [(frame, shared) for frame in own]
    else:
        groups = [(header,)] * count

    def inside(group: tuple[Dataset, ...], sequence: str) -> Dataset:
        """The item that has a value: of the frame, of all frames, or the file itself."""
        return next((item[sequence][0] for item in group if item.get(sequence)), header)

    frames = []
    for index, group in enumerate(groups):
        place, turn = inside(group, "PlanePositionSequence"), inside(group, "PlaneOrientationSequence")
        measures = inside(group, "PixelMeasuresSequence")
        where = {
            "ConvolutionKernel": inside(group, "CTReconstructionSequence"),
            "StackID": inside(group, "FrameContentSequence"),
            "TemporalPositionIndex": inside(group, "FrameContentSequence"),
            "SliceThickness": measures,
        }
        traits = {name: text(where.get(name, header), name) for name in MIXED}
        traits |= {name: _plain(traits[name]) for name in ("KVP", "SliceThickness")}
        traits["ImageType"] = text(inside(group, "CTImageFrameTypeSequence"), "FrameType") or traits["ImageType"]
        traits["Matrix"] = "{} x {}".format(*shape)
        frame = Frame(
            path,
            index,
            header,
            numbers(place, "ImagePositionPatient", 3, path),
            numbers(turn, "ImageOrientationPatient", 6, path),
            numbers(measures, "PixelSpacing", 2, path),
            shape,
            traits,
        )
        if frame.normal is not None:
            traits["Plane"] = ("sagittal", "coronal", "axial")[int(np.abs(frame.normal).argmax())]
        frames.append(frame)
    return frames


def _plain(value: str) -> str:
    """Numbers in one form: 120.0 is 120."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


@dataclass
class Candidate:
    """Slices that may be one volume."""

    frames: list[Frame]
    apart: list[str] = field(default_factory=list)  # MIXED's names by which it was told from others of its series

    def trait(self, name: str) -> str:
        return self.frames[0].traits.get(name, "")

    @property
    def uid(self) -> str:
        return text(self.frames[0].header, "SeriesInstanceUID")

    @cached_property
    def extent(self) -> float:
        """mm along the slices' normal; 0 where places are missing."""
        return float(np.ptp(_heights(self.frames))) if _placed(self.frames) else 0.0

    @property
    def names(self) -> list[str]:
        """What the table may call it by."""
        own = [self.uid, self.trait("SeriesNumber"), self.trait("SeriesDescription"), self.trait("ConvolutionKernel")]
        for name in self.apart:
            own += [self.trait(name), f"{MIXED[name]} {self.trait(name) or NONE}"]
        return [name.strip().lower() for name in own if name]

    def is_called(self, series: str) -> bool:
        """By one of its names, or by several with a semicolon between."""
        return all(part.strip().lower() in self.names for part in series.split(";")) or series.lower() in self.names

    def __str__(self) -> str:
        parts = []
        if number := self.trait("SeriesNumber"):
            parts.append(f"number {number}")
        parts.append(self.trait("SeriesDescription") or "no description")
        if kernel := self.trait("ConvolutionKernel"):
            parts.append(f"kernel {kernel}")
        shown = ("SeriesNumber", "SeriesDescription", "ConvolutionKernel")
        parts += [f"{MIXED[name]} {self.trait(name) or NONE}" for name in self.apart if name not in shown]
        parts.append(f"{len(self.frames)} slices")
        if len(self.frames) > 1 and self.extent:
            parts.append(f"{self.extent / (len(self.frames) - 1):.2f} mm apart")
        return ", ".join(parts)


def _placed(frames: list[Frame]) -> bool:
    return all(frame.position is not None and frame.normal is not None for frame in frames)


def _heights(frames: list[Frame]) -> np.ndarray:
    """Where slices lie along the first one's normal, mm."""
    return np.array([frame.position @ frames[0].normal for frame in frames])


def _side_by_side(groups: list[list[Frame]]) -> bool:
    """Whether some of the groups, of two slices at least, share more than half of the shorter one's length."""
    normal = groups[0][0].normal
    for first, second in combinations([group for group in groups if len(group) > 1], 2):
        if abs(first[0].normal @ second[0].normal) < 0.9:
            return True  # axial and coronal, for example
        low, high = zip(*((min(at), max(at)) for at in ([f.position @ normal for f in g] for g in (first, second))))
        shorter = min(high[0] - low[0], high[1] - low[1])
        if min(high) - max(low) > 0.5 * shorter:
            return True
    return False


def _all_even(parts: list[list[Frame]]) -> bool:
    """Whether each part has even steps by itself."""
    heights = [np.sort([frame.position @ part[0].normal for frame in part]) for part in parts]
    return all(np.ptp(np.diff(height)) < 2 * PLACE for height in heights if len(height) > 2)


def _parted(candidate: Candidate) -> list[Candidate]:
    """Volumes that lie side by side under one UID, by the first of MIXED that tells them apart."""
    if not _placed(candidate.frames):
        return [candidate]
    for name in MIXED:
        groups: dict[str, list[Frame]] = {}
        for frame in candidate.frames:
            groups.setdefault(frame.traits.get(name, ""), []).append(frame)
        parts = list(groups.values())
        if len(groups) > 1 and _side_by_side(parts) and (name not in LOOSE or _all_even(parts)):
            found = [Candidate(frames, [*candidate.apart, name]) for frames in parts]
            return [part for whole in found for part in _parted(whole)]
    return [candidate]


def candidates(slices: list[tuple[Path, Dataset]]) -> list[Candidate]:
    """All that may be volumes among CT slices. Raises ScanError for values that are no numbers."""
    series: dict[tuple, list[Frame]] = {}
    for path, header in slices:
        frames = frames_of(path, header)
        whole = path.name if len(frames) > 1 else ""  # a multi-frame file is a volume of its own
        series.setdefault((text(header, "SeriesInstanceUID"), whole), []).extend(frames)
    return [part for frames in series.values() for part in _parted(Candidate(frames))]


def choose(found: list[Candidate], series: str, folder: Path, others: Counter) -> Candidate:
    """The one volume to read.

    Args:
        found: at least one.
        series: what the table calls it; ``""`` where it does not say.
        folder: for errors.
        others: what was left out, to which this adds.

    Raises:
        ScanError: several may be meant, or none is called so; lists them.
    """
    advice = (
        "write which in a column `series` of the table: its number, description, kernel or UID, or several of these "
        "with ; between"
    )
    if series:
        called = [one for one in found if one.is_called(series)]
        if not called:
            raise ScanError(f"{folder.name} has no CT series called {series!r}; it has {_listed(found)}")
        if len(called) > 1:
            raise ScanError(f"{folder.name} has {len(called)} CT series called {series!r}; {advice}: {_listed(called)}")
        return called[0]
    kept = found
    for of_a_chest in (  # each only where it leaves something
        lambda one: not is_capture(one.frames[0].header),
        lambda one: one.extent >= MIN_EXTENT,
    ):
        kept = [one for one in kept if of_a_chest(one)] or kept
    if len(kept) > 2 and all(len(one.frames) == 1 for one in kept):
        raise ScanError(
            f"{folder} has {len(kept)} series of one slice each: every slice has a SeriesInstanceUID of its own, which "
            "anonymisation does that forgets what belongs together; anonymise the scan again, one new UID a series"
        )
    if len(kept) > 1:
        raise ScanError(f"{folder.name} has {_what(kept)}; {advice}: {_listed(kept)}")
    for one in found:
        if one is not kept[0]:
            others["secondary capture" if is_capture(one.frames[0].header) else "CT of a few slices"] += len(one.frames)
    return kept[0]


def _what(kept: list[Candidate]) -> str:
    if len({one.uid for one in kept}) > 1:
        return f"{len(kept)} CT series"
    names = {name: [one.trait(name) or NONE for one in kept] for name in kept[0].apart}
    told = "; ".join(f"{MIXED[name]} {', '.join(dict.fromkeys(values))}" for name, values in names.items())
    return f"one CT series in which {len(kept)} volumes are mixed ({told or 'a file each'})"


def _listed(found: list[Candidate]) -> str:
    """The series in the order of their descriptions, with a UID where nothing else tells one from another."""
    lines = [str(one) for one in found]
    lines = sorted(f"{line}, UID {one.uid}" if lines.count(line) > 1 else line for line, one in zip(lines, found))
    more = f"; and {len(lines) - MOST_LISTED} more" if len(lines) > MOST_LISTED else ""
    return "; ".join(f"({number}) {line}" for number, line in enumerate(lines[:MOST_LISTED], start=1)) + more
