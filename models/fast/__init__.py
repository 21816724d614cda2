"""Fast paths: the same numbers as the plain code, computed faster. The fast paths are optional.

Effect of each fast path by itself, measured on 2 cores with AVX2 and with batches of 32:

- norm_elu_cpu (BatchNorm with ELU) makes a training step 1.24 times as fast.
- pairs (two voxels at a time) makes a training step 1.31 times as fast, and extraction 1.10 times as fast.
- memory (glibc keeps freed memory) makes a training step 1.14 times as fast, and extraction 1.2 times as fast.
- groups (BatchNorm groups in parallel) makes a training step 1.26 times as fast.
- fused and pieces (convolution and ELU in one pass) make extraction 1.07 times as fast, or 1.7 times as fast
  with AVX-512.

The fast paths for GPUs (norm_elu_gpu, graph) were tested on a CPU, with interpreted kernels, and not yet timed.

If a fast path does not apply, its function returns None, and the caller runs the plain code instead.
The environment variable DRASCLR_FAST=off switches all fast paths off, and :func:`disable_fast_paths` does so for a
block of code.
To check whether a result depends on a fast path, compute the result again with all fast paths off.
"""

import contextlib
import os
from collections.abc import Iterator

_off: list[bool] = [os.environ.get("DRASCLR_FAST", "").lower() not in ("", "on", "1")]


def is_enabled() -> bool:
    """Return whether the fast paths are switched on."""
    return not _off[-1]


@contextlib.contextmanager
def disable_fast_paths() -> Iterator[None]:
    """Switch the fast paths off in a block of code, including all threads that it starts."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()
