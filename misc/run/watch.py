"""Detect hanging ranks and report their numbers.

Ranks wait for each other in every step, so one hanging rank blocks all ranks, and no rank can report the problem from
within the step. A thread of each rank therefore publishes the rank's current step at regular intervals, as a
heartbeat. If a rank stops publishing its step, its process counts as unresponsive. A rank that still publishes its step
but is behind the other ranks is hanging, usually while it reads from its disk.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from misc import process
from misc.command import LOST, USER_ERROR, exit_at_once

Item = TypeVar("Item")
BEATS = 20  # minimum number of heartbeats that a rank sends within --patience minutes
LONGEST_BEAT = 10.0  # longest time between two heartbeats, in seconds
SILENT_BEATS = 4  # a rank counts as dead after this many missed heartbeats


class Place(NamedTuple):
    """The step of a rank at its last heartbeat."""

    epoch: int  # counted from 1
    step: int
    host: str
    beat: int  # number of heartbeats so far


NEVER_HEARD = Place(0, 0, "no heartbeat since the start", 0)


def describe_hanging_ranks(places: Mapping[int, Place], silent: set[int]) -> str:
    """Describe which ranks the others wait for, and why.

    If no rank is silent and all ranks are at the same step, a device or the network does not respond.

    Args:
        places: the last known step of each rank.
        silent: ranks without a recent heartbeat.
    """
    furthest = max((place.epoch, place.step) for place in places.values())
    behind = {rank for rank, place in places.items() if (place.epoch, place.step) < furthest}
    at = f"epoch {furthest[0]}, step {furthest[1]}"
    if not silent and not behind:
        return f"all ranks hang at {at}, because a device or the network between them does not respond"
    chosen = sorted(silent or behind)
    names = ", ".join(f"{rank} ({places[rank].host})" for rank in chosen)
    first = places[chosen[0]]
    why = (
        "its process does not respond"
        if silent
        else f"it is still at epoch {first.epoch}, step {first.step}, perhaps because its disk is slow or gone"
    )
    return f"rank {names} blocks the others at {at}, {why}"


class Watch:
    """The thread of one rank that watches all ranks.

    Args:
        key_value_store: key-value store shared by the ranks, with the methods set, get, check and add.
        rank, world_size: number of this rank, and number of ranks.
        timeout_seconds: seconds without a new step after which a rank counts as hanging.
    """

    def __init__(self, key_value_store: Any, rank: int, world_size: int, timeout_seconds: float):
        self.store, self.rank, self.world, self.seconds = key_value_store, rank, world_size, timeout_seconds
        self.pause = min(timeout_seconds / BEATS, LONGEST_BEAT)
        self.began = self.since = time.monotonic()
        self.at, self.beats = (0, 0), 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (number of its latest heartbeat, time of arrival)

    def record_position(self, epoch: int, step: int) -> None:
        """Record that this rank has reached a step."""
        self.at, self.since = (epoch, step), time.monotonic()

    def publish_and_find_hanging_ranks(self) -> str:
        """Publish the step of this rank, and read the steps of the other ranks.

        Return a description of what hangs, or an empty string.
        """
        self.beats += 1
        own = Place(*self.at, socket.gethostname(), self.beats)
        self.store.set(f"watch-{self.rank}", json.dumps(own))
        now, places, silent = time.monotonic(), {self.rank: own}, set()
        for rank in set(range(self.world)) - {self.rank}:
            key = f"watch-{rank}"
            there = self.store.check([key])  # reading a missing key would block, perhaps forever
            places[rank] = Place(*json.loads(self.store.get(key))) if there else NEVER_HEARD
            beat, heard_at = self._heard.get(rank, (0, self.began))
            if places[rank].beat != beat:
                heard_at = now
            self._heard[rank] = places[rank].beat, heard_at
            if now - heard_at > max(SILENT_BEATS * self.pause, 2.0):
                silent.add(rank)
        return describe_hanging_ranks(places, silent) if now - self.since > self.seconds else ""

    def watch_until_hang(self) -> None:
        """Watch until a rank hangs, let one rank print the reason, and end this process."""
        while True:
            time.sleep(self.pause)
            with contextlib.suppress(RuntimeError):  # the key-value store no longer exists if the run is ending
                if hangs := self.publish_and_find_hanging_ranks():
                    break
        if self.store.add("watch-told", 1) == 1:
            minutes = f"{self.seconds / 60:g}"
            print(
                f"error: {hangs}; no progress for {minutes} minutes (--patience), continue with --resume auto",
                flush=True,
            )
            exit_at_once(USER_ERROR)
        time.sleep(1.0)
        exit_at_once(LOST)


_watch: list[Watch] = []


def watch_steps(items: Iterable[Item], epoch: int, steps_done: int, timeout_minutes: float) -> Iterator[Item]:
    """Yield the items, one per step, and publish the step of this rank to the others.

    Args:
        items: batches.
        epoch: current epoch, counted from 0.
        steps_done: number of steps of this epoch that are already finished.
        timeout_minutes: minutes without a new step after which a rank counts as hanging.
    """
    if process.world_size() > 1 and not _watch:
        store = dist.distributed_c10d._get_default_store()
        _watch.append(Watch(store, process.rank(), process.world_size(), 60 * timeout_minutes))
        threading.Thread(target=_watch[0].watch_until_hang, daemon=True).start()
    for step, item in enumerate(items, start=steps_done + 1):
        for watch in _watch:
            watch.record_position(epoch + 1, step)
        yield item
