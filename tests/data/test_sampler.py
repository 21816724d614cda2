"""Test that every batch carries its location, and that ranks never draw the same samples."""

import multiprocessing
import signal
import subprocess
import time

import numpy as np
import pytest

from data import loader as loader_module
from data.dataset import PatchDataset
from data.layout import StoreError
from data.loader import make_loader
from data.locations import neighbor_table
from data.sampler import LocationBatchSampler
from data.store import PatchStore


def test_an_epoch_visits_each_location_in_turn_and_drops_the_rest():
    sampler = LocationBatchSampler(11, 4, 3, seed=0)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 4 * 3
    assert [b.location for b in batches] == sorted([0, 1, 2, 3] * 3)
    assert [b.step for b in batches] == [0, 1, 2] * 4
    for location in range(4):
        rows = np.concatenate([b.rows for b in batches if b.location == location])
        assert len(set(rows.tolist())) == 9


def test_order_depends_on_seed_epoch_and_location():
    def order(seed, epoch):
        sampler = LocationBatchSampler(50, 2, 50, seed)
        sampler.set_epoch(epoch)
        return [tuple(b.rows) for b in sampler]

    orders = [one for seed in (0, 1) for epoch in (0, 1) for one in order(seed, epoch)]
    assert len(set(orders)) == 8
    assert order(1, 1) == order(1, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_split_a_step_without_overlap(world):
    whole = list(LocationBatchSampler(20, 3, 8, seed=5))
    ranks = [list(LocationBatchSampler(20, 3, 8, 5, rank, world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        shares = [one[step] for one in ranks]
        assert {(s.epoch, s.location, s.step) for s in shares} == {(batch.epoch, batch.location, batch.step)}
        np.testing.assert_array_equal(np.concatenate([s.rows for s in shares]), batch.rows)


@pytest.mark.parametrize("skip", [0, 1, 2, 3, 7, 8])
def test_skipping_resumes_where_a_run_stopped(skip):
    sampler = LocationBatchSampler(6, 4, 3, seed=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, skip)
    rest = list(sampler)
    assert len(rest) == 8 - skip
    for a, b in zip(whole[skip:], rest):
        assert a[:3] == b[:3] and np.array_equal(a.rows, b.rows)


@pytest.mark.parametrize(
    ("subjects", "batch", "world", "message"),
    [
        (5, 6, 1, "exceeds the 5 subjects"),
        (9, 5, 2, "multiple of the number of ranks, 2"),
        (9, 4, 4, "gives a batch of 1 per rank"),
        (9, 1, 1, "gives a batch of 1 per rank"),
        (9, 0, 1, "--batch-size 0"),
    ],
)
def test_impossible_batches(subjects, batch, world, message):
    with pytest.raises(StoreError, match=message):
        LocationBatchSampler(subjects, 3, batch, 0, 0, world)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_loader_serves_the_right_location(tmp_path, make_store, grid, workers):
    patches = make_store(tmp_path, 7, grid)
    dataset = PatchDataset(PatchStore(tmp_path), 2)
    sampler = LocationBatchSampler(7, 6, 3, seed=2)
    near = neighbor_table(grid, 2)
    loader = make_loader(dataset, sampler, workers, pin_memory=False)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        wanted = list(sampler)
        count = 0
        for index, batch in zip(wanted, loader):
            assert (batch.epoch, batch.location, batch.step) == (epoch, index.location, index.step)
            np.testing.assert_array_equal(batch.patches.numpy(), patches[index.rows, index.location])
            for j in range(2):
                np.testing.assert_array_equal(
                    batch.neighbors[:, j].numpy(), patches[index.rows, near[index.location][j]]
                )
            count += 1
        assert count == 12


def start_worker():
    """Start a process that handles signals like a data-loader worker."""
    ready = multiprocessing.get_context("fork").Event()

    def work():
        loader_module.forward_signals_to_trainer(0)
        ready.set()
        time.sleep(30)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    assert ready.wait(10)
    return worker


def test_a_worker_survives_a_sigterm_for_a_limited_time(monkeypatch):
    """The worker passes the signal to the trainer, and ends after STOP_SECONDS even if the trainer never responds."""
    monkeypatch.setattr(loader_module, "STOP_SECONDS", 1)
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    worker = start_worker()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.join(10)
    signal.signal(signal.SIGTERM, before)
    assert worker.exitcode == 0 and asked == [signal.SIGTERM]


def test_a_worker_ended_by_its_trainer_ends_at_once():
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    worker = start_worker()
    loader_module.end_workers()
    worker.join(5)
    signal.signal(signal.SIGTERM, before)
    assert worker.exitcode == 0 and not asked


def test_interleaved_visits_are_short_and_cover_all():
    """Every (location, subject) pair occurs as often as in the published order.

    Each step at a location has the same subjects in the interleaved order as in the published order.
    """
    sequential = LocationBatchSampler(35, 3, 3, seed=4)
    interleaved = LocationBatchSampler(35, 3, 3, seed=4, order="interleaved")
    one, other = ({(i.location, i.step): i.rows.tolist() for i in sampler} for sampler in (sequential, interleaved))
    assert one == other and len(one) == 33
    places = [index.location for index in interleaved]
    assert places[:13] == [0] * 4 + [1] * 4 + [2] * 4 + [0] and places[-3:] == [2, 2, 2]
    interleaved.set_epoch(0, skip=14)
    assert [(i.location, i.step) for i in interleaved][:2] == [(0, 6), (0, 7)]
    interleaved.set_epoch(0, skip=0)
    assert len(list(interleaved)) == len(interleaved) == 33
