"""Reading ahead of need, in threads: for work that has no batches to shuffle or to collate."""

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
