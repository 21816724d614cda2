"""Data-loader workers: what they hand over, how they end, and what a signal to one of them means."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.dataset import PatchBatch
from data.sampler import BatchIndex, LocationBatchSampler
from misc.command import STOPPING, UserError, end_with_parent

STOP_SECONDS = 60


class _HandedOver(Dataset):
    """A dataset whose worker processes hand over batches in shared memory, and errors as they are.

    torch would wrap an error in a traceback.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: BatchIndex) -> PatchBatch | Exception:
        if get_worker_info() is None:
            return self.dataset[index]
        try:
            return _share(self.dataset[index])
        except (UserError, OSError, MemoryError) as error:
            return error


def _share(batch: PatchBatch) -> PatchBatch:
    """A batch in shared memory; as arrays for a pipe if that has no room left (a container has 64 MB).

    torch would share it in a thread of its own, where a full /dev/shm loses the batch, and training waits for ever.
    """
    try:
        return PatchBatch(*(x.share_memory_() if isinstance(x, torch.Tensor) else x for x in batch))
    except RuntimeError:
        return PatchBatch(*(x.numpy().copy() if isinstance(x, torch.Tensor) else x for x in batch))


def batches(loader: DataLoader, note: Callable[[str], Any] = print) -> Iterator[PatchBatch]:
    """A loader's batches.

    Args:
        loader: of :func:`make_loader`.
        note: prints a line, once, where batches come through pipes.

    Raises:
        UserError, OSError: of the data-loader workers, or one of them was ended from outside.
    """
    told = False
    try:
        reader = iter(loader)
        atexit.unregister(_end_reading)
        atexit.register(_end_reading)  # before torch's own, which it has registered now
        for batch in reader:
            if isinstance(batch, Exception):
                raise batch
            if any(isinstance(x, np.ndarray) for x in batch):
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
            f"a data-loader worker has ended ({str(error).splitlines()[0]}), usually because memory ran out: lower "
            "--workers, and go on with --resume auto"
        ) from error


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A signal to a data-loader worker is for the trainer, which saves before it stops; so is one for all of them.

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
    """When the process leaves after an error: torch would wait five seconds for each data-loader worker, in turn."""
    for child in multiprocessing.active_children():
        child.terminate()


def _as_it_is(batch: object) -> object:
    """torch's own way makes tensors of arrays, which then want shared memory again."""
    return batch


def make_loader(dataset: Dataset, sampler: LocationBatchSampler, workers: int, pin_memory: bool) -> DataLoader:
    """A loader whose every item is a whole batch, whatever the number of workers."""
    return DataLoader(
        _HandedOver(dataset),
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
