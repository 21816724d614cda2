"""Reading ahead of need, in threads."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Job], Result], jobs: Iterable[Job], threads: int = 4, depth: int = 8
) -> Iterator[tuple[Job, Result]]:
    """(job, read(job)) in order, with up to ``depth`` results read or being read ahead.

    An error in ``read`` is raised at its job's turn; what was read ahead is dropped when the
    iteration is left early.
    """
    waiting = iter(jobs)
    with ThreadPoolExecutor(threads) as pool:
        pending = deque((job, pool.submit(read, job)) for job in islice(waiting, depth))
        try:
            while pending:
                job, future = pending.popleft()
                result = future.result()
                pending.extend((following, pool.submit(read, following)) for following in islice(waiting, 1))
                yield job, result
        finally:
            for _, future in pending:
                future.cancel()


# ---------------------------------------------------------------- the page cache

WARM_CHUNK = 2**20  # bytes


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether the byte at ``offset`` is in the page cache; False where the system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # BlockingIOError: it is on the disk
        return False


def warm(path: str | os.PathLike) -> None:
    """Read a file from start to end into the page cache, leaving out the parts that are there."""
    buffer = bytearray(WARM_CHUNK)
    with open(path, "rb", buffering=0) as stream:
        descriptor, size = stream.fileno(), os.fstat(stream.fileno()).st_size
        for start in range(0, size, WARM_CHUNK):
            end = min(start + WARM_CHUNK, size)
            if not all(is_cached(descriptor, offset) for offset in (start, (start + end) // 2, end - 1)):
                os.preadv(descriptor, [buffer], start)


class FileWarmer:
    """Warms files in a thread of its own, in the order in which they are given; returns at once.

    A batch's rows lie scattered over a file, and read one by one from a cold disk they come at half
    the speed of a reading from start to end. The thread starts with the first file, so that a worker
    process that was forked or spawned has its own.
    """

    def __init__(self):
        self._queue = None

    def __call__(self, paths: Iterable[str | os.PathLike]) -> None:
        if self._queue is None:
            self._queue = SimpleQueue()
            Thread(target=self._run, daemon=True).start()
        for path in paths:
            self._queue.put(path)

    def _run(self) -> None:
        while True:
            path = self._queue.get()
            with contextlib.suppress(OSError):  # whoever reads the file for good says what is wrong with it
                warm(path)
