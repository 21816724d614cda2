"""The encoder's first two layers, frozen: our own code for CPUs with AVX-512, for bfloat16 AVX512-BF16.

They are a seventh of the arithmetic, but with 1 and 8 channels oneDNN runs them at a third to a quarter of the
others' speed. Measured on 2 cores, 64 patches through the whole encoder: 75 ms with oneDNN's and 60 ms with
ours in float32, 44 and 34 ms in bfloat16.

first_layers.c is compiled by the system's C compiler when a process first wants it, in 0.7 s: too little to
keep the result anywhere. Where there is no compiler or no such CPU, the layers take the usual way, and
nothing is said: the features are equal but for rounding.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-shared", "-fPIC", "-mavx512f", "-mavx512bf16")
Two = tuple[torch.Tensor, torch.Tensor]  # of the first and the second layer


@functools.lru_cache(maxsize=2)
def load(dtype: torch.dtype) -> Callable[..., int] | None:
    """The compiled function; None where there is no compiler or the CPU lacks the instructions."""
    names = {torch.float32: "first_layers_float", torch.bfloat16: "first_layers_bf16"}
    library = compiled()
    if library is None or dtype not in names or not library.first_layers_supported(dtype == torch.bfloat16):
        return None
    function = library[names[dtype]]
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 5]
    return function


@functools.lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """first_layers.c as a library, made by $CC, cc, gcc or clang; None where that cannot be."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or [found]
        if not compiler[0]:
            return None
        with tempfile.TemporaryDirectory(prefix="drasclr-") as folder:
            made = os.path.join(folder, "first_layers.so")
            subprocess.run([*compiler, *FLAGS, "-o", made, str(SOURCE)], check=True, capture_output=True)
            return ctypes.CDLL(made)  # which stays in memory when the file is gone
    except (OSError, ValueError, subprocess.CalledProcessError):  # ValueError: $CC has a quotation without its end
        return None


class FirstLayers:
    """Two convolutions 1 -> 8 -> 8 of 3 x 3 x 3 with padding 1, the second of stride 2, each followed by ELU.

    One call is one thread. Products of bfloat16 numbers are summed in float32, as the library's are.

    Args:
        function: from :func:`load`, for the kernels' dtype.
        kernels: (8, 1, 3, 3, 3) and (8, 8, 3, 3, 3), both float32 or both bfloat16.
        biases: (8,) each.
    """

    def __init__(self, function: Callable[..., int], kernels: Two, biases: Two):
        self._compute = function
        first, second = kernels
        self._dtype = first.dtype
        lines, together = first.reshape(8, 9, 3), 1
        if self._dtype == torch.bfloat16:  # two numbers are multiplied at a time
            lines, together = F.pad(lines, (0, 1)), 2
        channels = second.reshape(8, 8 // together, together, 3, 3, 3).permute(1, 3, 4, 5, 0, 2)
        weights = (lines.transpose(0, 1), biases[0].float(), channels, biases[1].float())
        self._weights = [value.contiguous() for value in weights]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 32, 32, 32) -> (B, 8, 16, 16, 16), channels last, both of the kernels' dtype."""
        if x.shape[1:] != (1, 32, 32, 32) or x.dtype != self._dtype:
            raise ValueError(f"patches are (B, 1, 32, 32, 32) {self._dtype}, not {tuple(x.shape)} {x.dtype}")
        out = torch.empty(len(x), 16, 16, 16, 8, dtype=self._dtype)
        x = x.contiguous()
        addresses = [value.data_ptr() for value in (*self._weights, out)]
        if self._compute(x.data_ptr(), len(x), *addresses):
            raise MemoryError("no memory for the encoder's first layers")
        return out.permute(0, 4, 1, 2, 3)


def first_layers(kernels: Two, biases: Two) -> FirstLayers | None:
    """The fast form of an encoder's first two layers on this machine; None: take the usual way."""
    if any(kernel.device.type != "cpu" for kernel in kernels):
        return None
    function = load(kernels[0].dtype)
    return FirstLayers(function, kernels, biases) if function else None
