"""Texture of normal and emphysematous lung, fitted to real scans.

The textures reproduce measurements on 1,337 patches labelled by radiologists, from the public data of the Chest
Imaging Platform (full dose, inspiration; 31 x 31 pixels of about 0.6 mm). The measurements are mean and spread in HU,
fractions of voxels below thresholds, and autocorrelation. Mild centrilobular emphysema has the same mean HU as normal
lung and differs only in texture.
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
_VESSEL_MM = 1.8  # width of two Gaussian fields; vessels run along the lines where both fields are 0
_VESSEL_EDGE = (0.3, 0.7)  # values of the vessel profile at which the vessel fraction of a voxel is 0 and 1
_REGION_MM = 12.0  # width of the Gaussian field that shifts the mean HU of each region
_AT = np.linspace(-3.0, 3.0, 7)  # field values, in SD, at which Texture.hu gives the HU


class Texture(NamedTuple):
    """Texture of one class of lung tissue: vessels, and a Gaussian field with a fine and a coarse part, in HU."""

    hu: tuple[float, ...]  # HU at field values of -3, -2, ... 3 SD
    fine_mm: float  # Gaussian widths of the fine and the coarse part of the field
    coarse_mm: float
    coarse: float  # fraction of the field's variance that comes from the coarse part
    vessels: float  # fraction of voxels above -700 HU
    region: float  # SD of the mean HU between regions


# Textures fitted to measured patches. tests/tools/test_texture.py compares rendered textures with the measurements.
TEXTURES = (
    Texture((-988, -941, -919, -898, -866, -793, -699), 0.68, 1.6, 0.25, 0.06, 15),  # normal
    Texture((-987, -958, -928, -900, -862, -752, -685), 0.68, 1.0, 0.35, 0.05, 20),  # mild centrilobular
    Texture((-1018, -984, -964, -939, -870, -775, -700), 0.68, 1.0, 0.68, 0.05, 20),  # moderate centrilobular
    Texture((-1030, -1001, -981, -966, -923, -808, -697), 0.68, 1.6, 0.27, 0.02, 17),  # severe centrilobular
    Texture((-1030, -1019, -995, -970, -958, -906, -807), 0.68, 1.6, 0.05, 0.005, 14),  # panlobular
    # paraseptal emphysema, next to the chest wall
    Texture((-1034, -1016, -980, -926, -850, -720, -610), 0.68, 2.8, 0.85, 0.02, 30),
)


def draw_gaussian_noise(
    shape: tuple[int, ...], sampling: np.ndarray, width: float, rng: np.random.Generator
) -> np.ndarray:
    """Return smooth noise with mean 0 and SD 1, (z, y, x) float32.

    The autocorrelation at distance d is exp(-d^2 / (4 width^2)), with d and width in mm. Averaging over
    voxels larger than 0.6 mm makes the noise smoother and lowers its SD below 1.
    """
    # The variable box is the variance of the blur that voxels larger than MEASURED_SPACING add to the field.
    box = np.maximum(0.0, sampling**2 - MEASURED_SPACING**2) / 12
    wide = np.sqrt(width**2 + box)
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), wide / sampling, mode="wrap")
    return field * np.float32(np.sqrt(np.prod(width / wide)) / field.std())


class Parenchyma:
    """Random fields for the textures of one subject. The random fields take as much memory as six float32 volumes.

    Args:
        shape: shape of the volume, (z, y, x).
        voxel_spacing: voxel spacing in mm, (z, y, x).
        rng: random generator for the fields.
    """

    def __init__(self, shape: tuple[int, ...], voxel_spacing: np.ndarray, rng: np.random.Generator):
        widths = sorted({width for texture in TEXTURES for width in (texture.fine_mm, texture.coarse_mm)})
        self._fields = {width: draw_gaussian_noise(shape, voxel_spacing, width, rng) for width in widths}
        one, two = (draw_gaussian_noise(shape, voxel_spacing, _VESSEL_MM, rng) for _ in range(2))
        self._off_axis = one**2 + two**2  # this field is 0 along curves, which become the vessels
        self._region = draw_coarse_noise(shape, voxel_spacing, _REGION_MM, rng)

    def render_class_texture(self, class_index: int, where: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return HU of class ``class_index`` at the voxels ``where`` (a boolean mask or a slice), float32."""
        texture = TEXTURES[class_index]
        fine, coarse = (self._fields[width][where] for width in (texture.fine_mm, texture.coarse_mm))
        field = np.sqrt(1 - texture.coarse) * fine + np.sqrt(texture.coarse) * coarse
        hu = np.interp(field, _AT, texture.hu) + texture.region * self._region[where]
        # P(off_axis < r) = 1 - exp(-r / 2). A voxel is above -700 HU if its vessel fraction exceeds about 0.2.
        low, high = _VESSEL_EDGE
        breadth = np.log1p(-texture.vessels) / np.log(low + 0.2 * (high - low))
        share = np.clip((np.exp(-self._off_axis[where] / (2 * breadth)) - low) / (high - low), 0, 1)
        return (hu + (VESSEL_HU - hu) * share).astype(np.float32)


def draw_coarse_noise(
    shape: tuple[int, ...], voxel_spacing: np.ndarray, width: float, rng: np.random.Generator
) -> np.ndarray:
    """Return noise like :func:`draw_gaussian_noise`, but drawn on a coarse grid and interpolated, for large widths."""
    step = np.maximum(1, np.floor(width / 2 / voxel_spacing)).astype(int)
    coarse = tuple(int(np.ceil(n / k)) + 1 for n, k in zip(shape, step))
    field = ndimage.gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), width / (voxel_spacing * step))
    # Divide by the theoretical SD, not by the SD of this draw, because a draw may have few independent regions.
    field /= np.sqrt(
        np.prod([np.sum(_make_gaussian_kernel(width / (k * d)) ** 2) for k, d in zip(step, voxel_spacing)])
    )
    at = np.ix_(*[np.arange(n, dtype=np.float32) / k for n, k in zip(shape, step)])
    return ndimage.map_coordinates(field, np.broadcast_arrays(*at), order=1).astype(np.float32)


def _make_gaussian_kernel(sigma: float) -> np.ndarray:
    """Return the one-dimensional Gaussian kernel that scipy.ndimage uses."""
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return weights / weights.sum()
