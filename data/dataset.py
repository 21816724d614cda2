"""Batches of raw patches with their neighbours, read from the store."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.locations import neighbor_table
from data.prefetch import prefetch_files
from data.sampler import BatchIndex
from data.store import PatchStore

Draw = Callable[[BatchIndex, bool], torch.Tensor]


class PatchBatch(NamedTuple):
    """Input of one step in HU, before augmentation."""

    epoch: int
    location: int
    step: int
    patches: torch.Tensor | None  # (B, 32, 32, 32) int16, or float32 if the store holds floats; None if not read
    neighbors: torch.Tensor | None = None  # (B, k, 32, 32, 32); None without the neighbour task
    subjects: torch.Tensor | None = None  # (B,) int64, row numbers in the store
    draws: torch.Tensor | None = None  # (2 or 3, B, W) float32, from data.views.StepDraws


class PatchDataset(Dataset):
    """Maps a :class:`BatchIndex` to its :class:`PatchBatch`.

    Args:
        store: grouped store.
        k_neighbors: number of neighbouring locations to read with each location; 0 reads none.
        draw: function that draws the transform parameters; its arguments are the index and whether neighbours are used.
        read_patches: if False, batches have no patches, for example because the patches are already on the device.
    """

    def __init__(self, store: PatchStore, k_neighbors: int, draw: Draw | None = None, read_patches: bool = True):
        self.store, self.draw, self.read = store, draw, read_patches
        self.neighbors = neighbor_table(store.locations, k_neighbors)  # (L, k)
        self._location = -1

    def _prefetch_next(self, location: int) -> None:
        """Ask the operating system to read the next location's files while training uses the current location."""
        following = location + 1
        if location != self._location and following < self.store.num_locations:
            needed = (following, *self.neighbors[following])
            prefetch_files(self.store.layout.grouped_patch_file(int(index)) for index in needed)
        self._location = location

    def __getitem__(self, index: BatchIndex) -> PatchBatch:
        patches = neighbors = None
        if self.read:
            self._prefetch_next(index.location)
            patches = torch.from_numpy(np.ascontiguousarray(self.store.read(index.location, index.rows)))
            near = [self.store.read(int(neighbor), index.rows) for neighbor in self.neighbors[index.location]]
            neighbors = torch.from_numpy(np.stack(near, axis=1)) if near else None  # (B, k, 32, 32, 32)
        return PatchBatch(
            index.epoch,
            index.location,
            index.step,
            patches,
            neighbors,
            torch.from_numpy(np.asarray(index.rows, dtype=np.int64)),
            None if self.draw is None else self.draw(index, self.neighbors.shape[1] > 0),
        )
