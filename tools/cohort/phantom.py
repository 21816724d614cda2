"""A healthy thorax computed from formulas on a voxel grid."""

import numpy as np

from tools.cohort.anatomy import Anatomy

AIR = -1000.0  # HU; the values on the next line are also in HU
LUNG_HU, TISSUE_HU, FAT_HU, BONE_HU, BLOOD_HU, TABLE_HU = -860.0, 40.0, -90.0, 450.0, 45.0, -300.0


def rotation_matrix(angles: tuple[float, float, float]) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", angles).as_matrix()


class Phantom:
    """A healthy thorax on a voxel grid: HU and lung labels.

    Coordinates are patient coordinates in mm: x to the left, y to the back, z to the head. The origin is in the middle
    of the base of the thoracic cavity. Every anatomical structure is a function of the coordinates. Arrays are
    (z, y, x).
    """

    def __init__(self, anatomy: Anatomy, spacing: tuple[float, float, float], rng: np.random.Generator):
        self.anatomy, self.spacing, self.rng = anatomy, np.array(spacing), rng
        a, s = anatomy, anatomy.scale
        self.fat_adult = a.fat / s  # fat thickness in mm, in the adult-scale coordinates of _build_thorax
        half_x, half_y = (a.width + self.fat_adult + 30) * s, (a.depth + self.fat_adult + 40) * s
        low = np.array([-half_x, -half_y, -32 * s])
        high = np.array([half_x, half_y, (a.height + 30) * s])
        self.size = np.ceil((high - low) / self.spacing).astype(int)  # (x, y, z)
        self.origin = low
        axes = [low[i] + self.spacing[i] * np.arange(self.size[i]) for i in range(3)]
        z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij", sparse=True)
        turn = rotation_matrix(a.rotation)
        centre = np.array([0, 0, 130 * s])
        points = [x - centre[0], y - centre[1], z - centre[2]]
        # Rotating the coordinates rotates the patient. These coordinates are in mm at adult scale.
        self.x, self.y, self.z = (
            ((turn[i, 0] * points[0] + turn[i, 1] * points[1] + turn[i, 2] * points[2] + centre[i]) / s).astype(
                np.float32
            )
            for i in range(3)
        )
        self._build_thorax()

    def _build_thorax(self) -> None:
        a, x, y, z = self.anatomy, self.x, self.y, self.z
        t = z / a.height  # 0 base, 1 apex
        taper = np.sqrt(np.clip(1 - (np.clip(t - 0.28, 0, None) / 0.74) ** 2.2, 0, 1))
        wide, deep = a.width * taper + 1e-3, a.depth * (0.55 * taper + 0.45 * taper**2) + 1e-3
        cavity = (np.abs(x) / wide) ** 2.3 + (np.abs(y) / deep) ** 2.3
        in_height = (t > -0.02) & (t < 1.01)

        # The right dome of the diaphragm is higher than the left dome. The lungs extend downwards around the domes.
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
        # The left lung is narrower than the right lung, which leaves room for the heart.
        inside &= ~((x > 0) & (heart < 1.35) & (y < heart_y + 15))
        self.lung = np.zeros(inside.shape, dtype=np.uint8)
        self.lung[inside & (x < 0)] = 1  # x increases to the patient's left
        self.lung[inside & (x > 0)] = 2

        body = (
            (np.abs(x) / (a.width + self.fat_adult + 14)) ** 2.4 + (np.abs(y) / (a.depth + self.fat_adult + 20)) ** 2.4
        ) < 1
        muscle = ((np.abs(x) / (a.width + 14)) ** 2.4 + (np.abs(y) / (a.depth + 18)) ** 2.4) < 1
        hu = np.full(inside.shape, AIR, dtype=np.float32)
        hu[np.broadcast_to(body, hu.shape)] = FAT_HU
        hu[np.broadcast_to(muscle, hu.shape)] = TISSUE_HU
        hu[np.broadcast_to(heart < 1, hu.shape) & (hu > -500)] = BLOOD_HU

        # Ribs slope downwards towards the front. Each rib is a band in a shell around the thoracic cavity.
        phase = (z - 0.35 * y + 200) % 27
        shell = (cavity > 1.06) & (cavity < 1.26) & (t > 0.02) & (t < 0.97) & (np.abs(x) > 16)
        hu[shell & (phase < 9)] = BONE_HU
        hu[np.broadcast_to(spine, hu.shape) & body] = 220.0
        sternum = (np.abs(x) < 14) & (np.abs(y + a.depth + 7) < 6) & (t > 0.15) & (t < 0.85)
        hu[sternum & body] = BONE_HU
        table = (y > a.depth + self.fat_adult + 24) & (y < a.depth + self.fat_adult + 31) & (np.abs(x) < a.width + 10)
        hu[np.broadcast_to(table, hu.shape)] = TABLE_HU

        # The lung is denser at the back.
        hu[inside] = LUNG_HU - self.anatomy.inflation + 0.25 * np.broadcast_to(y, hu.shape)[inside]
        self.hu = hu
        self._draw_vessels()
        self._draw_airways()

    # Compute each tube only inside the bounding box of its segment.
    def _measure_tube_distance(
        self, start: np.ndarray, end: np.ndarray, radius: float
    ) -> tuple[tuple[slice, ...], np.ndarray]:
        """Return the box of voxels around a tube segment, and each voxel's distance to the axis in tube radii."""
        a = self.anatomy
        turn, centre = rotation_matrix(a.rotation), np.array([0, 0, 130.0])
        reach = radius + 3 * self.spacing.max() / a.scale
        ends = np.stack([start, end])
        ends = (ends - centre) @ turn + centre  # from patient coordinates back to grid coordinates
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

    def _draw_vessels(self) -> None:
        """Draw vessel trees that branch from each hilum and taper towards the pleura."""
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
                box, ratio = self._measure_tube_distance(start, end, radius)
                # A vessel thinner than a voxel fills only part of the voxel.
                share = np.clip(1.0 - (ratio - 1) * radius / voxel, 0, 1) * min(1.0, (radius / voxel) ** 2 * 2)
                lung = self.lung[box] > 0
                self.hu[box] = np.where(
                    lung, np.maximum(self.hu[box], LUNG_HU + (BLOOD_HU - LUNG_HU) * share), self.hu[box]
                )
                if depth < 5 and radius > 0.6:
                    for _ in range(2):
                        turned = direction + rng.normal(0, 0.45, 3) + (side * 0.12, 0, 0)
                        queue.append((end, turned / np.linalg.norm(turned), radius * rng.uniform(0.62, 0.8), depth + 1))

    def _draw_airways(self) -> None:
        """Draw the trachea and main bronchi: air inside a wall, not labelled as lung."""
        a = self.anatomy
        carina = np.array([0.0, 5.0, 0.60 * a.height])
        tubes = [(np.array([0.0, -5.0, a.height + 60]), carina, 9.0)]
        for side in (-1, 1):
            tubes.append((carina, np.array([side * (a.mediastinum + 16), 2.0, 0.50 * a.height]), 7.0))
        for wall in (True, False):
            for start, end, radius in tubes:
                box, ratio = self._measure_tube_distance(start, end, radius)
                if wall:
                    thick = (ratio < 1 + 2.6 / radius) & (self.hu[box] > -990)
                    self.hu[box][thick] = TISSUE_HU
                    self.lung[box][thick] = 0
                else:
                    self.hu[box][ratio < 1] = AIR
