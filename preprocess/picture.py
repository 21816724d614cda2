"""Draw the patches over a scan and its lung mask: the fastest way to spot a wrong mask or transform."""

import io
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from misc.sizes import HU_MAX, HU_MIN

MARGIN = 20  # voxels; margin shown around the patches and lungs
RIGHT_COLOR, LEFT_COLOR, PATCH_COLOR, UNCOVERED_COLOR = "#ff9f1c", "#7ae582", "#35c8ff", (1.0, 0.1, 0.3, 0.3)
LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))  # anatomical directions at the low and high end of x, y and z


class Plane(NamedTuple):
    """One panel of the picture. The axis numbers are 0 (x), 1 (y) and 2 (z)."""

    name: str
    axis: int  # perpendicular to the plane
    across: int  # horizontal axis of the panel
    up: int  # vertical axis of the panel


PLANES = (Plane("coronal", 1, 0, 2), Plane("sagittal", 0, 1, 2), Plane("axial", 2, 0, 1))


def render_patch_picture(
    volume: sitk.Image, values: np.ndarray, mask: sitk.Image | None, corners: np.ndarray, patch_size: int, title: str
) -> bytes:
    """Draw the figure of :func:`make_patch_figure`, which takes the same arguments, and return PNG bytes."""
    stream = io.BytesIO()
    make_patch_figure(volume, values, mask, corners, patch_size, title).savefig(stream, dpi=70, format="png")
    return stream.getvalue()


def make_patch_figure(
    volume: sitk.Image, values: np.ndarray, mask: sitk.Image | None, corners: np.ndarray, patch_size: int, title: str
):
    """Draw a coronal, a sagittal and an axial slice with the outlines of both lungs and the patches in the slice.

    The outline is orange for the right lung and green for the left lung. Patches are blue, and lung outside all patches
    is tinted red. Letters at the edges show the orientation: R right, L left, A front, P back, H head, F feet.

    Args:
        volume: the padded scan at 1 mm.
        values: voxels of ``volume``, (z, y, x) HU.
        mask: the scan's lung mask, 1 right, 2 left, on any grid; None draws no outlines.
        corners: (L, 3) lowest corners (x, y, z) in ``volume``.
        patch_size: edge length of a patch in voxels.
        title: title above the three panels.

    Returns:
        A matplotlib figure with three axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high = corners.min(0), corners.max(0) + patch_size
    if mask is not None:
        first, last = _find_mask_index_bounds(mask, volume)
        low, high = np.minimum(low, first), np.maximum(high, last)
    shown = np.clip(low - MARGIN, 0, None), np.minimum(high + MARGIN, volume.GetSize())
    figure = Figure(figsize=(15, 5.6))
    FigureCanvasAgg(figure)
    for panel, plane in zip(figure.subplots(1, 3), PLANES):
        position = _choose_slice(plane, corners, patch_size, volume.GetSize()[plane.axis])
        labels = None if mask is None else _resample_slice(mask, volume, plane.axis, position)
        _draw_slice(panel, plane, position, values, labels, corners, patch_size)
        _set_view(panel, plane, volume, shown)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def _find_mask_index_bounds(mask: sitk.Image, volume: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest index (x, y, z) in ``volume`` of the labelled voxels of a mask."""
    labels = sitk.GetArrayViewFromImage(mask)
    ends = []
    for axis in (2, 1, 0):  # x, y, z
        there = np.flatnonzero(labels.any(axis=tuple(other for other in range(3) if other != axis)))
        ends.append((int(there[0]), int(there[-1])) if there.size else (0, 0))
    points = [mask.TransformIndexToPhysicalPoint(corner) for corner in product(*ends)]
    indices = np.array([volume.TransformPhysicalPointToContinuousIndex(point) for point in points])
    return np.floor(indices.min(0)).astype(int), np.ceil(indices.max(0)).astype(int)


