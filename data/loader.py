"""Data-loader workers: how they pass batches, handle signals and end."""

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
from misc.command import STOPPING, UserError, request_signal_on_parent_exit

STOP_SECONDS = 60


class SharedBatches(Dataset):
    """A dataset that moves the batches of data-loader workers to shared memory, and returns errors as objects.

    By default, torch would add a traceback to the error message.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: BatchIndex) -> PatchBatch | Exception:
        if get_worker_info() is None:
            return self.dataset[index]
        try:
            return move_batch_to_shared_memory(self.dataset[index])
        except (UserError, OSError, MemoryError) as error:
            return error


def move_batch_to_shared_memory(batch: PatchBatch) -> PatchBatch:
    """Move a batch to shared memory, or convert it to arrays for a pipe if shared memory is full.

    A Docker container has 64 MB of shared memory by default. By default, torch shares batches in a
    separate thread. If /dev/shm is full, torch's thread loses the batch and training waits forever.
    """
    try:
        return PatchBatch(*(x.share_memory_() if isinstance(x, torch.Tensor) else x for x in batch))
    except RuntimeError:
        return PatchBatch(*(x.numpy().copy() if isinstance(x, torch.Tensor) else x for x in batch))


def iterate_batches(loader: DataLoader, note: Callable[[str], Any] = print) -> Iterator[PatchBatch]:
    """Yield the batches of a loader.

    Args:
        loader: a loader from :func:`make_loader`.
        note: function that prints one line if batches are sent through pipes.

    Raises:
        UserError, OSError: an error that a data-loader worker passed on.
        UserError: a data-loader worker was killed.
    """
    told = False
    try:
        reader = iter(loader)
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # runs before torch's exit handler, which iter() registered earlier
        for batch in reader:
            if isinstance(batch, Exception):
                raise batch
            if any(isinstance(x, np.ndarray) for x in batch):
                if not told:
                    note(
                        "note: /dev/shm is full, so batches are sent through pipes, which is slower; start the "
                        "container with a larger --shm-size (default 64 MB) or with --ipc=host"
                    )
                    told = True
                batch = PatchBatch(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch))
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data-loader worker was killed ({str(error).splitlines()[0]}), usually because memory ran out; lower "
            "--workers and continue with --resume auto"
        ) from error


def forward_signals_to_trainer(worker: int) -> None:
    """Forward a stop signal from a data-loader worker to the trainer, which saves a checkpoint before it stops.

    The worker ends at most STOP_SECONDS after the signal, so that a failing trainer does not wait for the worker.
    The worker ends at once if the trainer itself sent the signal or if the trainer ends.
    """
    request_signal_on_parent_exit(signal.SIGKILL)
    trainer = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C, which also sends SIGINT to the workers
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not report the sender of a signal
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        return
    # Block the stop signals in all threads, so that wait_and_forward_signal() can receive each signal.
    # Do not use a signal handler, because a handler cannot determine which process sent the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)

    def wait_and_forward_signal() -> None:
        asked = signal.sigwaitinfo(heard)
        if asked.si_pid != trainer and os.getppid() == trainer:
            os.kill(trainer, asked.si_signo)
            until = time.monotonic() + STOP_SECONDS
            while (left := until - time.monotonic()) > 0:
                again = signal.sigtimedwait(heard, left)
                if again is None or again.si_pid == trainer:
                    break
        os._exit(0)

    threading.Thread(target=wait_and_forward_signal, daemon=True).start()


def end_workers() -> None:
    """End the data-loader workers at exit after an error; torch would wait five seconds for each worker in turn."""
    for child in multiprocessing.active_children():
        child.terminate()


def return_unchanged(batch: object) -> object:
    """Return a batch unchanged. torch's default_collate would turn arrays into tensors, which need shared memory."""
    return batch


def make_loader(dataset: Dataset, sampler: LocationBatchSampler, workers: int, pin_memory: bool) -> DataLoader:
    """Make a loader that yields whole batches, for any number of data-loader workers."""
    return DataLoader(
        SharedBatches(dataset),
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        collate_fn=return_unchanged,
        worker_init_fn=forward_signals_to_trainer,
        # torch draws seeds for the workers from this separate generator, although no code uses these seeds.
        # If torch drew worker seeds from the global random stream, a resumed run would shuffle its keys differently.
        generator=torch.Generator(),
    )
