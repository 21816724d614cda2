"""Make a patch store for timing."""

import os
from pathlib import Path

import numpy as np

from data.store import PatchStore
from misc.files import save_array, write_text

DISTINCT_FILES = 8  # number of different location files; the others are hard links to these files


def make_store(folder: Path, locations: int, subjects: int, seed: int = 0) -> PatchStore:
    """Make a grouped store of smooth random patches. Most location files are hard links to the first few files."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    side = int(np.ceil(locations ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:locations]
    save_array(folder / "atlas_patch_loc.npy", (grid * 26 + 5).astype(np.int64))
    write_text(folder / "subjects.csv", "sid\n" + "".join(f"{n:05d}\n" for n in range(subjects)))
    grouped = folder / "grouped_patch"
    for index in range(min(DISTINCT_FILES, locations)):
        noise = ndimage.gaussian_filter(rng.normal(size=(32, 32, 32 * 16)), 2)
        noise = noise / noise.std() * 200 - 700
        patches = [np.roll(noise, int(rng.integers(512)), axis=2)[:, :, :32] for _ in range(subjects)]
        save_array(grouped / f"patch_loc_{index}.npy", np.clip(patches, -1024, 240).astype(np.int16))
    for index in range(DISTINCT_FILES, locations):
        os.link(grouped / f"patch_loc_{index % DISTINCT_FILES}.npy", grouped / f"patch_loc_{index}.npy")
    return PatchStore(folder, require_grouped=True)
