"""Draw a map of predictions over its scan in three planes."""

import io

import numpy as np
import SimpleITK as sitk

from preprocess.geometry import orient

GREY = (-1024, 240)  # HU shown as black and as white
LONGEST = 320  # maximum number of pixels along a side of a panel; larger slices show every n-th voxel


def draw_map(
    scan: sitk.Image, scores: sitk.Image, mask: sitk.Image, color_limits: tuple[float, float], title: str
) -> bytes:
    """Draw coronal, sagittal and axial slices through the highest values, with the map in colour over the lungs.

    Args:
        scan: the scan.
        scores: the map, on the grid of the scan.
        mask: lung mask, on the grid of the scan.
        color_limits: values of the first and the last colour.
        title: title of the picture.

    Returns:
        The bytes of a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey, values, lungs = (sitk.GetArrayFromImage(orient(image, "LPS")) for image in (scan, scores, mask))
    spacing = orient(scan, "LPS").GetSpacing()[::-1]  # z, y, x
    lungs = lungs > 0
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    shown = None
    for panel, axis, name, sides in zip(
        figure.subplots(1, 3), (1, 2, 0), ("coronal", "sagittal", "axial"), ("RLHF", "APHF", "RLAP")
    ):
        weight = np.where(lungs, values - color_limits[0], 0).clip(min=0).sum(axis=tuple({0, 1, 2} - {axis}))
        where = int(weight.argmax()) if weight.any() else lungs.shape[axis] // 2
        rows, columns = (other for other in range(3) if other != axis)
        step = max(1, -(-max(lungs.shape[rows], lungs.shape[columns]) // LONGEST))
        cut = (slice(None, None, step), slice(None, None, step))
        picture = dict(
            origin="upper" if axis == 0 else "lower", aspect=spacing[rows] / spacing[columns], interpolation="nearest"
        )
        panel.imshow(np.take(grey, where, axis)[cut], cmap="gray", vmin=GREY[0], vmax=GREY[1], **picture)
        over = np.ma.masked_where(~np.take(lungs, where, axis)[cut], np.take(values, where, axis)[cut])
        shown = panel.imshow(over, cmap="inferno", vmin=color_limits[0], vmax=color_limits[1], alpha=0.6, **picture)
        panel.set_title(f"{name}, slice {where + 1} of {lungs.shape[axis]}")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_xlabel(f"{sides[0]}  to  {sides[1]}")
        panel.set_ylabel(sides[2:])
    figure.colorbar(shown, ax=figure.axes, shrink=0.8)
    figure.suptitle(title)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=70, format="png")
    return stream.getvalue()
