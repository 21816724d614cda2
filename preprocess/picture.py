"""A picture of the patches over a scan and its lung mask: nothing else tells a wrong mask or transform as fast."""

import io
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from misc.sizes import HU_MAX, HU_MIN

MARGIN = 20  # voxels shown around the patches


class Plane(NamedTuple):
    """One panel. Numbers are axes: 0 x, 1 y, 2 z."""

    name: str
    axis: int  # that the plane is perpendicular to
    across: int  # to the right in the panel
    up: int


PLANES = (Plane("coronal", 1, 0, 2), Plane("sagittal", 0, 1, 2), Plane("axial", 2, 0, 1))


def picture_of_patches(
    volume: sitk.Image, values: np.ndarray, mask: sitk.Image | None, corners: np.ndarray, patch_size: int, title: str
) -> bytes:
    """Coronal, sagittal and axial slices with the lung mask's outline and the patches that they cross, as PNG.

    Args:
        volume: the padded scan at 1 mm.
        values: its voxels, (z, y, x) HU.
        mask: the scan's lung mask, on any grid.
        corners: (L, 3) lowest corners (x, y, z) in ``volume``.
        patch_size: voxels.
        title: above the three.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = None
    if mask is not None:
        labels = sitk.GetArrayFromImage(sitk.Resample(mask, volume, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    figure = Figure(figsize=(15, 5.6))
    FigureCanvasAgg(figure)
    for panel, plane in zip(figure.subplots(1, 3), PLANES):
        _draw(panel, plane, volume, values, labels, corners, patch_size)
    figure.suptitle(title)
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=70, format="png")
    return stream.getvalue()


def _position(plane: Plane, corners: np.ndarray, patch_size: int, length: int) -> int:
    """The slice to show: through the middle of the patches; for the sagittal one, through one lung."""
    middle = corners[:, plane.axis] + patch_size // 2
    wanted = np.quantile(middle, 0.25) if plane.axis == 0 else np.median(middle)
    return int(np.clip(middle[np.argmin(np.abs(middle - wanted))], 0, length - 1))


def _draw(
    panel: Any,
    plane: Plane,
    volume: sitk.Image,
    values: np.ndarray,
    labels: np.ndarray | None,
    corners: np.ndarray,
    patch_size: int,
) -> None:
    from matplotlib.patches import Rectangle

    axis, across, up = plane[1:]
    position = _position(plane, corners, patch_size, volume.GetSize()[axis])
    slice_of_scan = np.take(values, position, axis=2 - axis)  # rows: the later of the two axes
    panel.imshow(slice_of_scan, cmap="gray", vmin=HU_MIN, vmax=HU_MAX, origin="lower", interpolation="nearest")
    if labels is not None:
        lung = np.take(labels, position, axis=2 - axis) > 0
        if lung.any():
            panel.contour(lung, levels=[0.5], colors=["#ffd000"], linewidths=1.0)
    crossed = (corners[:, axis] <= position) & (position < corners[:, axis] + patch_size)
    box = dict(fill=False, edgecolor="#35c8ff", linewidth=0.8)
    for corner in corners[crossed]:
        panel.add_patch(Rectangle((corner[across], corner[up]), patch_size, patch_size, **box))
    low = np.clip(corners.min(0) - MARGIN, 0, None)
    high = np.minimum(corners.max(0) + patch_size + MARGIN, volume.GetSize())
    panel.set_xlim(low[across], high[across])
    panel.set_ylim(low[up], high[up])
    panel.set_title(f"{plane.name}, {'xyz'[axis]} = {position}: {int(crossed.sum())} patches")
    panel.set_axis_off()
    # Heads up and faces up, whichever way the index axes run.
    direction = np.array(volume.GetDirection()).reshape(3, 3)
    if (up == 2 and direction[2, 2] < 0) or (up == 1 and direction[1, 1] > 0):
        panel.invert_yaxis()
    if across == 0 and direction[0, 0] < 0:
        panel.invert_xaxis()
