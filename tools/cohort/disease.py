"""Emphysema and lesions planted in a scan, and what follows from them for the patient."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

EMPHYSEMA_HU = -975.0


@dataclass
class Disease:
    """Planted strengths: fractions of lung volume to replace, and a lesion's diameter in mm."""

    centrilobular: float = 0.0
    paraseptal: float = 0.0
    lesion_mm: float = 0.0


def draw_disease(rng: np.random.Generator) -> Disease:
    """A third healthy, the others anywhere up to severe; the two emphysemas correlate."""
    burden = rng.beta(1.1, 1.6) if rng.random() > 0.3 else 0.0
    mix = rng.uniform(0.35, 1.0)
    return Disease(
        centrilobular=round(0.55 * burden * mix, 4),
        paraseptal=round(0.14 * burden * (1.25 - mix), 4),
        lesion_mm=round(rng.uniform(8, 24), 1) if rng.random() < 0.3 else 0.0,
    )


def simulate_labels(rng: np.random.Generator, planted: dict[str, float]) -> dict[str, float]:
    """Spirometry and survival that follow from the planted disease, plus noise."""
    emphysema = planted["centrilobular_fraction"] + 1.5 * planted["paraseptal_fraction"]
    fev1 = float(np.clip(100 - 125 * emphysema + rng.normal(0, 7), 15, 130))
    ratio = float(np.clip(0.79 - 0.72 * emphysema + rng.normal(0, 0.035), 0.2, 0.92))
    gold = 0 if ratio >= 0.7 else 1 + int(np.searchsorted([-80, -50, -30], -fev1))
    hazard = 0.05 * np.exp(4.5 * emphysema + 0.5 * (planted["lesion_diameter_mm"] > 0))
    death, end = rng.exponential(1 / hazard), rng.uniform(6, 12)
    return {
        "FEV1pp": round(fev1, 1),
        "FEV1_FVC": round(ratio, 3),
        "GOLD": gold,
        "survival_years": round(float(min(death, end)), 2),
        "died": int(death <= end),
    }


def plant_disease(
    hu: np.ndarray, lung: np.ndarray, spacing: np.ndarray, disease: Disease, scale: float, rng: np.random.Generator
) -> dict[str, float]:
    """Plant emphysema and a lesion in place.

    Args:
        hu: (z, y, x) float32, modified; z to the head.
        lung: (z, y, x), 0 outside, 1 right, 2 left.
        spacing: mm (x, y, z).
        disease: wanted strengths.
        scale: of the anatomy; blebs and lesions shrink with its square root, centrilobular holes not at all: a small
            phantom has lungs of a small animal but the disease of a man, or its scans would not show it.

    Returns:
        The strengths as they came out, measured on the voxels.
    """
    mask = lung > 0
    voxels = int(mask.sum())
    sampling = spacing[::-1]
    shrink = float(np.sqrt(scale))
    level = np.flatnonzero(mask.any(axis=(1, 2)))
    height = (np.arange(hu.shape[0]) - level[0]) / max(1, level[-1] - level[0])  # 0 base, 1 apex
    parenchyma = mask & (hu < -700)

    holes = np.zeros_like(mask)
    where = np.flatnonzero(parenchyma)
    upper = np.clip(height, 0.03, 1)[where // (hu.shape[1] * hu.shape[2])] ** 2
    holes = _holes(
        parenchyma, where, upper / upper.sum(), disease.centrilobular * voxels, (1.6, 4.5), 1.0, sampling, rng
    )

    depth = ndimage.distance_transform_edt(mask, sampling=sampling)
    rim = np.flatnonzero(parenchyma & (depth < 2.5 * shrink))
    blebs = np.zeros_like(mask)
    if len(rim):
        weight = np.clip(height, 0.1, 1)[rim // (hu.shape[1] * hu.shape[2])]
        blebs = _holes(
            parenchyma & ~holes,
            rim,
            weight / weight.sum(),
            disease.paraseptal * voxels,
            (3.5, 7.5),
            shrink,
            sampling,
            rng,
        )
    # Sharp below a voxel is nothing a scanner shows: soften over about 0.6 mm.
    for region, value in ((holes, EMPHYSEMA_HU), (blebs, EMPHYSEMA_HU - 10)):
        if region.any():
            soft = ndimage.gaussian_filter(region.astype(np.float32), 0.6 / sampling)
            np.copyto(hu, hu + (value - hu) * soft, where=parenchyma & (soft > 0.02))

    lesion_mm = 0.0
    if disease.lesion_mm:
        lesion_mm = disease.lesion_mm * shrink
        inner = np.flatnonzero(parenchyma & (depth > 0.6 * lesion_mm))
        if len(inner):
            centre = np.array(np.unravel_index(rng.choice(inner), hu.shape))
            reach = np.ceil(0.75 * lesion_mm / sampling).astype(int) + 1
            box = _box(centre, reach, hu.shape)
            grid = np.ogrid[box]
            distance = np.sqrt(sum(((g - c) * d) ** 2 for g, c, d in zip(grid, centre, sampling)))
            bumps = ndimage.gaussian_filter(rng.normal(size=distance.shape), 2) * 2.0
            share = np.clip(0.5 - (distance - lesion_mm / 2 - bumps) / 1.2, 0, 1)
            hu[box] = np.maximum(hu[box], hu[box] + (35 - hu[box]) * share)
        else:
            lesion_mm = 0.0
    return {
        "centrilobular_fraction": round(float(holes.sum()) / voxels, 5),
        "paraseptal_fraction": round(float(blebs.sum()) / voxels, 5),
        "emphysema_fraction": round(float((holes | blebs).sum()) / voxels, 5),
        "lesion_diameter_mm": round(lesion_mm, 1),
    }


def _box(centre: tuple[int, ...], reach: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The voxels within ``reach`` of ``centre``, inside the array."""
    return tuple(slice(max(0, c - r), min(n, c + r + 1)) for c, r, n in zip(centre, reach, shape))


def _holes(
    allowed: np.ndarray,
    where: np.ndarray,
    weights: np.ndarray,
    wanted: float,
    radii: tuple[float, float],
    shrink: float,
    sampling: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Balls at random places until ``wanted`` voxels are covered."""
    holes = np.zeros_like(allowed)
    covered = 0
    if wanted < 1 or not len(where):
        return holes
    cumulative = np.cumsum(weights)
    for _ in range(20000):
        centre = np.unravel_index(where[min(np.searchsorted(cumulative, rng.random()), len(where) - 1)], allowed.shape)
        radius = rng.uniform(*radii) * shrink
        reach = np.ceil(radius / sampling).astype(int)
        box = _box(centre, reach, allowed.shape)
        grid = np.ogrid[box]
        ball = sum(((g - c) * d) ** 2 for g, c, d in zip(grid, centre, sampling)) <= radius**2
        new = ball & allowed[box] & ~holes[box]
        holes[box] |= new
        covered += int(new.sum())
        if covered >= wanted:
            break
    return holes
