"""Batches of raw patches with their neighbours, read by worker processes."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.locations import neighbor_table
from data.prefetch import FileWarmer
from data.sampler import BatchIndex, LocationBatchSampler
from data.store import PatchStore
from misc.command import STOPPING, UserError
from misc.process import end_with_parent

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

    def __getitem__(self, index: BatchIndex) -> "PatchBatch | Exception":
        """The batch. A reading process hands an error over as it is: torch would wrap it in a traceback."""
        if get_worker_info() is None:
            return self._read(index)
        try:
            return _handed_over(self._read(index))
        except (UserError, OSError, MemoryError) as error:
            return error

    def _read(self, index: BatchIndex) -> PatchBatch:
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


def _handed_over(batch: PatchBatch) -> PatchBatch:
    """A batch in shared memory, or, where that has no room left (64 MB in a container), as arrays for a pipe.

    torch would share it in a thread of its own, where a full /dev/shm loses the batch, and training waits for ever.
    """
    try:
        return PatchBatch(*(x.share_memory_() if isinstance(x, torch.Tensor) else x for x in batch))
    except RuntimeError:
        return PatchBatch(*(x.numpy().copy() if isinstance(x, torch.Tensor) else x for x in batch))


def batches(loader: DataLoader, note=print) -> Iterator[PatchBatch]:
    """A loader's batches.

    Args:
        loader: of :func:`make_loader`.
        note: prints a line, once, where batches come through pipes.

    Raises:
        UserError, OSError: of the reading processes, or one of them was ended from outside.
    """
    told = False
    try:
        reader = iter(loader)
        atexit.unregister(_end_reading)
        atexit.register(_end_reading)  # before torch's own, which it has registered now
        for batch in reader:
            if isinstance(batch, Exception):
                raise batch
            if isinstance(batch.patches, np.ndarray):
                if not told:
                    note(
                        "note: /dev/shm is full, batches come through pipes, which is slower; a container has 64 MB "
                        "unless it is started with --shm-size (or --ipc=host)"
                    )
                    told = True
                batch = PatchBatch(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch))
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a reading process has ended ({str(error).splitlines()[0]}), mostly for want of memory: lower --workers, "
            "and go on with --resume auto"
        ) from error


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A signal to a reading process is for the trainer, which saves before it stops; so is one for all of them.

    They end STOP_SECONDS after it all the same, or a trainer that fails would wait for them; at once when it is the
    trainer that ends them; and with the trainer.
    """
    end_with_parent(signal.SIGKILL)
    trainer = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    if not hasattr(signal, "sigwaitinfo"):  # macOS: who sends is not told
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)  # of the threads to come too: a handler is not told who sends

    def listen() -> None:
        asked = signal.sigwaitinfo(heard)
        if asked.si_pid != trainer and os.getppid() == trainer:
            os.kill(trainer, asked.si_signo)
            until = time.monotonic() + STOP_SECONDS
            while (left := until - time.monotonic()) > 0:
                again = signal.sigtimedwait(heard, left)
                if again is None or again.si_pid == trainer:
                    break
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _end_reading() -> None:
    """When the process leaves after an error: torch would wait five seconds for each reading process, in turn."""
    for child in multiprocessing.active_children():
        child.terminate()


def _as_it_is(batch: object) -> object:
    """torch's own way makes tensors of arrays, which then want shared memory again."""
    return batch


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
        collate_fn=_as_it_is,
        worker_init_fn=_leave_stopping_to_the_trainer,
        # Its own, for the workers' seeds, which nothing uses: an iterator started anew after a stop
        # must not advance the process's stream, or a resumed run would shuffle its keys differently.
        generator=torch.Generator(),
    )
