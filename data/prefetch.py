"""Read files in advance, in threads or through the operating system."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from threading import Thread
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Job], Result], jobs: Iterable[Job], threads: int = 4, depth: int = 8
) -> Iterator[tuple[Job, Result]]:
    """Yield (job, read(job)) in order, while threads read up to ``depth`` results ahead.

    An error in ``read(job)`` is raised when the result of this job would be yielded.
    If the iteration stops early, pending reads are cancelled.
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


PIECE = 2**17  # bytes; Linux shortens longer requests to the read-ahead size of the disk


def prefetch_files(paths: Iterable[str | os.PathLike]) -> None:
    """Ask the operating system to read whole files into the page cache, and return at once.

    The rows of a batch are scattered over a file. On a disk of 0.3 GB/s with a cold cache, reading a quarter of the
    rows of four 67 MB files takes 240 to 310 ms. Calling this function 1.5 s before reading reduces the reading
    time to 41 ms. On macOS, this function does nothing.
    """
    # Send the read requests from a separate thread, because they block while the disk's queue is full.
    Thread(target=prefetch_each_file, args=(list(paths),), daemon=True).start()


def prefetch_each_file(paths: list[str | os.PathLike]) -> None:
    for path in paths:
        # Ignore errors here, because they appear again when the file is read later.
        with contextlib.suppress(OSError, AttributeError), open(path, "rb") as stream:
            for start in range(0, os.fstat(stream.fileno()).st_size, PIECE):
                os.posix_fadvise(stream.fileno(), start, PIECE, os.POSIX_FADV_WILLNEED)
