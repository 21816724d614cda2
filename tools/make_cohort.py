"""A cohort of synthetic chest CTs with planted disease, to try the whole way without patient data.

    python tools/make_cohort.py --out-dir ssl_exp/cohort --num-subjects 24 --size tiny
    python tools/make_cohort.py --out-dir ssl_exp/warped --num-subjects 12 --template thorax_ct.nii.gz

The first makes procedural phantoms; the second deforms one real scan into many. Both plant
emphysema and lesions of known strength. Same flags, same bytes. Writes

    image/{sid}.nii.gz            int16 HU; spacing, orientation, pose and noise differ by subject
    dataset.csv                   sid, image: the input of preprocess/run_preprocess.sh
    labels.csv                    sid and the truth: planted severities, simulated spirometry, survival
    atlas.nii.gz                  a healthy subject at 1 mm
    atlas_lung_mask.nii.gz        its lungs: 50 right, 100 left
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from preprocess.subjects import one_line_errors

AIR, WATER = -1000.0, 0.0
LUNG_HU, TISSUE_HU, FAT_HU, BONE_HU, BLOOD_HU, TABLE_HU = -860.0, 40.0, -90.0, 450.0, 45.0, -300.0
EMPHYSEMA_HU = -975.0
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "LPI", "SPL")
ATLAS_ORIENTATION = "LAS"  # as the published atlas
SIZES = {"tiny": 0.38, "small": 0.62, "full": 1.0}  # of an adult's thorax
# Of the variation between adults. The 32 mm patches of a small phantom are mostly edges of the lung, an adult's
# mostly lung: as much variation of shape would be nearly all that its patches show.
VARIATION = {"tiny": 0.4, "small": 0.7, "full": 1.0}
SPACING = {"tiny": (1.1, 1.6), "small": (0.9, 1.5), "full": (0.65, 0.85)}  # mm in the axial plane, range over subjects
SLICES = {"tiny": (1.0, 1.8), "small": (1.0, 2.0), "full": (0.7, 1.25)}  # mm between slices


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
    inflation: float = 0.0  # of breath, in HU


def draw_anatomy(rng: np.random.Generator, size: str) -> Anatomy:
    """A subject: size, shape, pose and breath."""
    spread = VARIATION[size]

    def around(middle: float, low: float, high: float) -> float:
        return middle * (1 + spread * (rng.uniform(low, high) - 1))

    return Anatomy(
        scale=around(SIZES[size], 0.92, 1.08),
        width=around(130, 0.93, 1.07),
        depth=around(88, 0.92, 1.08),
        height=around(260, 0.92, 1.08),
        mediastinum=around(22, 0.85, 1.2),
        heart=around(50, 0.9, 1.12),
        diaphragm=around(62, 0.8, 1.25),
        notch=around(1, 0.8, 1.2),
        fat=around(24, 0.6, 1.5),
        rotation=tuple(spread * np.deg2rad(rng.uniform(-4, 4, 3))),
        inflation=spread * rng.uniform(-25, 30),
    )


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


# ---------------------------------------------------------------- the phantom


def _rotation(angles: tuple[float, float, float]) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", angles).as_matrix()


class Phantom:
    """A healthy thorax on a voxel grid: HU and lung labels.

    Coordinates are the patient's in mm, x to the left, y to the back, z to the head, the origin in
    the middle of the cavity's base. Every structure is a formula of them; arrays are (z, y, x).
    """

    def __init__(self, anatomy: Anatomy, spacing: tuple[float, float, float], rng: np.random.Generator):
        self.anatomy, self.spacing, self.rng = anatomy, np.array(spacing), rng
        a, s = anatomy, anatomy.scale
        self.fat_adult = a.fat / s  # in adult millimetres, as the formulas below
        half_x, half_y = (a.width + self.fat_adult + 30) * s, (a.depth + self.fat_adult + 40) * s
        low = np.array([-half_x, -half_y, -32 * s])
        high = np.array([half_x, half_y, (a.height + 30) * s])
        self.size = np.ceil((high - low) / self.spacing).astype(int)  # (x, y, z)
        self.origin = low
        axes = [low[i] + self.spacing[i] * np.arange(self.size[i]) for i in range(3)]
        z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij", sparse=True)
        turn = _rotation(a.rotation)
        centre = np.array([0, 0, 130 * s])
        points = [x - centre[0], y - centre[1], z - centre[2]]
        # Rotating the coordinates rotates the patient; adult millimetres from here on.
        self.x, self.y, self.z = (
            ((turn[i, 0] * points[0] + turn[i, 1] * points[1] + turn[i, 2] * points[2] + centre[i]) / s).astype(
                np.float32
            )
            for i in range(3)
        )
        self._build()

    def _build(self) -> None:
        a, x, y, z = self.anatomy, self.x, self.y, self.z
        t = z / a.height  # 0 base, 1 apex
        taper = np.sqrt(np.clip(1 - (np.clip(t - 0.28, 0, None) / 0.74) ** 2.2, 0, 1))
        wide, deep = a.width * taper + 1e-3, a.depth * (0.55 * taper + 0.45 * taper**2) + 1e-3
        cavity = (np.abs(x) / wide) ** 2.3 + (np.abs(y) / deep) ** 2.3
        in_height = (t > -0.02) & (t < 1.01)

        # Domes: the right one is higher. The lungs reach down around them.
        right_dome = (
            a.diaphragm
            * 1.12
            * (1 - ((x + 0.52 * a.width) / (0.62 * a.width)) ** 2 - ((y + 12) / (0.95 * a.depth)) ** 2)
        )
        left_dome = (
            a.diaphragm
            * 0.92
            * (1 - ((x - 0.52 * a.width) / (0.62 * a.width)) ** 2 - ((y + 12) / (0.95 * a.depth)) ** 2)
        )
        floor = np.where(x < 0, right_dome, left_dome)

        heart_x, heart_y, heart_z = 22 * a.notch, -0.30 * a.depth, 0.30 * a.height
        heart = (
            ((x - heart_x) / (a.heart * 1.15)) ** 2
            + ((y - heart_y) / (a.heart * 0.9)) ** 2
            + ((z - heart_z) / (a.heart * 1.25)) ** 2
        )
        gap = a.mediastinum * (1 - 0.35 * np.clip(t, 0, 1)) * (0.75 + 0.25 * np.clip(y / a.depth + 1, 0, 2))
        spine = ((x / 20) ** 2 + ((y - a.depth * 0.92) / 26) ** 2) < 1

        inside = (cavity < 1) & in_height & (z > floor) & (heart > 1.06) & (np.abs(x) > gap) & ~spine
        # Lungs are asymmetric: the left one is narrower and gives way to the heart.
        inside &= ~((x > 0) & (heart < 1.35) & (y < heart_y + 15))
        self.lung = np.zeros(inside.shape, dtype=np.uint8)
        self.lung[inside & (x < 0)] = 1  # x grows to the patient's left
        self.lung[inside & (x > 0)] = 2

        body = (
            (np.abs(x) / (a.width + self.fat_adult + 14)) ** 2.4 + (np.abs(y) / (a.depth + self.fat_adult + 20)) ** 2.4
        ) < 1
        muscle = ((np.abs(x) / (a.width + 14)) ** 2.4 + (np.abs(y) / (a.depth + 18)) ** 2.4) < 1
        hu = np.full(inside.shape, AIR, dtype=np.float32)
        hu[np.broadcast_to(body, hu.shape)] = FAT_HU
        hu[np.broadcast_to(muscle, hu.shape)] = TISSUE_HU
        hu[np.broadcast_to(heart < 1, hu.shape) & (hu > -500)] = BLOOD_HU

        # Ribs slope down to the front; each is a band of a shell around the cavity.
        phase = (z - 0.35 * y + 200) % 27
        shell = (cavity > 1.06) & (cavity < 1.26) & (t > 0.02) & (t < 0.97) & (np.abs(x) > 16)
        hu[shell & (phase < 9)] = BONE_HU
        hu[np.broadcast_to(spine, hu.shape) & body] = 220.0
        sternum = (np.abs(x) < 14) & (np.abs(y + a.depth + 7) < 6) & (t > 0.15) & (t < 0.85)
        hu[sternum & body] = BONE_HU
        table = (y > a.depth + self.fat_adult + 24) & (y < a.depth + self.fat_adult + 31) & (np.abs(x) < a.width + 10)
        hu[np.broadcast_to(table, hu.shape)] = TABLE_HU

        hu[inside] = (
            LUNG_HU - self.anatomy.inflation + 0.25 * np.broadcast_to(y, hu.shape)[inside]
        )  # denser at the back
        self.hu = hu
        self._vessels()
        self._airways()

    # Tubes are drawn in the box around each segment only.
    def _tube(self, start: np.ndarray, end: np.ndarray, radius: float) -> tuple[tuple[slice, ...], np.ndarray]:
        """The grid's box around a segment and, in it, the distance to its axis over the radius."""
        a = self.anatomy
        turn, centre = _rotation(a.rotation), np.array([0, 0, 130.0])
        reach = radius + 3 * self.spacing.max() / a.scale
        ends = np.stack([start, end])
        ends = (ends - centre) @ turn + centre  # patient back to grid coordinates
        low = np.floor(((ends.min(0) - reach) * a.scale - self.origin) / self.spacing).astype(int)
        high = np.ceil(((ends.max(0) + reach) * a.scale - self.origin) / self.spacing).astype(int) + 1
        low, high = np.clip(low, 0, self.size), np.clip(high, 0, self.size)
        box = tuple(slice(low[i], high[i]) for i in (2, 1, 0))
        points = np.stack([self.x[box], self.y[box], self.z[box]])
        along = (end - start)[:, None, None, None]
        offset = points - start[:, None, None, None]
        share = np.clip((offset * along).sum(0) / max(float((along**2).sum()), 1e-6), 0, 1)
        distance = np.sqrt(((offset - share * along) ** 2).sum(0))
        return box, distance / radius

    def _vessels(self) -> None:
        """Branching trees from each hilum, tapering towards the pleura."""
        a, rng = self.anatomy, self.rng
        voxel = float(self.spacing.mean()) / a.scale
        for side in (-1, 1):
            hilum = np.array([side * (a.mediastinum + 6), 0.0, 0.5 * a.height])
            queue = []
            for _ in range(9):
                direction = rng.normal(size=3) * (0.8, 0.8, 1.0) + (side * 0.8, 0, 0)
                queue.append((hilum, direction / np.linalg.norm(direction), 4.2, 0))
            while queue:
                start, direction, radius, depth = queue.pop()
                end = start + direction * rng.uniform(14, 26)
                box, ratio = self._tube(start, end, radius)
                # A vessel thinner than a voxel fills only a part of it.
                share = np.clip(1.0 - (ratio - 1) * radius / voxel, 0, 1) * min(1.0, (radius / voxel) ** 2 * 2)
                lung = self.lung[box] > 0
                self.hu[box] = np.where(
                    lung, np.maximum(self.hu[box], LUNG_HU + (BLOOD_HU - LUNG_HU) * share), self.hu[box]
                )
                if depth < 5 and radius > 0.6:
                    for _ in range(2):
                        turned = direction + rng.normal(0, 0.45, 3) + (side * 0.12, 0, 0)
                        queue.append((end, turned / np.linalg.norm(turned), radius * rng.uniform(0.62, 0.8), depth + 1))

    def _airways(self) -> None:
        """Trachea and main bronchi: air in a wall; not lung."""
        a = self.anatomy
        carina = np.array([0.0, 5.0, 0.60 * a.height])
        tubes = [(np.array([0.0, -5.0, a.height + 60]), carina, 9.0)]
        for side in (-1, 1):
            tubes.append((carina, np.array([side * (a.mediastinum + 16), 2.0, 0.50 * a.height]), 7.0))
        for wall in (True, False):
            for start, end, radius in tubes:
                box, ratio = self._tube(start, end, radius)
                if wall:
                    thick = (ratio < 1 + 2.6 / radius) & (self.hu[box] > -990)
                    self.hu[box][thick] = TISSUE_HU
                    self.lung[box][thick] = 0
                else:
                    self.hu[box][ratio < 1] = AIR


