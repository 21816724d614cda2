"""Fast paths: the same numbers as the plain code, computed faster. The fast paths are optional.

Speed-up factor of each fast path by itself, on 2 cores with AVX2 and with batches of 32:

- norm_elu_cpu (BatchNorm with ELU): 1.24 in a training step.
- pairs (voxel pairs): 1.31 in a step, 1.10 in extraction.
- memory (glibc keeps freed memory): 1.14 in a step, 1.2 in extraction.
- groups (BatchNorm groups in parallel): 1.26 in a step.
- fused and pieces (convolution and ELU in one pass): 1.07 in extraction; 1.7 with AVX-512.

The fast paths for GPUs (norm_elu_gpu, graph) are tested but have not been timed.

If a fast path does not apply, its function returns None, and the caller runs the plain code instead.
The environment variable DRASCLR_FAST=off switches all fast paths off, and :func:`plain` does so for a block of code.
Use either of these switches to check whether a result depends on a fast path.
"""

import contextlib
import os
from collections.abc import Iterator

_off: list[bool] = [os.environ.get("DRASCLR_FAST", "").lower() not in ("", "on", "1")]


def enabled() -> bool:
    """Return whether the fast paths are switched on."""
    return not _off[-1]


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Switch the fast paths off in a block of code, including all threads that it starts."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()
