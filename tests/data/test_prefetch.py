"""Reading ahead in threads."""

import threading
import time

import pytest

from data.prefetch import read_ahead


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