# ---------------------------------------------------------------- disease


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


def add_texture(
    hu: np.ndarray, lung: np.ndarray, spacing: np.ndarray, rng: np.random.Generator, noise: float, blur: float
) -> None:
    """Parenchymal texture, the scanner's blur and its noise, in place. ``blur`` in mm, ``noise`` in HU."""
    sampling = spacing[::-1]
    texture = ndimage.gaussian_filter(rng.normal(size=hu.shape).astype(np.float32), 1.5 / sampling)
    texture *= 22 / texture.std()
    hu[lung > 0] += texture[lung > 0]
    hu[:] = ndimage.gaussian_filter(hu, blur / sampling)
    grain = ndimage.gaussian_filter(rng.normal(size=hu.shape).astype(np.float32), 0.45 / sampling)
    hu += grain * (noise / grain.std())


# ---------------------------------------------------------------- one subject


def to_image(array: np.ndarray, origin: np.ndarray, spacing: np.ndarray, orientation: str) -> sitk.Image:
    """(z, y, x) in patient axes -> an image stored in ``orientation``."""
    image = sitk.GetImageFromArray(array)
    image.SetOrigin([float(value) for value in origin])
    image.SetSpacing([float(value) for value in spacing])
    return sitk.DICOMOrient(image, orientation)


