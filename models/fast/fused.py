"""Convolution followed by ELU, for inference: on the CPU in one pass, by oneDNN.

A convolution leaves its result in memory and ELU reads and writes it once more. oneDNN can apply ELU to
what is in the registers, but torch reaches that only through TorchScript's oneDNN Graph fuser.
"""

import functools
import threading
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models import fast

# Compiling switches the fuser, which all threads share, on and off again: one at a time, or one is left unfused.
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
    """F.elu(F.conv3d(...)), without gradients. (B, in, D, H, W) -> (B, out, D', H', W').

    The first call with tensors of some shapes compiles, which takes as long as some ten calls; hold it
    to few shapes. In one pass go float32 and bfloat16 volumes on the CPU that have a bias.
    """
    plain = x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or bias is None
    if fast.enabled() and not plain and not torch.is_autocast_enabled("cpu"):
        layouts = tuple(value.is_contiguous(memory_format=torch.channels_last_3d) for value in (x, kernel))
        with _compiling:
            fused = _one_pass(x.shape, kernel.shape, layouts, x.dtype, stride, padding, dilation, groups)
        if fused is not None:
            return fused(x, kernel, bias)
    return F.elu_(F.conv3d(x, kernel, bias, stride, padding, dilation, groups))


@functools.lru_cache(maxsize=64)  # of an encoder's 13 layers, in two dtypes
def _one_pass(
    shape: torch.Size,
    kernel_shape: torch.Size,
    channels_last: tuple[bool, bool],
    dtype: torch.dtype,
    *settings: int | str | tuple[int, ...],
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The fused function for tensors of these shapes and layouts, ready; None where this torch has no fuser.

    The fuser compiles for what it saw first and takes all else unfused: so one function for each.
    """
    examples = [torch.zeros(shape, dtype=dtype), torch.zeros(kernel_shape, dtype=dtype)]
    for index, last in enumerate(channels_last):
        if last:
            examples[index] = examples[index].contiguous(memory_format=torch.channels_last_3d)
    examples.append(torch.zeros(kernel_shape[0], dtype=dtype))

    def layer(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.elu(F.conv3d(x, kernel, bias, *settings))

    if not hasattr(torch.jit, "enable_onednn_fusion") or not hasattr(torch.jit, "trace"):
        return None
    before = torch.jit.onednn_fusion_enabled()
    try:
        torch.jit.enable_onednn_fusion(True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; nothing that replaces it fuses ELU
            traced = torch.jit.trace(layer, examples, check_trace=False)
            traced(*examples)  # notes the shapes, unfused; the next call compiles
            fused = "oneDNNFusionGroup" in str(traced.graph_for(*examples))
        return traced if fused else None
    except RuntimeError:
        return None
    finally:
        torch.jit.enable_onednn_fusion(before)
