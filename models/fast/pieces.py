"""Encode a batch in pieces of equal size, in parallel on the CPU cores."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from models import fast

# Number of patches per piece. A layer's output for one piece takes at most tens of MB.
# The piece size is fixed, because oneDNN compiles the fused convolution and ELU separately for each batch size.
# The last piece may be smaller; its convolution and ELU then run one after the other.
PATCHES_AT_ONCE = 32


def encode_in_pieces(encode: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """Run ``encode`` on pieces of ``x`` (B, ...) in parallel, and join the results.

    Each piece runs on a separate core, so that cores do not wait for each other after every layer. Returns None if
    ``x`` fits in one piece or is on a GPU.
    """
    if not fast.is_enabled() or x.device.type != "cpu" or len(x) <= PATCHES_AT_ONCE:
        return None
    return torch.cat(run_in_parallel(encode, x.split(PATCHES_AT_ONCE)))


def run_in_parallel(work: Callable[[Any], Any], pieces: Sequence[Any]) -> list[Any]:
    """Run ``work`` on each piece, in parallel on equal shares of this process's cores, and return the results in order.

    In a new thread, gradients are on and autocast is off, whatever the caller's settings. ``work`` must set both.
    """
    cores = torch.get_num_threads()
    threads = min(cores, len(pieces))
    return list(map(work, pieces) if threads == 1 else _make_pool(threads, cores // threads).map(work, pieces))


@functools.lru_cache(maxsize=2)  # one pool for full batches and one for a smaller last batch
def _make_pool(threads: int, cores: int) -> ThreadPoolExecutor:
    """Create a pool of threads that use ``cores`` cores each."""
    return ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(cores,))