def write_image(image: sitk.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def finish(hu: np.ndarray) -> np.ndarray:
    """HU as a scanner stores them."""
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def make_phantom(seed: int, index: int, size: str, out_dir: Path) -> dict:
    """Write subject ``index`` and return its row of labels."""
    rng = np.random.default_rng([seed, index])
    sid = subject_name(index)
    anatomy, disease = draw_anatomy(rng, size), draw_disease(rng)
    in_plane = rng.uniform(*SPACING[size])
    spacing = np.array([in_plane, in_plane, rng.uniform(*SLICES[size])])
    phantom = Phantom(anatomy, tuple(spacing), rng)
    planted = plant_disease(phantom.hu, phantom.lung, spacing, disease, anatomy.scale, rng)
    add_texture(phantom.hu, phantom.lung, spacing, rng, noise=rng.uniform(8, 22), blur=rng.uniform(0.35, 0.7))
    table_position = rng.uniform(-200, 200, 3)
    image = to_image(
        finish(phantom.hu), phantom.origin + table_position, spacing, ORIENTATIONS[index % len(ORIENTATIONS)]
    )
    write_image(image, out_dir / "image" / f"{sid}.nii.gz")
    return {"sid": sid, **planted, **simulate_labels(rng, planted)}


def make_phantom_atlas(seed: int, size: str, out_dir: Path) -> None:
    """A healthy subject of middling anatomy at 1 mm, and its lung mask."""
    rng = np.random.default_rng([seed, 2**31])
    spacing = np.ones(3)
    phantom = Phantom(Anatomy(scale=SIZES[size]), tuple(spacing), rng)
    add_texture(phantom.hu, phantom.lung, spacing, rng, noise=10, blur=0.5)
    labels = (phantom.lung.astype(np.int16)) * 50
    write_image(to_image(finish(phantom.hu), phantom.origin, spacing, ATLAS_ORIENTATION), out_dir / "atlas.nii.gz")
    write_image(to_image(labels, phantom.origin, spacing, ATLAS_ORIENTATION), out_dir / "atlas_lung_mask.nii.gz")


# ---------------------------------------------------------------- a cohort out of one scan


def random_diffeomorphism(shape: tuple[int, ...], sampling: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth invertible displacement in mm, (3, z, y, x): a random velocity field, exponentiated.

    Scaling and squaring (Arsigny et al., 2006) on a grid of about 8 mm, where it is smooth.
    """
    step = np.maximum(1, np.round(8 / sampling)).astype(int)
    coarse = [int(np.ceil(n / k)) + 1 for n, k in zip(shape, step)]
    spacing = sampling * step
    velocity = np.stack([ndimage.gaussian_filter(rng.normal(size=coarse), 40 / spacing) for _ in range(3)])
    velocity *= rng.uniform(4, 8) / np.sqrt((velocity**2).sum(0)).max()
    flow = velocity / 2**5
    base = np.meshgrid(*[np.arange(n) for n in coarse], indexing="ij")
    for _ in range(5):
        moved = [b + f / s for b, f, s in zip(base, flow, spacing)]
        flow = flow + np.stack([ndimage.map_coordinates(f, moved, order=1, mode="nearest") for f in flow])
    fine = np.meshgrid(*[np.arange(n, dtype=np.float32) / k for n, k in zip(shape, step)], indexing="ij", sparse=True)
    fine = np.broadcast_arrays(*fine)
    return np.stack([ndimage.map_coordinates(f.astype(np.float32), fine, order=1, mode="nearest") for f in flow])


def load_template(scan: str, mask: str | None, workdir: str) -> tuple[sitk.Image, sitk.Image]:
    """The scan and its lung mask in LPS; without --template-mask, preprocess/segment_lung.py makes it."""
    if mask is None:
        table = Path(workdir) / "template.csv"
        pd.DataFrame({"sid": ["template"], "image": [str(Path(scan).resolve())]}).to_csv(table, index=False)
        command = [
            sys.executable,
            str(ROOT / "preprocess" / "segment_lung.py"),
            "--method",
            "threshold",
            "--no-progress",
        ]
        made = subprocess.run(
            [*command, "--input-csv", str(table), "--root-dir", workdir], capture_output=True, text=True
        )
        if made.returncode:
            sys.exit(
                f"error: no lung mask of --template {scan}: {made.stderr.strip().splitlines()[0]}; give --template-mask"
            )
        mask = str(Path(workdir) / "lung_mask" / "template.nii.gz")
    try:
        image, labels = sitk.ReadImage(scan), sitk.ReadImage(mask)
    except RuntimeError as error:
        sys.exit(f"error: --template or --template-mask cannot be read: {str(error).strip().splitlines()[-1]}")
    labels = sitk.Resample(labels, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return sitk.DICOMOrient(image, "LPS"), sitk.DICOMOrient(labels, "LPS")


def make_warped(seed: int, index: int, template: Path, out_dir: Path) -> dict:
    """Deform the template, plant disease in its lungs, write subject ``index``."""
    rng = np.random.default_rng([seed, index])
    sid = subject_name(index)
    image = sitk.ReadImage(str(template / "scan.nii.gz"))
    hu = sitk.GetArrayFromImage(image).astype(np.float32)
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(template / "mask.nii.gz")))
    spacing = np.array(image.GetSpacing())
    sampling = spacing[::-1]

    displacement = random_diffeomorphism(hu.shape, sampling, rng)
    stretch = rng.uniform(0.94, 1.07, 3)
    turn = _rotation(tuple(np.deg2rad(rng.uniform(-3, 3, 3)))) @ np.diag(stretch)
    centre = np.array(hu.shape) * sampling / 2
    grid = np.meshgrid(
        *[np.arange(n, dtype=np.float32) * d for n, d in zip(hu.shape, sampling)], indexing="ij", sparse=True
    )
    shifted = [g - c for g, c in zip(grid, centre)]
    where = [
        (turn[i, 0] * shifted[0] + turn[i, 1] * shifted[1] + turn[i, 2] * shifted[2] + centre[i] + displacement[i])
        / sampling[i]
        for i in range(3)
    ]
    warped = ndimage.map_coordinates(hu, where, order=1, mode="constant", cval=-1024.0)
    labels = ndimage.map_coordinates(lung, where, order=0, mode="constant", cval=0)
    planted = plant_disease(warped, labels, spacing, draw_disease(rng), 1.0, rng)
    warped += rng.normal(0, rng.uniform(2, 10), warped.shape).astype(np.float32)
    image = to_image(
        finish(warped),
        np.array(image.GetOrigin()) + rng.uniform(-50, 50, 3),
        spacing,
        ORIENTATIONS[index % len(ORIENTATIONS)],
    )
    write_image(image, out_dir / "image" / f"{sid}.nii.gz")
    return {"sid": sid, **planted, **simulate_labels(rng, planted)}


def make_template_atlas(image: sitk.Image, labels: sitk.Image, out_dir: Path) -> None:
    """The template itself at 1 mm, and its lungs."""
    size = [round(n * s) for n, s in zip(image.GetSize(), image.GetSpacing())]
    for source, interpolator, fill, name in (
        (image, sitk.sitkLinear, -1024, "atlas.nii.gz"),
        (sitk.Cast(labels, sitk.sitkInt16) * 50, sitk.sitkNearestNeighbor, 0, "atlas_lung_mask.nii.gz"),
    ):
        made = sitk.Resample(
            source, size, sitk.Transform(), interpolator, image.GetOrigin(), [1.0] * 3, image.GetDirection(), fill
        )
        write_image(sitk.DICOMOrient(made, ATLAS_ORIENTATION), out_dir / name)


# ---------------------------------------------------------------- the command


def subject_name(index: int) -> str:
    return f"{index + 1:04d}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", required=True, help="folder to write to, made where it is missing")
    parser.add_argument("--num-subjects", type=int, default=24, help="subjects beside the atlas (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another cohort (default: %(default)s)")
    parser.add_argument(
        "--size",
        choices=tuple(SIZES),
        default="tiny",
        help="tiny: a third of an adult, under 2 s a subject; full: an adult, about a minute (default: %(default)s)",
    )
    parser.add_argument(
        "--template", metavar="SCAN", help="deform this CT instead of making phantoms; --size is not used"
    )
    parser.add_argument(
        "--template-mask", metavar="MASK", help="its lung mask, 1 right, 2 left (default: made by thresholding)"
    )
    parser.add_argument("--num-workers", type=int, default=1, help="subjects at a time (default: %(default)s)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")
    one_line_errors(parser)
    args = parser.parse_args()
    for flag, value, least in (
        ("--num-subjects", args.num_subjects, 1),
        ("--num-workers", args.num_workers, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            parser.error(f"{flag} {value}: at least {least}")
    if args.template_mask and not args.template:
        parser.error("--template-mask goes with --template")
    for flag, path in (("--template", args.template), ("--template-mask", args.template_mask)):
        if path and not Path(path).exists():
            parser.error(f"{flag} {path} does not exist")

    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out-dir {out_dir} cannot be made: {error.strerror}")
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".partial-") as workdir:
        if args.template:
            image, labels = load_template(args.template, args.template_mask, workdir)
            sitk.WriteImage(image, os.path.join(workdir, "scan.nii.gz"))
            sitk.WriteImage(labels, os.path.join(workdir, "mask.nii.gz"))
            make_template_atlas(image, labels, out_dir)
            jobs = [(make_warped, args.seed, index, Path(workdir), out_dir) for index in range(args.num_subjects)]
        else:
            make_phantom_atlas(args.seed, args.size, out_dir)
            jobs = [(make_phantom, args.seed, index, args.size, out_dir) for index in range(args.num_subjects)]
        bar = tqdm(total=len(jobs), desc="make_cohort", unit="subject", disable=True if args.no_progress else None)
        rows = []
        with bar, ProcessPoolExecutor(args.num_workers) as pool:
            for future in [pool.submit(*job) for job in jobs]:
                rows.append(future.result())
                bar.update()
    sids = [row["sid"] for row in rows]
    pd.DataFrame({"sid": sids, "image": [f"image/{sid}.nii.gz" for sid in sids]}).to_csv(
        out_dir / "dataset.csv", index=False
    )
    pd.DataFrame(rows).to_csv(out_dir / "labels.csv", index=False)
    print(f"make_cohort: {len(rows)} subjects, an atlas and its mask; {out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