def _resample_slice(mask: sitk.Image, volume: sitk.Image, axis: int, position: int) -> np.ndarray:
    """Resample the mask's labels to one plane of ``volume``, as an array (z, y), (z, x) or (y, x)."""
    size, start = list(volume.GetSize()), [0, 0, 0]
    size[axis], start[axis] = 1, position
    origin = volume.TransformIndexToPhysicalPoint(start)
    grid = (size, sitk.Transform(), sitk.sitkNearestNeighbor, origin, volume.GetSpacing(), volume.GetDirection(), 0)
    return np.squeeze(sitk.GetArrayFromImage(sitk.Resample(mask, *grid)), axis=2 - axis)


def _choose_slice(plane: Plane, corners: np.ndarray, patch_size: int, length: int) -> int:
    """Choose the slice to show: through the middle of the patches, or through one lung for the sagittal plane."""
    middle = corners[:, plane.axis] + patch_size // 2
    wanted = np.quantile(middle, 0.25) if plane.axis == 0 else np.median(middle)
    return int(np.clip(middle[np.argmin(np.abs(middle - wanted))], 0, length - 1))


def _draw_slice(
    panel: Any,
    plane: Plane,
    position: int,
    values: np.ndarray,
    labels: np.ndarray | None,
    corners: np.ndarray,
    patch_size: int,
) -> None:
    """Draw the slice, the lung outlines, the patches, and the lung that no patch covers."""
    from matplotlib.patches import Rectangle

    axis, across, up = plane[1:]
    slice_of_scan = np.take(values, position, axis=2 - axis)  # (z, y), (z, x) or (y, x)
    panel.imshow(slice_of_scan, cmap="gray", vmin=HU_MIN, vmax=HU_MAX, origin="lower", interpolation="nearest")
    crossed = corners[(corners[:, axis] <= position) & (position < corners[:, axis] + patch_size)]
    if labels is not None:
        uncovered = labels > 0
        for column, row in np.clip(crossed[:, [across, up]], -patch_size, None):
            end = max(0, row + patch_size), max(0, column + patch_size)
            uncovered[max(0, row) : end[0], max(0, column) : end[1]] = False
        tint = np.zeros((*labels.shape, 4), dtype=np.float32)
        tint[uncovered] = UNCOVERED_COLOR
        panel.imshow(tint, origin="lower", interpolation="nearest")
        for label, color in ((1, RIGHT_COLOR), (2, LEFT_COLOR)):
            if (labels == label).any():
                panel.contour(labels == label, levels=[0.5], colors=[color], linewidths=1.2)
    box = dict(fill=False, edgecolor=PATCH_COLOR, linewidth=0.8)
    for corner in crossed:
        panel.add_patch(Rectangle((corner[across], corner[up]), patch_size, patch_size, **box))
    panel.set_title(f"{plane.name}, {'xyz'[axis]} = {position}: {len(crossed)} patches")
    panel.set_axis_off()


def _set_view(panel: Any, plane: Plane, volume: sitk.Image, visible_range: tuple[np.ndarray, np.ndarray]) -> None:
    """Set the axis limits, flip axes to radiological orientation, and draw orientation letters at the edges."""
    across, up = plane.across, plane.up
    (low, high), direction = visible_range, np.array(volume.GetDirection()).reshape(3, 3)
    panel.set_xlim(low[across], high[across])
    panel.set_ylim(low[up], high[up])
    # For any orientation of the index axes, show the subject's right on the left, and the head or the front at the top.
    if (up == 2 and direction[2, 2] < 0) or (up == 1 and direction[1, 1] > 0):
        panel.invert_yaxis()
    if across == 0 and direction[0, 0] < 0:
        panel.invert_xaxis()
    for axis, inverted, ends in (
        (across, panel.xaxis_inverted(), ((0.02, 0.5), (0.98, 0.5))),
        (up, panel.yaxis_inverted(), ((0.5, 0.03), (0.5, 0.97))),
    ):
        patient = int(np.argmax(np.abs(direction[:, axis])))
        falls = (direction[patient, axis] < 0) != inverted
        for letter, place in zip(LETTERS[patient][::-1] if falls else LETTERS[patient], ends):
            style = dict(color="white", fontsize=13, fontweight="bold", ha="center", va="center")
            panel.text(*place, letter, transform=panel.transAxes, bbox=dict(color="black", pad=1.5), **style)
