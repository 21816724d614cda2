"""Add emphysema of five subtypes, reticulation and lesions to a scan."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr

from tools.cohort.texture import (
    CLASSES,
    MILD,
    MODERATE,
    NORMAL,
    PANLOBULAR,
    PARASEPTAL,
    SEVERE,
    TEXTURES,
    Parenchyma,
    draw_coarse_noise,
    draw_gaussian_noise,
)

# For each emphysema class: quantiles, among smokers, of the fraction of the lung in this class.
# The quantiles come from 2,500 of the 9,330 subjects in the data of the Chest Imaging Platform.
QUANTILES_AT = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHARE_QUANTILES = {
    PARASEPTAL: (0.02, 0.05, 0.08, 0.11, 0.14, 0.18, 0.24),
    PANLOBULAR: (0.0, 0.0, 0.0, 0.0, 0.007, 0.08, 0.3),
    MILD: (0.02, 0.07, 0.14, 0.20, 0.29, 0.38, 0.5),
    MODERATE: (0.0, 0.007, 0.03, 0.09, 0.28, 0.51, 0.65),
    SEVERE: (0.0, 0.0, 0.0, 0.002, 0.02, 0.17, 0.5),
}
# Correlations between the normal scores of the class fractions. Values that the source does not give are guesses.
SHARE_CORRELATION = np.array(
    [
        [1.00, 0.55, 0.35, 0.84, 0.60],
        [0.55, 1.00, 0.00, 0.62, 0.88],
        [0.35, 0.00, 1.00, 0.32, 0.01],
        [0.84, 0.62, 0.32, 1.00, 0.70],
        [0.60, 0.88, 0.01, 0.70, 1.00],
    ]
)
RETICULAR_HU = -450.0
BASAL_BELOW = 0.5  # fraction of the lung's height below which a voxel is in the lower lung


@dataclass
class Disease:
    """The disease that is simulated in a subject.

    Attributes:
        shares: fraction of the lung in each of CLASSES; the fractions sum to 1.
        upper: preference of centrilobular emphysema for the apex; negative for a preference for the base.
        cluster_mm: Gaussian width of the clusters of centrilobular emphysema.
        reticulation: fraction of the lung with thickened septa.
        lesion_mm: diameter of the lesion, 0 for none.
    """

    shares: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    upper: float = 1.0
    cluster_mm: float = 8.0
    reticulation: float = 0.0
    lesion_mm: float = 0.0


def draw_class_shares(rng: np.random.Generator) -> tuple[float, ...]:
    """Draw random fractions of the lung for CLASSES, with quantiles and correlations as in a cohort of smokers."""
    scores = rng.multivariate_normal(np.zeros(len(SHARE_CORRELATION)), SHARE_CORRELATION)
    shares = np.zeros(len(CLASSES))
    for (kind, quantiles), probability in zip(SHARE_QUANTILES.items(), ndtr(scores)):
        shares[kind] = PchipInterpolator(QUANTILES_AT, quantiles)(probability)
    diseased = shares.sum()
    shares *= min(1.0, 0.97 / diseased)
    shares[NORMAL] = 1 - shares.sum()
    return tuple(float(share) for share in shares)


def draw_disease(rng: np.random.Generator) -> Disease:
    """Draw the disease of one smoker. Reticulation and a lesion each occur with a probability of 0.3."""
    return Disease(
        shares=draw_class_shares(rng),
        upper=rng.normal(0.8, 0.8),
        cluster_mm=rng.uniform(4, 14),
        reticulation=0.3 * rng.beta(1.5, 2.5) if rng.random() < 0.3 else 0.0,
        lesion_mm=round(rng.uniform(5, 15), 1) if rng.random() < 0.3 else 0.0,
    )


class Lungs:
    """Positions of the n lung voxels of a scan: ``height`` (0 base, 1 apex) and ``depth`` below the surface in mm."""

    def __init__(self, lung_mask: np.ndarray, voxel_spacing: np.ndarray):
        self.mask, self.sampling = lung_mask > 0, voxel_spacing
        levels = np.flatnonzero(self.mask.any(axis=(1, 2)))
        height = (np.arange(len(lung_mask)) - levels[0]) / max(1, levels[-1] - levels[0])  # 0 base, 1 apex
        self.height = np.broadcast_to(height[:, None, None], lung_mask.shape)[self.mask].astype(np.float32)
        depth = ndimage.distance_transform_edt(self.mask, sampling=voxel_spacing)  # mm
        self.depth = depth[self.mask].astype(np.float32)

    def draw_smooth_noise(self, width: float, rng: np.random.Generator) -> np.ndarray:
        """Return smooth noise with SD 1 at the lung voxels, (n,). ``width`` is in mm."""
        return draw_coarse_noise(self.mask.shape, self.sampling, width, rng)[self.mask]


def draw_class_map(lungs: Lungs, disease: Disease, rng: np.random.Generator) -> np.ndarray:
    """Return the class of every lung voxel, (n,) uint8. ``disease.shares`` gives the fraction of each class.

    Each subtype of emphysema is placed where it usually occurs in patients. Centrilobular emphysema lies mainly near
    the apex, more so for a large ``disease.upper``, and is most severe inside its clusters. Panlobular emphysema lies
    mainly near the base, and paraseptal emphysema near the pleura.
    """
    height = 2 * lungs.height - 1  # -1 base, 1 apex
    clusters = disease.upper * height + lungs.draw_smooth_noise(disease.cluster_mm, rng)
    scores = {
        PARASEPTAL: -lungs.depth / 5 + 0.3 * height + 0.7 * lungs.draw_smooth_noise(6.0, rng),
        PANLOBULAR: -1.2 * height + lungs.draw_smooth_noise(12.0, rng),
        SEVERE: clusters,
        MODERATE: clusters,
        MILD: 0.6 * clusters + 0.8 * lungs.draw_smooth_noise(6.0, rng),
    }
    classes = np.full(len(height), NORMAL, dtype=np.uint8)
    for kind, score in scores.items():
        free = np.flatnonzero(classes == NORMAL)
        wanted = min(len(free), round(disease.shares[kind] * len(classes)))
        if wanted:
            classes[free[np.argpartition(-score[free], wanted - 1)[:wanted]]] = kind
    return classes


def plant_disease(
    hu: np.ndarray,
    lung: np.ndarray,
    spacing: np.ndarray,
    disease: Disease,
    rng: np.random.Generator,
    keep_normal: bool = False,
    base: np.ndarray | float = 0.0,
) -> tuple[dict[str, float], np.ndarray]:
    """Add emphysema, reticulation and a lesion to ``hu``. The textures are not scaled with the lungs.

    Args:
        hu: (z, y, x) float32, modified in place; z points to the head. Lung voxels above -800 HU (vessels) get no
            texture.
        lung: labels (z, y, x): 0 outside the lungs, 1 right lung, 2 left lung.
        spacing: voxel spacing in mm, (x, y, z).
        disease: disease to add.
        keep_normal: leave normal lung unchanged, for a real scan; if False, normal lung also gets a texture.
        base: HU added to the textures to model inspiration and gravity; a number or an array (z, y, x).

    Returns:
        The strengths of the simulated disease, measured on the voxels, and the class map (z, y, x) uint8. The class map
        is 0 outside the lungs, and the index into CLASSES plus 1 inside.
    """
    sampling = spacing[::-1]
    lungs = Lungs(lung, sampling)
    classes = draw_class_map(lungs, disease, rng)
    parenchyma = Parenchyma(hu.shape, sampling, rng)
    planted = np.zeros(hu.shape, dtype=np.uint8)
    planted[lungs.mask] = classes + 1
    base = np.broadcast_to(np.float32(base), hu.shape)
    for kind in range(len(TEXTURES)):
        where = (planted == kind + 1) & (hu < -800)
        if not (kind == NORMAL and keep_normal) and where.any():
            hu[where] = parenchyma.render_class_texture(kind, where) + base[where]
    reticular = _add_reticulation(hu, lungs, disease.reticulation, rng)
    lesion_mm = _plant_lesion(hu, lungs, disease.lesion_mm, rng)

    share = np.bincount(classes, minlength=len(CLASSES)) / len(classes)
    destroyed = np.isin(classes, (MODERATE, SEVERE))
    upper = lungs.height > BASAL_BELOW
    strengths = {
        **{f"{name}_fraction": share[kind] for kind, name in enumerate(CLASSES)},
        "centrilobular_fraction": share[[MILD, MODERATE, SEVERE]].sum(),
        "emphysema_fraction": 1 - share[NORMAL],
        "upper_centrilobular_fraction": np.mean(destroyed & upper),
        "lower_centrilobular_fraction": np.mean(destroyed & ~upper),
        "cluster_mm": disease.cluster_mm,
        "reticulation_fraction": reticular,
        "lesion_diameter_mm": lesion_mm,
    }
    return {name: round(float(value), 5) for name, value in strengths.items()}, planted


def _add_reticulation(hu: np.ndarray, lungs: Lungs, wanted: float, rng: np.random.Generator) -> float:
    """Thicken septa near the base and the surface of the lungs in ``hu``. Return the changed fraction of the lungs."""
    if wanted <= 0:
        return 0.0
    score = -1.5 * (2 * lungs.height - 1) - lungs.depth / 8 + 0.7 * lungs.draw_smooth_noise(10.0, rng)
    count = max(1, round(wanted * len(score)))
    chosen = np.argpartition(-score, count - 1)[:count]
    sheets = np.exp(-((draw_gaussian_noise(hu.shape, lungs.sampling, 2.2, rng)[lungs.mask][chosen] / 0.13) ** 2))
    values = hu[lungs.mask]
    values[chosen] += np.maximum(0, RETICULAR_HU - values[chosen]) * sheets
    hu[lungs.mask] = values
    return count / len(score)


def _plant_lesion(hu: np.ndarray, lungs: Lungs, diameter_mm: float, rng: np.random.Generator) -> float:
    """Add to ``hu`` a bumpy solid nodule away from the pleura. Return the diameter in mm, or 0 if no nodule fits."""
    inner = np.flatnonzero(lungs.mask.ravel())[lungs.depth > 0.6 * diameter_mm] if diameter_mm else ()
    if not len(inner):
        return 0.0
    centre = np.array(np.unravel_index(rng.choice(inner), hu.shape))
    reach = np.ceil(0.75 * diameter_mm / lungs.sampling).astype(int) + 1
    box = tuple(slice(max(0, c - r), min(n, c + r + 1)) for c, r, n in zip(centre, reach, hu.shape))
    distance = np.sqrt(sum(((g - c) * d) ** 2 for g, c, d in zip(np.ogrid[box], centre, lungs.sampling)))
    bumps = ndimage.gaussian_filter(rng.normal(size=distance.shape), 2) * 2.0
    share = np.clip(0.5 - (distance - diameter_mm / 2 - bumps) / 1.2, 0, 1)
    hu[box] = np.maximum(hu[box], hu[box] + (35 - hu[box]) * share)
    return diameter_mm
