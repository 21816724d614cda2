"""Reading ahead in threads."""

import os
import threading
import time

import numpy as np
import pytest

from data import prefetch
from data.dataset import PatchDataset
from data.prefetch import FileWarmer, read_ahead, warm
from data.sampler import BatchIndex
from data.store import PatchStore


def test_order_is_kept_whatever_the_threads_take():
    def read(job):
        time.sleep(0.02 if job % 3 == 0 else 0)
        return job * 10

    assert list(read_ahead(read, range(20))) == [(job, job * 10) for job in range(20)]
    assert list(read_ahead(read, [])) == []


def test_no_more_than_depth_is_held():
    started, used = [], 0
    for _, _ in read_ahead(lambda job: started.append(job), range(50), threads=2, depth=3):
        used += 1
        time.sleep(0.002)
        assert len(started) <= used + 3
    assert used == 50


def test_an_error_comes_at_its_turn_and_the_threads_end():
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


def test_warming_reads_what_is_not_cached_and_only_that(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(bytes(5 * prefetch.WARM_CHUNK + 10))
    on_disk = {1, 5}  # chunks, the last one short
    monkeypatch.setattr(prefetch, "is_cached", lambda _, offset: offset // prefetch.WARM_CHUNK not in on_disk)
    seen, original = [], os.preadv
    monkeypatch.setattr(
        os,
        "preadv",
        lambda fd, buffers, offset: seen.append(offset // prefetch.WARM_CHUNK) or original(fd, buffers, offset),
    )
    warm(path)
    assert seen == [1, 5]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not tell what is cached")
def test_a_file_just_written_is_cached(tmp_path):
    (tmp_path / "f").write_bytes(bytes(10000))
    with open(tmp_path / "f", "rb") as stream:
        assert prefetch.is_cached(stream.fileno(), 9999) and not prefetch.is_cached(stream.fileno(), 10000)


def test_the_warmer_takes_files_in_order_and_passes_over_missing_ones(tmp_path, monkeypatch):
    done, finished = [], threading.Event()

    def record(path):
        if path == "missing":
            raise FileNotFoundError(path)
        done.append(path)
        if path == "last":
            finished.set()

    monkeypatch.setattr(prefetch, "warm", record)
    warmer = FileWarmer()
    warmer(["a", "missing", "b"])
    warmer(["last"])
    assert finished.wait(10) and done == ["a", "b", "last"]


def test_each_location_warms_the_next_once(tmp_path, make_store, grid):
    make_store(tmp_path, 4, grid)
    dataset = PatchDataset(PatchStore(tmp_path), 2)
    asked = []
    dataset._warmer = asked.extend
    for location in (3, 3, 4, 5):
        dataset[BatchIndex(0, location, 0, np.array([0, 1]))]
    wanted = [index for following in (4, 5) for index in (following, *dataset.neighbors[following])]
    assert asked == [dataset.store.layout.grouped(int(index)) for index in wanted]
