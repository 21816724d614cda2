"""Files of random patches for the measurements. Old commits use this module too, so it imports no project code."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np


class FileStore:
    """A folder with one file of random patches per location, with the interface of data.store.PatchStore.

    Args:
        folder: folder of the files; missing files are created.
        locations, subjects: number of locations and subjects.
        seed: random seed of the patches.
    """

    def __init__(self, folder: Path, locations: int, subjects: int, seed: int = 0):
        self.num_subjects, self.num_locations, self.grouped = subjects, locations, True
        self.sids = [f"{row:05d}" for row in range(subjects)]
        side = int(np.ceil(locations ** (1 / 3)))
        grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        self.locations = (grid * 26 + 5)[:locations]
        paths = [folder / f"{index}.npy" for index in range(locations)]
        self.layout = SimpleNamespace(grouped_patch_file=lambda location: paths[location])
        if not all(path.is_file() for path in paths):
            self._write_noise(paths, np.random.default_rng(seed))
        self._mapped = [np.load(path, mmap_mode="r") for path in paths]

    def _write_noise(self, paths: list[Path], rng: np.random.Generator) -> None:
        """Write smooth noise with mean -700 HU and SD 200 HU to each file.

        The files are not hard links to one file, because hard links would share the page cache.
        """
        from scipy import ndimage

        pool = ndimage.gaussian_filter(rng.normal(size=(32, 32, 2048)).astype(np.float32), 2)
        pool = np.clip(pool / pool.std() * 200 - 700, -1024, 240).astype(np.int16)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            starts = rng.integers(0, pool.shape[2] - 32, self.num_subjects)
            np.save(path, np.stack([pool[:, :, start : start + 32] for start in starts]))

    def read(self, location: int, rows: np.ndarray) -> np.ndarray:
        """Return the patches in some rows of a location's file, (n, 32, 32, 32) int16."""
        return np.asarray(self._mapped[location][rows])
