"""Sort DICOM slices, and check that every slice lies within 0.1 mm of its position on an evenly spaced grid."""

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocess.reading import ScanError
from preprocess.reading.dicom_files import read_text
from preprocess.reading.dicom_series import Frame
from preprocess.reading.itk import PLACE

ONE_PLACE = 0.2  # slices closer together than this fraction of the usual spacing are at the same position
DIGITS = 5  # decimals to which a spacing in mm is rounded; a file may contain 0.9999999 mm instead of 1 mm


class Grid(NamedTuple):
    """The grid of a volume, as in SimpleITK: axes (x, y, z) are (columns, rows, slices)."""

    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    direction: tuple[float, ...]  # (3, 3) matrix, row by row


def sort_slices(frames: list[Frame], folder: Path) -> tuple[list[Frame], Grid]:
    """Sort slices along their normal, and compute the grid that they form.

    Raises:
        ScanError: the slices do not form a grid. The message names the first wrong slice along the normal.
    """
    check_required_slice_elements(frames, folder)
    usual = find_typical_slice(frames)
    row, column = compute_row_and_column_directions(usual, folder)
    normal = np.cross(row, column)
    frames = sorted(frames, key=lambda frame: (frame.position @ normal, frame.name))
    _check_same_slice_geometry(frames, usual, folder)
    axes = np.column_stack([row, column, normal])
    places = np.array([frame.position for frame in frames])
    across, down, heights = (places @ axes).T
    _check_slice_spacing(frames, heights, folder)
    check_sideways_jumps(frames, places, axes[:, :2].T, folder)
    _check_tilt(frames, places, axes, folder)
    first, length = fit_evenly_spaced_values(heights)
    start = places[0] + axes @ (
        compute_offset_from_first_to_midrange(across),
        compute_offset_from_first_to_midrange(down),
        first - heights[0],
    )
    spacing = (usual.spacing[1], usual.spacing[0], round(length / (len(frames) - 1), DIGITS))
    place = Grid(tuple(map(float, start)), tuple(map(float, spacing)), tuple(map(float, axes.ravel())))
    check_slice_corners(frames, place, folder)
    return frames, place


def compute_offset_from_first_to_midrange(values: np.ndarray) -> float:
    """Return the distance from the first value to the midpoint of the range; 0 if values differ only by rounding."""
    away = values - values[0]
    return float(away.min() + away.max()) / 2 if np.abs(away).max() > PLACE / 2 else 0.0


def check_required_slice_elements(frames: list[Frame], folder: Path) -> None:
    """Raise ScanError unless there are several slices, each with a position, an orientation and a pixel spacing."""
    for name, tag, lost in (
        ("position", "0020,0032", "their order and distance"),
        ("orientation", "0020,0037", "their direction"),
        ("spacing", "0028,0030", "their pixel size"),
    ):
        without = [frame for frame in frames if getattr(frame, name) is None]
        if without:
            which = "the slices have" if len(without) == len(frames) else f"{len(without)} of {len(frames)} slices have"
            what = "pixel spacing" if name == "spacing" else name
            raise ScanError(
                f"{folder}: {which} no {what} ({tag}), first in {without[0].name}, so {lost} cannot be determined; "
                "anonymise or export the series again and keep this element"
            )
    for frame in frames:
        if min(frame.spacing) <= 0 or min(frame.shape) < 2:
            raise ScanError(
                f"{folder}: {frame.name} has pixels of {frame.spacing[0]:g} x {frame.spacing[1]:g} mm in a matrix of "
                f"{frame.shape[0]} x {frame.shape[1]}, which is not a valid slice; export the series again"
            )
    if len(frames) < 2:
        raise ScanError(f"{folder} has a DICOM series with only one slice, {frames[0].name}; copy the whole series")


def find_typical_slice(frames: list[Frame]) -> Frame:
    """Return a slice with the most common shape, orientation and spacing, to which all others are compared."""

    def make_slice_geometry_key(frame: Frame) -> Hashable:
        return (frame.shape, *np.round(frame.orientation, 3) + 0.0, *np.round(frame.spacing, 3))

    kinds = [make_slice_geometry_key(frame) for frame in frames]
    return frames[kinds.index(Counter(kinds).most_common(1)[0][0])]


