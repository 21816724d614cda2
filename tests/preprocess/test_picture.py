"""The quality-control picture labels the patient's sides correctly, shows both lungs and marks uncovered lung."""

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess.picture import UNCOVERED_COLOR, make_patch_figure

SIDES = {"R": (-1, 0, 0), "L": (1, 0, 0), "A": (0, -1, 0), "P": (0, 1, 0), "F": (0, 0, -1), "H": (0, 0, 1)}  # LPS
# (slice axis, subject's side at the left, subject's side at the top); None if the side depends on the orientation
PLANES = ((1, "R", "H"), (0, None, "H"), (2, "R", "A"))


def draw_lungs(orientation):
    """Draw two lungs in a volume of the given orientation, with four patches in the middle of one lung."""
    labels = np.zeros((90, 80, 100), dtype=np.uint8)  # (z, y, x) in LPS: x points to the left
    labels[10:80, 20:60, 15:40], labels[10:80, 20:60, 60:85] = 1, 2
    image = sitk.GetImageFromArray(labels)
    image.SetOrigin((-50.0, 7.0, 300.0))
    mask = sitk.DICOMOrient(image, orientation)
    volume = sitk.Cast(mask, sitk.sitkInt16) * 0 - 850
    middle = np.array([volume.TransformPhysicalPointToIndex((-50.0 + 27, 7.0 + 40, 300.0 + 45))])
    corners = np.repeat(middle - 8, 4, axis=0)
    return volume, mask, make_patch_figure(volume, sitk.GetArrayFromImage(volume), mask, corners, 16, "one")


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LAS", "RPI"])
def test_side_letters_match_the_patients_sides(orientation):
    volume, _, figure = draw_lungs(orientation)
    direction = np.array(volume.GetDirection()).reshape(3, 3)
    for panel, (axis, left, top) in zip(figure.axes, PLANES):
        across, up = [other for other in range(3) if other != axis]
        found = {text.get_text(): text.get_position() for text in panel.texts}
        assert len(found) == 4
        for letter, place in found.items():
            horizontal = place[0] != 0.5
            limits, index = (panel.get_xlim(), across) if horizontal else (panel.get_ylim(), up)
            towards = np.sign(place[0 if horizontal else 1] - 0.5) * np.sign(limits[1] - limits[0])
            # towards is 1 if the voxel index increases towards the edge that shows the letter, and otherwise -1.
            assert np.dot(direction[:, index] * towards, SIDES[letter]) == pytest.approx(1)
            assert left is None or (place[0] < 0.1) == (letter == left)
            assert (place[1] > 0.9) == (letter == top)


def test_both_lungs_are_shown_and_uncovered_lung_is_tinted():
    _, mask, figure = draw_lungs("LAS")
    labels = sitk.GetArrayFromImage(mask)
    for panel, (axis, *_) in zip(figure.axes, PLANES):
        across, up = [other for other in range(3) if other != axis]
        for index, limits in ((across, panel.get_xlim()), (up, panel.get_ylim())):
            there = np.flatnonzero(labels.any(axis=tuple(2 - other for other in range(3) if other != index)))
            assert min(limits) <= there[0] and there[-1] <= max(limits)
        tint = panel.images[1].get_array()[..., 3] > 0
        position = int(panel.get_title().split("= ")[1].split(":")[0])
        lung = np.take(labels, position, axis=2 - axis) > 0
        assert 0 < (lung & ~tint).sum() == 16 * 16 and not (tint & ~lung).any()
    assert UNCOVERED_COLOR[3] < 0.5  # the scan under the colour stays visible


def test_a_picture_is_drawn_without_a_mask():
    volume, _, _ = draw_lungs("LPS")
    figure = make_patch_figure(volume, sitk.GetArrayFromImage(volume), None, np.array([[2, 3, 4]]), 16, "one")
    assert len(figure.axes) == 3 and len(figure.axes[0].images) == 1
