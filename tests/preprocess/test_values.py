"""Test that values other than HU are refused even in padded scans, padding becomes air, and HU stay unchanged."""

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess.reading.values import check_hounsfield
from preprocess.scan import ScanError

from .phantoms import array, chest, image_of


@pytest.fixture(scope="module")
def values():
    return array(chest((40, 44, 52), seed=4)).astype(int)


def outside_mask(values, radius=1.0):
    """Return a (rows, columns) mask of the pixels outside a circular field of view."""
    y, x = (np.linspace(-1, 1, n) for n in values.shape[1:])
    return (y[:, None] ** 2 + x**2 > radius**2)[None].repeat(len(values), 0)


def body_mask(values):
    """Return a mask of the body, without the scanner table and the surrounding air."""
    y, x = (np.linspace(-1, 1, n) for n in values.shape[1:])
    return ((x / 0.85) ** 2 + (y[:, None] / 0.8) ** 2 < 1)[None].repeat(len(values), 0)


WRONG = {  # kind of error: (change of the values, words in the error message)
    "offset of 1024": (lambda v: v + 1024, "not applied"),
    "offset of 1000": (lambda v: v + 1000, "not applied"),
    "offset of 300": (lambda v: v + 300, "air is at about -69"),
    "offset of 150": (lambda v: v + 150, "air is at about -8"),
    "offset of -300": (lambda v: v - 300, "not HU"),
    "halved": (lambda v: v // 2, "not HU"),
    "applied twice": (lambda v: v - 1024, "not HU"),
}


@pytest.mark.parametrize("padding", [-1024, -2000, -3024])
@pytest.mark.parametrize("kind", WRONG)
def test_what_padding_hides(values, kind, padding):
    change, words = WRONG[kind]
    wrong = np.where(outside_mask(values), padding, change(values)).astype(np.int16)
    with pytest.raises(ScanError, match=words) as caught:
        check_hounsfield(image_of(wrong), "x.nii")
    assert "not HU" in str(caught.value) and "x.nii" in str(caught.value)


def test_an_offset_hidden_by_padding_is_refused(values):
    """Test padding at both ends of a volume, as created by resampling a tilted scan, and padding around the body."""
    wrong = values + 1024
    wrong[:6], wrong[-6:] = -1024, -1024
    cut = np.where(body_mask(values), values + 1024, -1024)
    for one in (wrong, cut, cut.astype(np.float32) + 0.25 * body_mask(values)):
        with pytest.raises(ScanError, match="the rescale intercept"):
            check_hounsfield(image_of(one.astype(np.int16) if one.dtype.kind == "i" else one), "x")


BRIGHT = {
    "uint16": (np.int32, 65535 - 1024),
    "int16": (np.int16, 32767),
    "12 bits": (np.int16, 3071),
    "0": (np.int16, 0),
}


@pytest.mark.parametrize("kind", BRIGHT)
@pytest.mark.parametrize("radius", [1.0, 1.2])
@pytest.mark.parametrize("code", ["LPS", "SPL"])
def test_padding_with_impossible_values_becomes_air(values, kind, radius, code):
    dtype, padding = BRIGHT[kind]
    where = outside_mask(values, radius)
    scan = values.copy()
    scan[20, 22, 26] = padding  # one voxel inside the body also has the padding value, but must not become air
    warnings = []
    image = sitk.DICOMOrient(image_of(np.where(where, padding, scan).astype(dtype)), code)
    found = array(sitk.DICOMOrient(check_hounsfield(image, "x", warnings), "LPS"))
    np.testing.assert_array_equal(found, np.where(where, -1024, scan.clip(None, 32767)))
    assert len(warnings) == 1 and f"are {padding}: this padding" in warnings[0]


def add_noise(values):
    return values + np.random.default_rng(0).normal(0, 70, values.shape)


def low_dose_with_contrast(values):
    """Make values whose histogram has one peak of fat and organs without a gap, and a separate peak of blood."""
    rng = np.random.default_rng(2)
    z, _, x = np.indices(values.shape)
    soft = -80 + 270 * rng.random(values.shape) ** 1.1
    made = np.where(values > -500, np.where((z % 12 == 0) & (x % 2 == 0), 485, soft), values)
    return np.maximum(made + rng.normal(0, 20, values.shape), -1024)


RIGHT = {
    "low dose with contrast": low_dose_with_contrast,
    "as it is": lambda v: v,
    "clipped below": lambda v: np.maximum(v, -1000),
    "clipped at 240": lambda v: np.clip(v, -1024, 240),
    "field of -2000": lambda v: np.where(outside_mask(v), -2000, v),
    "field of -3024": lambda v: np.where(outside_mask(v), -3024, v),
    "field of -1024": lambda v: np.where(outside_mask(v), -1024, v),
    "two paddings": lambda v: np.where(outside_mask(v, 1.2), -3024, np.where(outside_mask(v), -1024, v)),
    "cut to the body": lambda v: np.where(body_mask(v), v, -1024),
    "noise": add_noise,
    "noise, cut to the body": lambda v: np.where(body_mask(v), add_noise(v), -1024),
    "dense lungs": lambda v: np.where(body_mask(v) & (v < -500), v + 220, v),
    "dense lungs, cut to the body": lambda v: np.where(
        body_mask(v) & (v < -500), v + 150, np.where(body_mask(v), v, -1024)
    ),
    "bone and metal": lambda v: np.where(np.indices(v.shape)[1] == 22, np.where(v > 0, 3071, v), v),
    "padding with noise": lambda v: np.where(
        outside_mask(v), -2000 + np.random.default_rng(1).normal(0, 8, v.shape), v
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_hounsfield_values_stay_unchanged(values, kind):
    given = np.rint(RIGHT[kind](values)).astype(np.int16)
    warnings = []
    found = array(check_hounsfield(image_of(given), "x", warnings))
    np.testing.assert_array_equal(found, np.where(given < -1500, -1024, given))
    assert not warnings
