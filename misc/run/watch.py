"""A rank that hangs is noticed by the others, and named.

Ranks wait for each other in every step, so where one hangs all do, and none can say so from within the step. Beside
each, a thread tells the others which step it is at. One whose thread is not heard either has no living process; one
that is heard, but has not come to the step that the others wait in, hangs on its way there: mostly on its disk.
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
from misc.command import LOST, USER_ERROR, leave

Item = TypeVar("Item")
BEATS = 20  # in the time that ranks are patient
LONGEST_BEAT = 10.0  # seconds
SILENT_BEATS = 4  # after so many missed ones nobody is there


class Place(NamedTuple):
    """Where a rank was when it was last heard."""

    epoch: int  # from 1
    step: int
    host: str
    beat: int  # how often it was heard; another number is another sign of life


NEVER_HEARD = Place(0, 0, "not heard since the start", 0)


def who_hangs(places: Mapping[int, Place], silent: set[int]) -> str:
    """The ranks that others wait for, and why it is they, in words; places by rank.

    Where nobody is silent or behind, all are at one step, and what they wait for is not on these machines.
    """
    furthest = max((place.epoch, place.step) for place in places.values())
    behind = {rank for rank, place in places.items() if (place.epoch, place.step) < furthest}
    at = f"epoch {furthest[0]}, step {furthest[1]}"
    if not silent and not behind:
        return f"all ranks hang at {at}: a device or the network between them does not answer"
    chosen = sorted(silent or behind)
    names = ", ".join(f"{rank} ({places[rank].host})" for rank in chosen)
    first = places[chosen[0]]
    why = (
        "its process does not answer"
        if silent
        else f"it has not come from epoch {first.epoch}, step {first.step}: is its disk slow, or gone?"
    )
    return f"rank {names} hangs at {at}, {why}"


class Watch:
    """The thread of one rank.

    Args:
        store: shared by the ranks; set(key, text), get(key), check([key]).
        rank, world: this one's number, and how many there are.
        seconds: how long nothing may move.
    """

    def __init__(self, store: Any, rank: int, world: int, seconds: float):
        self.store, self.rank, self.world, self.seconds = store, rank, world, seconds
        self.pause = min(seconds / BEATS, LONGEST_BEAT)
        self.began = self.since = time.monotonic()
        self.at, self.beats = (0, 0), 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> beat, when it was new

    def move(self, epoch: int, step: int) -> None:
        """This rank has come to a step."""
        self.at, self.since = (epoch, step), time.monotonic()

    def look(self) -> str:
        """Tell the others where this rank is, hear them; what hangs, ``""`` while nothing does."""
        self.beats += 1
        own = Place(*self.at, socket.gethostname(), self.beats)
        self.store.set(f"watch-{self.rank}", json.dumps(own))
        now, places, silent = time.monotonic(), {self.rank: own}, set()
        for rank in set(range(self.world)) - {self.rank}:
            key = f"watch-{rank}"
            there = self.store.check([key])  # not before its first sign of life, which may never come
            places[rank] = Place(*json.loads(self.store.get(key))) if there else NEVER_HEARD
            beat, heard_at = self._heard.get(rank, (0, self.began))
            if places[rank].beat != beat:
                heard_at = now
            self._heard[rank] = places[rank].beat, heard_at
            if now - heard_at > max(SILENT_BEATS * self.pause, 2.0):
                silent.add(rank)
        return who_hangs(places, silent) if now - self.since > self.seconds else ""

    def run(self) -> None:
        """Until something hangs; then one rank tells, and this one ends."""
        while True:
            time.sleep(self.pause)
            with contextlib.suppress(RuntimeError):  # the store is gone: the run is ending
                if hangs := self.look():
                    break
        if self.store.add("watch-told", 1) == 1:
            minutes = f"{self.seconds / 60:g}"
            print(
                f"error: {hangs}; nothing moved for {minutes} minutes (--patience), go on with --resume auto",
                flush=True,
            )
            leave(USER_ERROR)
        time.sleep(1.0)
        leave(LOST)


_watch: list[Watch] = []


def watched(items: Iterable[Item], epoch: int, done: int, minutes: float) -> Iterator[Item]:
    """The items, a step each, telling the other ranks where this one is.

    Args:
        items: batches.
        epoch: 0 the first; done: its steps that were done before.
        minutes: how long nothing may move.
    """
    if process.world_size() > 1 and not _watch:
        store = dist.distributed_c10d._get_default_store()
        _watch.append(Watch(store, process.rank(), process.world_size(), 60 * minutes))
        threading.Thread(target=_watch[0].run, daemon=True).start()
    for step, item in enumerate(items, start=done + 1):
        for watch in _watch:
            watch.move(epoch + 1, step)
        yield item
