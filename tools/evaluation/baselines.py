"""What a density reading says of the same patches: features that need no network."""

import numpy as np
import pandas as pd

from data.store import PatchStore
from misc.progress import progress_bar
from misc.sizes import HU_MAX, HU_MIN

BINS = 32  # of the histograms, over [-1024, 240] HU
EDGES = np.linspace(HU_MIN, HU_MAX, BINS + 1)
EMPHYSEMA_HU = -950  # the clinic's threshold
PARENCHYMA_HU = -500  # lung is below, chest wall and heart above
ROWS_AT_ONCE = 64


def counts_of(patch: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Voxels of a patch, in HU: a histogram (BINS,), those below -950 and those below -500 HU."""
    histogram = np.histogram(np.clip(patch, HU_MIN, HU_MAX), EDGES)[0]
    return histogram, np.count_nonzero(patch < EMPHYSEMA_HU), np.count_nonzero(patch < PARENCHYMA_HU)


def density_counts(store: PatchStore, no_progress: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of every patch: a histogram (N, L, BINS), those below -950 HU and those below -500 HU (N, L)."""
    shape = (store.num_subjects, store.num_locations)
    histogram = np.zeros((*shape, BINS), dtype=np.int64)
    low, lung = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    bar = progress_bar(no_progress, total=store.num_locations, desc="baselines", unit="location")
    with bar:
        for location in range(store.num_locations):
            for start in range(0, store.num_subjects, ROWS_AT_ONCE):
                rows = np.arange(start, min(start + ROWS_AT_ONCE, store.num_subjects))
                for row, patch in zip(rows, store.read(location, rows)):
                    histogram[row, location], low[row, location], lung[row, location] = counts_of(patch)
            bar.update()
    return histogram, low, lung


def baseline_tables(store: PatchStore, no_progress: bool = False) -> dict[str, pd.DataFrame]:
    """Tables by sid, for the same regression as the features.

    density: share of the lung below -950 HU, one number; density_by_location: the same in each patch; histogram: 32
    bins over all patches; histogram_by_location: of each patch.
    """
    histogram, low, lung = density_counts(store, no_progress)
    voxels = histogram.sum(axis=2, keepdims=True)
    columns = {
        "density": (low.sum(1) / np.maximum(1, lung.sum(1)))[:, None],  # (N, 1)
        "density_by_location": low / np.maximum(1, lung),  # (N, L)
        "histogram": histogram.sum(1) / voxels.sum(1),  # (N, BINS)
        "histogram_by_location": (histogram / voxels).reshape(len(histogram), -1),  # (N, L BINS)
    }
    return {name: pd.DataFrame(values, index=store.sids) for name, values in columns.items()}
