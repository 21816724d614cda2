"""Keep freed memory in the process, so that the next step can reuse it."""

import ctypes
import sys

import torch

from models import fast

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # parameters of mallopt(3)


def keep_freed_memory_in_process(device: torch.device | None = None) -> None:
    """Make glibc keep large freed memory blocks instead of returning them to the operating system.

    The activations of a batch need memory blocks of tens of MB. By default, every step returns its memory blocks and
    allocates new blocks, and the operating system clears each page of the new blocks. On 2 cores, a forward and
    backward pass of the encoder over 32 patches takes 0.73 s by default and 0.56 s with this function. The function has
    no effect with a C library other than glibc, or if ``device`` is not the CPU.
    """
    on_cpu = device is None or device.type == "cpu"
    if not (on_cpu and fast.is_enabled() and sys.platform.startswith("linux")):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)