def compute_row_and_column_directions(typical_frame: Frame, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors along rows and columns. Raises ScanError unless rows and columns are at right angles."""
    row, column = typical_frame.orientation[:3], typical_frame.orientation[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 0.01:
        raise ScanError(
            f"{folder}: {typical_frame.name}'s orientation (0020,0037) is invalid: its vectors have lengths "
            f"{lengths[0]:.3f} and {lengths[1]:.3f} instead of 1; export the series again"
        )
    row, column = row / lengths[0], column / lengths[1]
    extent = min(typical_frame.shape[0] * typical_frame.spacing[0], typical_frame.shape[1] * typical_frame.spacing[1])
    if (off := abs(row @ column) * extent) > PLACE:
        angle = np.rad2deg(np.arcsin(min(1.0, abs(row @ column))))
        raise ScanError(
            f"{folder}: {typical_frame.name}'s rows and columns (0020,0037) are not orthogonal, {angle:.2f} degrees "
            f"off a right angle, which displaces voxels by {off:.1f} mm; export the series again from the scanner"
        )
    column = column - row * (row @ column)
    return row, column / np.linalg.norm(column)


def compute_slice_size_mm(frame: Frame) -> np.ndarray:
    """Return the lengths in mm from first to last voxel along columns and rows, in the order of ``spacing``."""
    return (np.array(frame.shape) - 1) * frame.spacing


def _check_same_slice_geometry(frames: list[Frame], typical_frame: Frame, folder: Path) -> None:
    """Raise ScanError unless all slices have the same matrix, pixel spacing and orientation."""
    for frame in frames:
        if frame.shape != typical_frame.shape:
            raise ScanError(
                f"{folder}: {frame.name} has a matrix of {frame.shape[0]} x {frame.shape[1]}, but other slices have "
                f"{typical_frame.shape[0]} x {typical_frame.shape[1]} ({typical_frame.name}); "
                f"{advise_on_odd_slice(frame, typical_frame)}"
            )
        if (np.abs(compute_slice_size_mm(frame) - compute_slice_size_mm(typical_frame)) > PLACE).any():
            raise ScanError(
                f"{folder}: {frame.name} has a pixel spacing of {frame.spacing[0]:g} x {frame.spacing[1]:g} mm, "
                f"but other slices have {typical_frame.spacing[0]:g} x {typical_frame.spacing[1]:g} mm "
                f"({typical_frame.name}); {advise_on_odd_slice(frame, typical_frame)}"
            )
        ends = [
            f.orientation.reshape(2, 3) * compute_slice_size_mm(typical_frame)[::-1, None]
            for f in (frame, typical_frame)
        ]
        if np.linalg.norm(ends[0] - ends[1], axis=1).max() > PLACE:
            cosine = np.clip(
                min((f @ g for f, g in zip(*(e / np.linalg.norm(e, axis=1)[:, None] for e in ends)))), -1, 1
            )
            raise ScanError(
                f"{folder}: {frame.name} differs in orientation (0020,0037) from the other slices "
                f"({typical_frame.name}): it is rotated by {np.rad2deg(np.arccos(cosine)):.2f} degrees; "
                f"{advise_on_odd_slice(frame, typical_frame)}"
            )


def advise_on_odd_slice(frame: Frame, typical_frame: Frame) -> str:
    """Return advice on what to do with a slice that differs from the other slices."""
    if frame.traits["Plane"] != typical_frame.traits["Plane"]:
        return "it may be a localizer: remove it from the folder"
    return "keep only the slices of one reconstruction in the folder"


def _check_slice_spacing(frames: list[Frame], slice_positions: np.ndarray, folder: Path) -> None:
    """Raise ScanError unless the slices are evenly spaced along their normal."""
    steps = np.diff(slice_positions)
    usual = float(np.median(steps))
    if steps.max() < PLACE:
        raise ScanError(
            f"{folder}: all {len(frames)} slices are at the same position ({frames[0].name}, {frames[1].name}, ...); "
            "their positions (0020,0032) were overwritten, or the series repeats one slice over time; "
            "export a whole chest scan"
        )
    short = np.flatnonzero(steps < max(ONE_PLACE * usual, PLACE / 2))
    if len(short):
        raise ScanError(
            f"{folder} has two slices at the same position ({frames[short[0]].name} and {frames[short[0] + 1].name}, "
            f"{steps[short[0]]:.2f} mm apart); keep only one reconstruction and phase in the folder, with "
            "each slice once"
        )
    between = f"steps between {steps.min():.2f} and {steps.max():.2f} mm"
    wide = np.flatnonzero(steps > usual + max(0.1 * usual, 1.5 * PLACE))
    if len(wide):
        where = f"{between}, first between {frames[wide[0]].name} and {frames[wide[0] + 1].name}"
        multiples = steps[wide] / usual
        holes = (np.abs(multiples - np.rint(multiples)) < 0.1).all()
        if holes and (len(wide) < 0.1 * len(steps) or (np.diff(wide) > 1).all()):
            raise ScanError(f"{folder} lacks slices: {where}; copy or export the complete series")
        raise ScanError(f"{folder} has unevenly spaced slices: {where}; {_EVEN}")
    away = np.abs(slice_positions - compute_evenly_spaced_values(slice_positions))
    if away.max() > PLACE:
        change = np.flatnonzero(np.abs(np.diff(steps)) > PLACE)  # empty if the slice spacing drifts slowly
        at = int(change[0]) + 1 if len(change) else max(int((away > PLACE).argmax()) - 1, 0)
        raise ScanError(
            f"{folder} has unevenly spaced slices: {between}, for example between {frames[at].name} and "
            f"{frames[at + 1].name}. The slices are up to {away.max():.1f} mm from evenly spaced positions; {_EVEN}"
        )


_EVEN = "reconstruct the scan with even spacing, or keep only slices with the same spacing in the folder"


def fit_evenly_spaced_values(values: np.ndarray) -> tuple[float, float]:
    """Fit evenly spaced positions to ``values``; return the first position, and the last minus the first, in mm.

    A line is fitted to positions that are unevenly spaced, for example because they were rounded to 0.1 mm. Evenly
    spaced positions are not fitted, because a fit would change the last digits of the first and last position.
    """
    along = np.linspace(0, 1, len(values))
    start, length = float(values[0]), float(values[-1] - values[0])
    if np.abs(values - start - length * along).max() > PLACE / 2:
        length, start = map(float, np.polyfit(along, values, 1))
    return start, length


def compute_evenly_spaced_values(values: np.ndarray) -> np.ndarray:
    """Return the evenly spaced values nearest to ``values``."""
    start, length = fit_evenly_spaced_values(values)
    return start + length * np.linspace(0, 1, len(values))


def check_sideways_jumps(
    frames: list[Frame], slice_positions: np.ndarray, plane_axes: np.ndarray, folder: Path
) -> None:
    """Raise ScanError unless the slices lie on a straight line, without sideways jumps."""
    sideways = slice_positions @ plane_axes.T  # (n, 2)
    away = np.linalg.norm(
        sideways - np.column_stack([compute_evenly_spaced_values(values) for values in sideways.T]), axis=1
    )
    if away.max() <= PLACE:
        return
    moves = np.diff(sideways, axis=0)
    jumps = np.linalg.norm(moves - np.median(moves, axis=0), axis=1)
    at = int((jumps > PLACE).argmax()) + 1 if (jumps > PLACE).any() else max(int((away > PLACE).argmax()), 1)
    raise ScanError(
        f"{folder}: {frames[at].name} is shifted sideways from the slice before it ({frames[at - 1].name}) by "
        f"{np.linalg.norm(moves[at - 1]):.1f} mm, unlike the other slices; keep only slices on one side of "
        "the jump, or reconstruct all slices with the same field of view"
    )


def _check_tilt(frames: list[Frame], positions: np.ndarray, axes: np.ndarray, folder: Path) -> None:
    """Raise ScanError unless the slices are stacked perpendicular to their plane; a tilted gantry shears the stack."""
    whole = (positions[-1] - positions[0]) @ axes  # along rows, columns, normal
    off = float(np.hypot(*whole[:2]))
    if off <= PLACE:
        return
    tilt = read_text(frames[0].header, "GantryDetectorTilt")
    told = f", GantryDetectorTilt {tilt}" if tilt else ""
    raise ScanError(
        f"{folder}: its slices are sheared by {np.rad2deg(np.arctan2(off, whole[2])):.1f} degrees (tilted gantry{told})"
        f": from {frames[1].name} on, each slice is shifted sideways relative to the previous slice, {off:.1f} mm "
        "over the whole stack. Use a copy resampled to remove the tilt (dcm2niix writes one whose name ends in _Tilt)"
    )


def check_slice_corners(frames: list[Frame], volume_grid: Grid, folder: Path) -> None:
    """Raise ScanError if a corner of a slice is not at its expected position in the volume."""
    axes = np.array(volume_grid.direction).reshape(3, 3) * volume_grid.spacing
    for number, frame in enumerate(frames):
        rows, columns = frame.shape
        for x, y in ((0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)):
            turn = frame.orientation.reshape(2, 3)
            own = frame.position + turn[0] * frame.spacing[1] * x + turn[1] * frame.spacing[0] * y
            off = float(np.linalg.norm(own - (np.array(volume_grid.origin) + axes @ (x, y, number))))
            if off > PLACE + 1e-6:
                raise ScanError(
                    f"{folder}: a corner of {frame.name} is {off:.2f} mm from its position in an evenly spaced stack, "
                    f"but only {PLACE} mm is allowed; {_EVEN}"
                )
