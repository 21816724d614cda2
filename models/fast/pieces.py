"""A batch encoded in pieces of one size, side by side on the cores."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from models import fast

# Patches encoded at a time, in one pass a layer; a rest smaller than that takes two. One number, because
# oneDNN's code is made for each number anew, and a small one, because a layer's result then takes tens of MB.
PATCHES_AT_ONCE = 32


def encode_in_pieces(encode: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """``encode`` over pieces of ``x`` (B, ...), put together again; None where ``x`` is one piece, or on a GPU.

    The pieces go side by side, each with a share of the cores, so that they never wait for each other within a layer.
    """
    if not fast.enabled() or x.device.type != "cpu" or len(x) <= PATCHES_AT_ONCE:
        return None
    return torch.cat(side_by_side(encode, x.split(PATCHES_AT_ONCE)))


def side_by_side(work: Callable[[Any], Any], pieces: Sequence[Any]) -> list[Any]:
    """``work`` of each piece, in order, each on its share of this process's cores.

    Threads of their own compute gradients unless ``work`` says otherwise, and know no autocast.
    """
    cores = torch.get_num_threads()
    threads = min(cores, len(pieces))
    return list(map(work, pieces) if threads == 1 else _pool(threads, cores // threads).map(work, pieces))


@functools.lru_cache(maxsize=2)  # for full batches and the last one
def _pool(threads: int, cores: int) -> ThreadPoolExecutor:
    """Threads that each have some cores."""
    return ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(cores,))
