"""Density and histogram baselines: features of the same patches without a network."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data.augment import Augmentation
from data.store import PatchStore
from misc.progress import progress_bar
from misc.sizes import HU_MAX, HU_MIN

BINS = 32  # histogram bins of equal width over [-1024, 240] HU
EMPHYSEMA_HU = -950  # the clinical threshold for emphysema
PARENCHYMA_HU = -500  # HU; lung tissue lies below this value, chest wall and heart above
SMOOTHING = 1.0  # sigma in voxels; smoothing reduces noise; on phantoms, a sigma of 2 or 3 gave worse predictions
ROWS_AT_ONCE = 64


def count_voxels_per_hu_bin(patch: np.ndarray) -> np.ndarray:
    """Count the voxels of a patch (HU) in each histogram bin, (BINS,)."""
    return np.histogram(np.clip(patch, HU_MIN, HU_MAX), BINS, (HU_MIN, HU_MAX))[0]


def count_voxels_by_density(patch: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return the histogram (BINS,) of a patch in HU, and its numbers of voxels below -950 HU and below -500 HU."""
    return (
        count_voxels_per_hu_bin(patch),
        np.count_nonzero(patch < EMPHYSEMA_HU),
        np.count_nonzero(patch < PARENCHYMA_HU),
    )


def smooth_patches(patches: np.ndarray) -> np.ndarray:
    """Smooth patches (n, 32, 32, 32) in HU with a Gaussian of SD SMOOTHING voxels, as augmentation ``s`` does."""
    volumes = torch.from_numpy(np.clip(patches, HU_MIN, HU_MAX).astype(np.float32))
    sigma = torch.full((1, 3), SMOOTHING, dtype=torch.float64)
    (bands,) = Augmentation("s").prepare_parameters([{"sigma": sigma}], volumes.shape[1:])
    along_z, along_y, along_x = (bands[f"band{axis}"][0].float() for axis in range(3))  # (32, 32) each
    volumes = (along_z @ volumes.flatten(2)).view_as(volumes)
    return (along_y @ volumes @ along_x.T).numpy()


class Counts(NamedTuple):
    """Voxel counts of the patches of N subjects at L locations."""

    histogram: np.ndarray  # (N, L, BINS)
    smoothed: np.ndarray  # (N, BINS) histogram over all patches after smoothing
    low: np.ndarray  # (N, L) number of voxels below -950 HU
    lung: np.ndarray  # (N, L) number of voxels below -500 HU


def count_store_voxels(store: PatchStore, no_progress: bool = False, smoothed: bool = True) -> Counts:
    """Count the voxels of every patch of a store by their HU.

    Smoothing takes most of the computing time. Without ``smoothed``, the patches are not smoothed and
    ``Counts.smoothed`` is 0.
    """
    shape = (store.num_subjects, store.num_locations)
    sizes = ((*shape, BINS), (shape[0], BINS), shape, shape)
    counts = Counts(*(np.zeros(size, dtype=np.int64) for size in sizes))
    bar = progress_bar(no_progress, total=store.num_locations, desc="baselines", unit="location")
    with bar:
        for location in range(store.num_locations):
            for start in range(0, store.num_subjects, ROWS_AT_ONCE):
                rows = np.arange(start, min(start + ROWS_AT_ONCE, store.num_subjects))
                patches = store.read(location, rows)
                for row, patch in zip(rows, patches):
                    counts.histogram[row, location], low, lung = count_voxels_by_density(patch)
                    counts.low[row, location], counts.lung[row, location] = low, lung
                for row, patch in zip(rows, smooth_patches(patches) if smoothed else ()):
                    counts.smoothed[row] += count_voxels_per_hu_bin(patch)
            bar.update()
    return counts


def make_baseline_tables(
    store: PatchStore, no_progress: bool = False, smoothed: bool = True
) -> dict[str, pd.DataFrame]:
    """Return the baseline tables, indexed by sid. Baselines are evaluated in the same way as features.

    Returns:
        density: share of the lung below -950 HU, one number per subject.
        density_by_location: share of the lung below -950 HU in each patch.
        histogram: 32 bins over all patches of a subject.
        histogram_smoothed: histogram after smoothing with a Gaussian of SD 1 voxel; missing if ``smoothed`` is False.
        histogram_by_location: 32 bins for each patch.
    """
    histogram, of_smoothed, low, lung = count_store_voxels(store, no_progress, smoothed)
    voxels = histogram.sum(axis=2, keepdims=True)
    columns = {
        "density": (low.sum(1) / np.maximum(1, lung.sum(1)))[:, None],  # (N, 1)
        "density_by_location": low / np.maximum(1, lung),  # (N, L)
        "histogram": histogram.sum(1) / voxels.sum(1),  # (N, BINS)
        "histogram_smoothed": of_smoothed / voxels.sum(1),  # (N, BINS)
        "histogram_by_location": (histogram / voxels).reshape(len(histogram), -1),  # (N, L BINS)
    }
    if not smoothed:
        del columns["histogram_smoothed"]
    return {name: pd.DataFrame(values, index=store.sids) for name, values in columns.items()}
