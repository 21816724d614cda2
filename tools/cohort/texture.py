"""The texture of normal and emphysematous lung, as measured on real scans.

The figures are of 1,337 patches of 31 x 31 pixels of about 0.6 mm, labelled by radiologists, of the Chest Imaging
Platform's public data (full dose, inspiration): mean and spread in HU, shares of voxels below thresholds, and the
autocorrelation. Mild centrilobular emphysema has the mean of normal lung: its texture differs, its density does not.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

CLASSES = (
    *("normal", "mild_centrilobular", "moderate_centrilobular", "severe_centrilobular"),
    *("panlobular", "paraseptal"),
)
NORMAL, MILD, MODERATE, SEVERE, PANLOBULAR, PARASEPTAL = range(len(CLASSES))

MEASURED_SPACING = 0.6  # mm
VESSEL_HU = 40.0
_VESSEL_MM = 1.8  # Gaussian width of the two fields that are both 0 along a vessel
_VESSEL_EDGE = (0.3, 0.7)  # of a vessel's profile: outside, inside
_REGION_MM = 12.0  # Gaussian width of the field that sets a region's mean
_AT = np.linspace(-3.0, 3.0, 7)  # standard deviations of the field, where Texture.hu is given


class Texture(NamedTuple):
    """A class of lung: a Gaussian field of two widths, turned into HU number by number, and vessels."""

    hu: tuple[float, ...]  # HU where the field is -3, -2, ... 3 standard deviations
    fine_mm: float  # Gaussian widths of the field's two parts
    coarse_mm: float
    coarse: float  # share of the coarse part in the field's variance
    vessels: float  # share of voxels above -700 HU
    region: float  # HU, standard deviation of the mean between regions


# Fitted to the measured figures; tests/tools/test_texture.py renders and measures them again.
TEXTURES = (
    Texture((-988, -941, -919, -898, -866, -793, -699), 0.68, 1.6, 0.25, 0.06, 15),  # normal
    Texture((-987, -958, -928, -900, -862, -752, -685), 0.68, 1.0, 0.35, 0.05, 20),  # mild centrilobular
    Texture((-1018, -984, -964, -939, -870, -775, -700), 0.68, 1.0, 0.68, 0.05, 20),  # moderate centrilobular
    Texture((-1030, -1001, -981, -966, -923, -808, -697), 0.68, 1.6, 0.27, 0.02, 17),  # severe centrilobular
    Texture((-1030, -1019, -995, -970, -958, -906, -807), 0.68, 1.6, 0.05, 0.005, 14),  # panlobular
    Texture((-1034, -1016, -980, -926, -850, -720, -610), 0.68, 2.8, 0.85, 0.02, 30),  # paraseptal, beside the wall
)


def gaussian_field(shape: tuple[int, ...], sampling: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of mean 0 and SD 1, (z, y, x) float32; autocorrelation exp(-d^2 / (4 width^2)), lengths in mm.

    A voxel wider than 0.6 mm averages: its field is wider, and its SD below 1.
    """
    box = np.maximum(0.0, sampling**2 - MEASURED_SPACING**2) / 12  # variance of a voxel's box beyond the measured one
    wide = np.sqrt(width**2 + box)
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), wide / sampling, mode="wrap")
    return field * np.float32(np.sqrt(np.prod(width / wide)) / field.std())


class Parenchyma:
    """The fields that a subject's textures are made of, on one grid; memory is six volumes of float32.

    Args:
        shape: (z, y, x).
        sampling: mm (z, y, x).
        rng: draws the fields.
    """

    def __init__(self, shape: tuple[int, ...], sampling: np.ndarray, rng: np.random.Generator):
        widths = sorted({width for texture in TEXTURES for width in (texture.fine_mm, texture.coarse_mm)})
        self._fields = {width: gaussian_field(shape, sampling, width, rng) for width in widths}
        one, two = (gaussian_field(shape, sampling, _VESSEL_MM, rng) for _ in range(2))
        self._off_axis = one**2 + two**2  # 0 along curves, which vessels are
        self._region = smooth_field(shape, sampling, _REGION_MM, rng)

    def render(self, kind: int, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """HU of class ``kind`` at the voxels ``where`` (a boolean mask or a slice), float32."""
        texture = TEXTURES[kind]
        fine, coarse = (self._fields[width][where] for width in (texture.fine_mm, texture.coarse_mm))
        field = np.sqrt(1 - texture.coarse) * fine + np.sqrt(texture.coarse) * coarse
        hu = np.interp(field, _AT, texture.hu) + texture.region * self._region[where]
        # P(off axis < r) = 1 - exp(-r / 2); the profile passes -700 HU a fifth of the way from edge to middle.
        low, high = _VESSEL_EDGE
        breadth = np.log1p(-texture.vessels) / np.log(low + 0.2 * (high - low))
        share = np.clip((np.exp(-self._off_axis[where] / (2 * breadth)) - low) / (high - low), 0, 1)
        return (hu + (VESSEL_HU - hu) * share).astype(np.float32)


def smooth_field(shape: tuple[int, ...], sampling: np.ndarray, width: float, rng: np.random.Generator) -> np.ndarray:
    """:func:`gaussian_field` of a width of many voxels: drawn on a coarse grid and interpolated."""
    step = np.maximum(1, np.floor(width / 2 / sampling)).astype(int)
    coarse = tuple(int(np.ceil(n / k)) + 1 for n, k in zip(shape, step))
    field = ndimage.gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), width / (sampling * step))
    # Of the process and not of this draw, whose few regions may all lie on one side of the mean.
    field /= np.sqrt(np.prod([np.sum(_kernel(width / (k * d)) ** 2) for k, d in zip(step, sampling)]))
    at = np.ix_(*[np.arange(n, dtype=np.float32) / k for n, k in zip(shape, step)])
    return ndimage.map_coordinates(field, np.broadcast_arrays(*at), order=1).astype(np.float32)


def _kernel(sigma: float) -> np.ndarray:
    """scipy's Gaussian kernel in one dimension."""
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return weights / weights.sum()
