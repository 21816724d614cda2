"""Anatomy of a synthetic thorax: size, shape, pose and inspiration."""

from dataclasses import dataclass

import numpy as np

SIZES = {"tiny": 0.38, "small": 0.62, "full": 1.0}  # size relative to an adult's thorax
# Variation between subjects, relative to the variation between adults. Small phantoms vary less than large phantoms.
# In small phantoms, patches of 32 mm mostly contain edges of the lung.
# If small phantoms varied as much as adults, their patches would mainly show the shape of the lung.
VARIATION = {"tiny": 0.4, "small": 0.7, "full": 1.0}
# Range of the voxel spacing in mm. The range is the same for all phantom sizes, because textures are not scaled.
SPACING = (0.65, 0.9)  # in the axial plane
SLICES = (0.8, 1.5)  # between slices


@dataclass
class Anatomy:
    """Geometry of one subject. Angles are in radians.

    Lengths are in mm, for an adult. All lengths except ``fat`` are multiplied by ``scale``. If the fat in the chest
    wall were scaled, patches at the pleura of a small phantom would contain air outside the body.
    """

    scale: float
    width: float = 130.0  # half of the thoracic cavity's width
    depth: float = 88.0  # half of the thoracic cavity's depth
    height: float = 260.0  # base to apex
    mediastinum: float = 22.0
    heart: float = 50.0
    diaphragm: float = 62.0  # height of the domes
    notch: float = 1.0
    fat: float = 24.0  # thickness of the fat in the chest wall in mm; not multiplied by scale
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    inflation: float = 0.0  # decrease of the lung density due to deeper inspiration, in HU


def draw_anatomy(rng: np.random.Generator, size: str) -> Anatomy:
    """Draw the size, shape, pose and inspiration of a subject."""
    spread = VARIATION[size]

    def draw_scaled_value(middle: float, lowest_factor: float, highest_factor: float) -> float:
        return middle * (1 + spread * (rng.uniform(lowest_factor, highest_factor) - 1))

    return Anatomy(
        scale=draw_scaled_value(SIZES[size], 0.92, 1.08),
        width=draw_scaled_value(130, 0.93, 1.07),
        depth=draw_scaled_value(88, 0.92, 1.08),
        height=draw_scaled_value(260, 0.92, 1.08),
        mediastinum=draw_scaled_value(22, 0.85, 1.2),
        heart=draw_scaled_value(50, 0.9, 1.12),
        diaphragm=draw_scaled_value(62, 0.8, 1.25),
        notch=draw_scaled_value(1, 0.8, 1.2),
        fat=draw_scaled_value(24, 0.6, 1.5),
        rotation=tuple(spread * np.deg2rad(rng.uniform(-4, 4, 3))),
        inflation=rng.uniform(-25, 30),
    )
