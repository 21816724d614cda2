"""Batches of reading processes: handed over whatever room /dev/shm has, and their errors as they are."""

import os

import numpy as np
import pytest
import torch

from data import dataset as module
from data.dataset import PatchDataset, batches, make_loader
from data.layout import StoreError
from data.sampler import LocationBatchSampler
from data.store import PatchStore


def loader_of(folder, workers=1):
    store = PatchStore(folder)
    sampler = LocationBatchSampler(store.num_subjects, store.num_locations, 2, 0)
    return make_loader(PatchDataset(store, 2), sampler, workers, pin_memory=False)


def full(self):
    raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def test_a_full_shared_memory_is_gone_around(tmp_path, make_store, grid, monkeypatch):
    make_store(tmp_path, 4, grid)
    wanted, notes = list(batches(loader_of(tmp_path, 0))), []
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # workers are forked from this process
    made = list(batches(loader_of(tmp_path), notes.append))
    assert len(made) == len(wanted) == 12 and len(notes) == 1 and "/dev/shm is full" in notes[0]
    for one, other in zip(made, wanted):
        assert one.location == other.location
        assert torch.equal(one.patches, other.patches) and torch.equal(one.neighbors, other.neighbors)


def test_an_error_of_a_reading_process_is_one_sentence(tmp_path, make_store, grid):
    make_store(tmp_path, 4, grid)
    loader = loader_of(tmp_path)
    for path in (tmp_path / "grouped_patch").iterdir():
        np.save(path, np.zeros(3))
    with pytest.raises(StoreError) as error:
        list(batches(loader))
    assert "has changed since this run opened the store" in str(error.value) and "\n" not in str(error.value)
    assert module.STOP_SECONDS > 0


def test_a_worker_that_torch_ends_asks_nobody_to_stop(tmp_path, make_store, grid, monkeypatch):
    """torch sends SIGTERM to one that is slow to leave; passed on, it would end the trainer itself."""
    make_store(tmp_path, 4, grid)
    trainer, kill = os.getpid(), os.kill

    def ask(*call):
        (tmp_path / "asked").touch() if os.getpid() != trainer else kill(*call)

    with monkeypatch.context() as patch:  # of the worker, which is forked
        patch.setattr(module.os, "kill", ask)
        found = iter(loader_of(tmp_path))
        next(found)
    worker = found._workers[0]
    found._workers_done_event.set()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0 and not (tmp_path / "asked").exists()
