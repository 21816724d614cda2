"""Batches of raw patches with their neighbours, read by worker processes."""

import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.locations import neighbor_table
from data.prefetch import FileWarmer
from data.sampler import BatchIndex, LocationBatchSampler
from data.store import PatchStore

STOP_SECONDS = 60


class PatchBatch(NamedTuple):
    """One step's input, in HU, before augmentation."""

    epoch: int
    location: int
    step: int
    patches: torch.Tensor  # (B, 32, 32, 32) int16, or float32 where the store is of floats
    neighbors: torch.Tensor  # (B, k, 32, 32, 32)
    subjects: torch.Tensor | None = None  # (B,) int64, rows of the store


class PatchDataset(Dataset):
    """Maps a :class:`BatchIndex` to its :class:`PatchBatch`.

    Args:
        store: grouped store.
        k_neighbors: neighbours of each location to read with it.
    """

    def __init__(self, store: PatchStore, k_neighbors: int):
        self.store = store
        self.neighbors = neighbor_table(store.locations, k_neighbors)
        self._warmer = FileWarmer()
        self._location = -1

    def _warm_next(self, location: int) -> None:
        """Bring the files that the next location needs into the page cache while this one is trained on."""
        following = location + 1
        if location != self._location and following < self.store.num_locations:
            needed = (following, *self.neighbors[following])
            self._warmer(self.store.layout.grouped(int(index)) for index in needed)
        self._location = location

    def __getitem__(self, index: BatchIndex) -> PatchBatch:
        self._warm_next(index.location)
        patches = self.store.read(index.location, index.rows)
        neighbors = [self.store.read(int(neighbor), index.rows) for neighbor in self.neighbors[index.location]]
        return PatchBatch(
            index.epoch,
            index.location,
            index.step,
            torch.from_numpy(np.ascontiguousarray(patches)),
            torch.from_numpy(np.stack(neighbors, axis=1)),
            torch.from_numpy(np.asarray(index.rows, dtype=np.int64)),
        )


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A signal for the whole process group must not end the workers before the trainer has saved.

    They end STOP_SECONDS after a SIGTERM all the same, or a trainer that fails would wait for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STOP_SECONDS))


def make_loader(dataset: PatchDataset, sampler: LocationBatchSampler, workers: int, pin_memory: bool) -> DataLoader:
    """A loader whose every item is a whole batch, whatever the number of workers."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        worker_init_fn=_leave_stopping_to_the_trainer,
        # Its own, for the workers' seeds, which nothing uses: an iterator started anew after a stop
        # must not advance the process's stream, or a resumed run would shuffle its keys differently.
        generator=torch.Generator(),
    )
