"""Test reading ahead with threads."""

import os
import threading
import time

import numpy as np
import pytest

from data import dataset as dataset_module
from data import prefetch
from data.dataset import PatchDataset
from data.prefetch import prefetch_files, read_ahead
from data.sampler import BatchIndex
from data.store import PatchStore


def test_order_is_kept_with_slow_threads():
    def read(job):
        time.sleep(0.02 if job % 3 == 0 else 0)
        return job * 10

    assert list(read_ahead(read, range(20))) == [(job, job * 10) for job in range(20)]
    assert list(read_ahead(read, [])) == []


def test_at_most_depth_items_are_held():
    started, used = [], 0
    for _, _ in read_ahead(lambda job: started.append(job), range(50), threads=2, depth=3):
        used += 1
        time.sleep(0.002)
        assert len(started) <= used + 3
    assert used == 50


def test_an_error_is_raised_in_order_and_the_threads_end():
    def read(job):
        if job == 4:
            raise OSError("disk")
        return job

    seen = []
    with pytest.raises(OSError, match="disk"):
        for job, _ in read_ahead(read, range(100)):
            seen.append(job)
    assert seen == [0, 1, 2, 3]
    before = threading.active_count()
    for _ in read_ahead(read, range(4)):
        break
    assert threading.active_count() <= before


def test_files_are_requested_in_order_and_missing_ones_skipped(tmp_path, monkeypatch):
    for name, size in (("a", prefetch.PIECE + 1), ("b", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    asked, done = [], threading.Event()

    def advise(descriptor, start, length, advice):
        asked.append((start, length, advice))
        if len(asked) == 3:
            done.set()

    monkeypatch.setattr(os, "posix_fadvise", advise)
    prefetch_files(tmp_path / name for name in ("a", "missing", "b"))
    assert done.wait(10)
    assert asked == [(start, prefetch.PIECE, os.POSIX_FADV_WILLNEED) for start in (0, prefetch.PIECE, 0)]
    monkeypatch.delattr(os, "posix_fadvise")  # macOS has no posix_fadvise
    prefetch.prefetch_each_file([tmp_path / "a"])


def test_each_location_prefetches_the_next_once(tmp_path, make_store, grid, monkeypatch):
    make_store(tmp_path, 4, grid)
    dataset = PatchDataset(PatchStore(tmp_path), 2)
    asked = []
    monkeypatch.setattr(dataset_module, "prefetch_files", asked.extend)
    for location in (3, 3, 4, 5):
        dataset[BatchIndex(0, location, 0, np.array([0, 1]))]
    wanted = [index for following in (4, 5) for index in (following, *dataset.neighbors[following])]
    assert asked == [dataset.store.layout.grouped_patch_file(int(index)) for index in wanted]
