"""Reading ahead of need: in threads, or by the system."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
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


def will_need(paths: Iterable[str | os.PathLike]) -> None:
    """Ask the system to read files into the page cache; returns before it has, and does nothing on macOS.

    A batch's rows lie scattered over a file: read one by one from a cold disk they arrive more slowly.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as stream:  # the real read reports what is wrong with it
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
