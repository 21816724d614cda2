"""How people differ: size, shape, pose and breath of a synthetic thorax."""

from dataclasses import dataclass

import numpy as np

SIZES = {"tiny": 0.38, "small": 0.62, "full": 1.0}  # of an adult's thorax
# Of the variation between adults. The 32 mm patches of a small phantom are mostly edges of the lung, an adult's
# mostly lung: as much variation of shape would be nearly all that its patches show.
VARIATION = {"tiny": 0.4, "small": 0.7, "full": 1.0}
# mm, range over subjects: an adult's scanner at every size, because disease has an adult's texture at every size.
SPACING = (0.65, 0.9)  # in the axial plane
SLICES = (0.8, 1.5)  # between slices


@dataclass
class Anatomy:
    """One subject's geometry. Lengths but fat in mm for an adult, multiplied by ``scale``; angles in radians.

    Patches at the pleura of a small phantom would reach through a scaled chest wall into the room, and
    show how thin it is.
    """

    scale: float
    width: float = 130.0  # half-widths of the thoracic cavity
    depth: float = 88.0
    height: float = 260.0  # base to apex
    mediastinum: float = 22.0
    heart: float = 50.0
    diaphragm: float = 62.0  # how high the domes rise
    notch: float = 1.0
    fat: float = 24.0  # of the chest wall, in mm whatever the scale
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    inflation: float = 0.0  # of breath, in HU below the middle


def draw_anatomy(rng: np.random.Generator, size: str) -> Anatomy:
    """A subject: size, shape, pose and breath."""
    spread = VARIATION[size]

    def vary(middle: float, low: float, high: float) -> float:
        return middle * (1 + spread * (rng.uniform(low, high) - 1))

    return Anatomy(
        scale=vary(SIZES[size], 0.92, 1.08),
        width=vary(130, 0.93, 1.07),
        depth=vary(88, 0.92, 1.08),
        height=vary(260, 0.92, 1.08),
        mediastinum=vary(22, 0.85, 1.2),
        heart=vary(50, 0.9, 1.12),
        diaphragm=vary(62, 0.8, 1.25),
        notch=vary(1, 0.8, 1.2),
        fat=vary(24, 0.6, 1.5),
        rotation=tuple(spread * np.deg2rad(rng.uniform(-4, 4, 3))),
        inflation=rng.uniform(-25, 30),
    )
