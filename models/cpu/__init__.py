"""The same numbers, faster on CPUs. The method does not need any of it.

Each function here either does its work or returns None, and the caller then takes the plain way, which
stands beside the call. All of it is switched off by the environment variable DRASCLR_CPU=plain, or for a
block of code by :func:`plain`, to find out whether a result hangs on it.
"""

import contextlib
import os
from collections.abc import Iterator

_off: list[bool] = [os.environ.get("DRASCLR_CPU", "") == "plain"]


def enabled() -> bool:
    """Whether the fast ways are taken."""
    return not _off[-1]


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """The plain ways only, within the block and in the threads that it starts."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()
