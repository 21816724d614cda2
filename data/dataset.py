"""Batches of raw patches with their neighbours, read from the store."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.locations import neighbor_table
from data.prefetch import will_need
from data.sampler import BatchIndex
from data.store import PatchStore


class PatchBatch(NamedTuple):
    """One step's input, in HU, before augmentation."""

    epoch: int
    location: int
    step: int
    patches: torch.Tensor  # (B, 32, 32, 32) int16, or float32 if the store is of floats
    neighbors: torch.Tensor | None = None  # (B, k, 32, 32, 32); None without the neighbour task
    subjects: torch.Tensor | None = None  # (B,) int64, rows of the store


class PatchDataset(Dataset):
    """Maps a :class:`BatchIndex` to its :class:`PatchBatch`.

    Args:
        store: grouped store.
        k_neighbors: neighbours of each location to read with it; 0 reads none.
    """

    def __init__(self, store: PatchStore, k_neighbors: int):
        self.store = store
        self.neighbors = neighbor_table(store.locations, k_neighbors)  # (L, k)
        self._location = -1

    def _prefetch_next(self, location: int) -> None:
        """Have the system read the files of the next location while this one is trained on."""
        following = location + 1
        if location != self._location and following < self.store.num_locations:
            needed = (following, *self.neighbors[following])
            will_need(self.store.layout.grouped(int(index)) for index in needed)
        self._location = location

    def __getitem__(self, index: BatchIndex) -> PatchBatch:
        self._prefetch_next(index.location)
        patches = self.store.read(index.location, index.rows)  # (B, 32, 32, 32)
        neighbors = [self.store.read(int(neighbor), index.rows) for neighbor in self.neighbors[index.location]]
        return PatchBatch(
            index.epoch,
            index.location,
            index.step,
            torch.from_numpy(np.ascontiguousarray(patches)),
            torch.from_numpy(np.stack(neighbors, axis=1)) if neighbors else None,  # (B, k, 32, 32, 32)
            torch.from_numpy(np.asarray(index.rows, dtype=np.int64)),
        )
