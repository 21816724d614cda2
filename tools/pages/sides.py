"""Views of the atlas lungs and the locations in them, from the front, from the left and from below."""

import base64
import io
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from preprocess.geometry import orient


class Side(NamedTuple):
    """A view along one of the LPS axes: x points to the left of the body, y to the back, z to the head."""

    name: str
    across: int  # horizontal axis, which points to the right
    up: int  # vertical axis
    upwards: bool  # whether the vertical axis points to the top of the picture
    letters: str  # labels at the left, right, top and bottom edge


SIDES = (
    Side("from the front", 0, 2, True, "RLHF"),
    Side("from the left", 1, 2, True, "APHF"),
    Side("from below", 0, 1, False, "RLAP"),
)


def make_atlas_views(locations: np.ndarray, patch_size: int, atlas: sitk.Image | None) -> list[dict[str, Any]]:
    """Return views of the atlas with the centres of the locations.

    Args:
        locations: (L, 3) corners, atlas voxel index (x, y, z).
        patch_size: edge length of a patch in voxels.
        atlas: lung mask of the atlas. Without an atlas, the views have no image, and the index axes are
            assumed to be LPS.

    Returns:
        Dictionaries with ``name``, ``letters`` (empty without an atlas), ``shape`` (width / height), ``image`` (data
        URL of a PNG, or empty) and ``places``: centres (L, 2) float32 from 0 to 1, measured from the left and the top.
    """
    centres = locations + (patch_size - 1) / 2  # (L, 3)
    if atlas is None:
        size, spacing, mask = centres.max(axis=0) + patch_size / 2, np.ones(3), None
    else:
        oriented = orient(atlas, "LPS")
        points = [atlas.TransformContinuousIndexToPhysicalPoint(centre.tolist()) for centre in centres]
        centres = np.array([oriented.TransformPhysicalPointToContinuousIndex(point) for point in points])
        size, spacing = np.array(oriented.GetSize(), dtype=float), np.array(oriented.GetSpacing())
        mask = sitk.GetArrayFromImage(oriented).transpose(2, 1, 0) > 0  # (x, y, z)
    found = []
    for side in SIDES:
        places = (centres[:, [side.across, side.up]] + 0.5) / size[[side.across, side.up]]  # (L, 2)
        if side.upwards:
            places[:, 1] = 1 - places[:, 1]
        extent = size * spacing
        found.append(
            {
                "name": side.name,
                "letters": side.letters if atlas is not None else "",
                "shape": round(float(extent[side.across] / extent[side.up]), 4),
                "image": "" if mask is None else _draw_lung_thickness_as_data_url(mask, side),
                "places": places.astype(np.float32),
            }
        )
    return found


def _draw_lung_thickness_as_data_url(lung_mask: np.ndarray, side: Side) -> str:
    """Draw the thickness of the lungs along the viewing direction, and return a PNG as a data URL."""
    from matplotlib.image import imsave

    depth = next(axis for axis in range(3) if axis not in (side.across, side.up))
    thickness = lung_mask.sum(axis=depth).astype(float)  # (across, up), because side.across < side.up in every view
    picture = thickness.T  # (up, across), because the first axis of a picture is vertical
    if side.upwards:
        picture = picture[::-1]
    grey = 1 - 0.45 * np.sqrt(picture / max(1, picture.max()))
    stream = io.BytesIO()
    imsave(stream, grey, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
