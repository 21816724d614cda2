"""Test finding the hanging rank from the progress that each rank reports."""

import pytest

from misc.run.watch import Place, Watch, describe_hanging_ranks


class Store(dict):
    """A replacement for torch.distributed's key-value store within one process."""

    def set(self, key, text):
        self[key] = text

    def check(self, keys):
        return all(key in self for key in keys)


def place(step, host="a", beat=1, epoch=1):
    return Place(epoch, step, host, beat)


@pytest.mark.parametrize(
    ("steps", "silent", "words"),
    [
        ((8, 8, 8), {1}, "rank 1 (b) blocks the others at epoch 1, step 8, its process does not respond"),
        ((8, 8, 7), set(), "rank 2 (c) blocks the others at epoch 1, step 8, it is still at epoch 1, step 7"),
        ((8, 7, 7), {2}, "rank 2 (c) blocks the others at epoch 1, step 8, its process does not respond"),
        ((8, 8, 8), set(), "all ranks hang at epoch 1, step 8"),
        ((8, 7, 7), set(), "rank 1 (b), 2 (c) blocks the others at epoch 1, step 8"),
    ],
)
def test_who_hangs(steps, silent, words):
    places = {rank: place(step, host) for rank, (step, host) in enumerate(zip(steps, "abc"))}
    assert describe_hanging_ranks(places, silent).startswith(words)


def test_a_silent_rank_is_reported(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("misc.run.watch.time.monotonic", lambda: clock[0])
    store = Store()
    ranks = [Watch(store, rank, 3, 60.0) for rank in range(3)]
    for moment in range(4):
        for rank in ranks:
            rank.record_position(1, moment + 1)
            assert rank.publish_and_find_hanging_ranks() == ""
        clock[0] += 3.0
    for _ in range(25):  # rank 2 sends no heartbeats; after a minute, ranks 0 and 1 report rank 2
        clock[0] += 3.0
        said = [rank.publish_and_find_hanging_ranks() for rank in ranks[:2]]
    assert all(text.startswith("rank 2 (") and text.endswith("its process does not respond") for text in said)
    ranks[0].record_position(1, 5)
    assert ranks[0].publish_and_find_hanging_ranks() == ""


def test_a_rank_without_any_heartbeat_is_reported(monkeypatch):
    """A rank that stopped before its first heartbeat is reported as hanging."""
    clock = [100.0]
    monkeypatch.setattr("misc.run.watch.time.monotonic", lambda: clock[0])
    watch = Watch(Store(), 0, 2, 60.0)
    watch.record_position(1, 3)
    assert watch.publish_and_find_hanging_ranks() == ""
    clock[0] += 61.0
    assert (
        watch.publish_and_find_hanging_ranks()
        == "rank 1 (no heartbeat since the start) blocks the others at epoch 1, step 3, its process does not respond"
    )
