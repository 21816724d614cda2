"""Convolution followed by ELU for inference, in one oneDNN pass on the CPU.

A separate ELU reads and writes the result of the convolution again. oneDNN can apply ELU while the result is still in
registers, but torch offers this only through TorchScript's oneDNN Graph fuser.
"""

import functools
import threading
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models import fast

# Only one thread may compile at a time, because compiling switches torch's fuser on and off for all threads.
_compiling = threading.Lock()


def conv_elu(
    x: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Compute F.elu(F.conv3d(...)) without gradients: (B, in, D, H, W) -> (B, out, D', H', W').

    The first call for each combination of shapes compiles the function, which takes as long as about ten calls.
    Use few different shapes. Convolution and ELU share one pass only for float32 or bfloat16 tensors on the CPU, and
    only with a bias. For all other inputs, convolution and ELU are two separate passes.
    """
    plain = x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or bias is None
    if fast.is_enabled() and not plain and not torch.is_autocast_enabled("cpu"):
        layouts = tuple(value.is_contiguous(memory_format=torch.channels_last_3d) for value in (x, kernel))
        with _compiling:
            fused = _compile_fused_conv_elu(x.shape, kernel.shape, layouts, x.dtype, stride, padding, dilation, groups)
        if fused is not None:
            return fused(x, kernel, bias)
    return F.elu_(F.conv3d(x, kernel, bias, stride, padding, dilation, groups))


@functools.lru_cache(maxsize=64)  # enough for the 13 layers of an encoder in two data types
def _compile_fused_conv_elu(
    input_shape: torch.Size,
    kernel_shape: torch.Size,
    channels_last: tuple[bool, bool],
    dtype: torch.dtype,
    *conv_settings: int | str | tuple[int, ...],
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return a compiled fused function for tensors of these shapes and layouts, or None if torch has no fuser.

    torch's fuser compiles for the shapes of the first inputs and does not fuse other shapes, so each combination of
    shapes needs a separate function.
    """
    examples = [torch.zeros(input_shape, dtype=dtype), torch.zeros(kernel_shape, dtype=dtype)]
    for index, last in enumerate(channels_last):
        if last:
            examples[index] = examples[index].contiguous(memory_format=torch.channels_last_3d)
    examples.append(torch.zeros(kernel_shape[0], dtype=dtype))

    def run_conv_elu(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.elu(F.conv3d(x, kernel, bias, *conv_settings))

    if not hasattr(torch.jit, "enable_onednn_fusion") or not hasattr(torch.jit, "trace"):
        return None
    before = torch.jit.onednn_fusion_enabled()
    try:
        torch.jit.enable_onednn_fusion(True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but no replacement fuses ELU
            traced = torch.jit.trace(run_conv_elu, examples, check_trace=False)
            traced(*examples)  # the first call only records the shapes; the next call compiles
            fused = "oneDNNFusionGroup" in str(traced.graph_for(*examples))
        return traced if fused else None
    except RuntimeError:
        return None
    finally:
        torch.jit.enable_onednn_fusion(before)
