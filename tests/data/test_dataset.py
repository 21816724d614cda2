"""Test that batches from data-loader workers arrive even if /dev/shm is full, and that errors keep their message."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from data.dataset import PatchDataset
from data.layout import StoreError
from data.loader import iterate_batches, make_loader
from data.sampler import BatchIndex, LocationBatchSampler
from data.store import PatchStore

from ..conftest import ROOT


def loader_of(folder, workers=1):
    store = PatchStore(folder)
    sampler = LocationBatchSampler(store.num_subjects, store.num_locations, 2, 0)
    return make_loader(PatchDataset(store, 2), sampler, workers, pin_memory=False)


def raise_full(self):
    raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def test_batches_arrive_with_a_full_shared_memory(tmp_path, make_store, grid, monkeypatch):
    make_store(tmp_path, 4, grid)
    wanted, notes = list(iterate_batches(loader_of(tmp_path, 0))), []
    monkeypatch.setattr(torch.Tensor, "share_memory_", raise_full)  # workers are forked, so they use this replacement
    made = list(iterate_batches(loader_of(tmp_path), notes.append))
    assert len(made) == len(wanted) == 12 and len(notes) == 1 and "/dev/shm is full" in notes[0]
    for one, other in zip(made, wanted):
        assert one.location == other.location
        assert torch.equal(one.patches, other.patches) and torch.equal(one.neighbors, other.neighbors)


def test_a_workers_error_is_one_line(tmp_path, make_store, grid):
    make_store(tmp_path, 4, grid)
    loader = loader_of(tmp_path)
    for path in (tmp_path / "grouped_patch").iterdir():
        np.save(path, np.zeros(3))
    with pytest.raises(StoreError) as error:
        list(iterate_batches(loader))
    assert "has changed since this run opened the store" in str(error.value) and "\n" not in str(error.value)


def test_a_worker_ended_by_torch_does_not_stop_the_trainer(tmp_path, make_store, grid):
    """torch sends SIGTERM to a worker that exits slowly. The worker must not forward torch's SIGTERM to the trainer."""
    make_store(tmp_path, 4, grid)
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    found = iter(loader_of(tmp_path))
    next(found)
    worker = found._workers[0]
    worker.terminate()
    worker.join(10)
    signal.signal(signal.SIGTERM, before)
    assert worker.exitcode == 0 and not asked


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_trainer_ends_at_once(tmp_path, make_store, grid, workers):
    """Workers must end at once if the trainer fails.

    Normally, torch waits 5 s for each data-loader worker, and a worker may run for a minute after a stop signal.
    """
    make_store(tmp_path, 4, grid)
    code = (
        "import sys\nfrom data.loader import iterate_batches\nfrom tests.data.test_dataset import loader_of\n"
        f"from pathlib import Path\nfor batch in iterate_batches(loader_of(Path({str(tmp_path)!r}), {workers})):\n"
        "    print('read', flush=True)\n    raise SystemExit(3)\n"
    )
    call = [sys.executable, "-c", code]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "read\n"
        began = time.monotonic()
        assert process.wait(60) == 3 and time.monotonic() - began < 4


def test_neighbours_are_not_read_if_not_needed(tmp_path, make_store, grid, monkeypatch):
    patches, store, read = make_store(tmp_path, 4, grid), PatchStore(tmp_path), []
    monkeypatch.setattr(store, "read", lambda *given, way=store.read: read.append(given[0]) or way(*given))
    batch = PatchDataset(store, 0)[BatchIndex(0, 3, 0, np.array([2, 1]))]
    assert batch.neighbors is None and read == [3]
    assert np.array_equal(batch.patches.numpy(), patches[[2, 1], 3])
