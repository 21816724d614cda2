"""Convolution followed by ELU, for inference: on the CPU in one pass, by oneDNN.

A convolution leaves its result in memory and ELU reads and writes it once more. oneDNN can apply ELU to
what is in the registers, but torch reaches that only through TorchScript's oneDNN Graph fuser.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from models.norm_elu import elu_

WARM_UP = 3  # calls: TorchScript looks at the shapes of two, and compiles at the third


def conv_elu(
    x: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor,
    stride: tuple[int, ...] = (1, 1, 1),
    padding: tuple[int, ...] = (0, 0, 0),
    dilation: tuple[int, ...] = (1, 1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """F.elu(F.conv3d(...)), without gradients. (B, in, D, H, W) -> (B, out, D', H', W')."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        layout = x.is_contiguous(memory_format=torch.channels_last_3d)
        one_pass = _one_pass(x.shape, layout, x.dtype, kernel.shape, tuple(stride), tuple(padding), dilation, groups)
        if one_pass is not None:
            return one_pass(x, kernel, bias)
    return elu_(F.conv3d(x, kernel, bias, stride, padding, dilation, groups))


@functools.lru_cache(maxsize=256)  # 13 layers, a full and a last batch, two dtypes
def _one_pass(
    shape: torch.Size,
    channels_last: bool,
    dtype: torch.dtype,
    kernel_shape: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The fused function for tensors of these shapes, ready; None where this torch has no fuser.

    The fuser compiles for the shapes that it saw first and takes others unfused: so one for each.
    """
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    examples = (
        torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout),
        torch.zeros(kernel_shape, dtype=dtype).contiguous(memory_format=layout),
        torch.zeros(kernel_shape[0], dtype=dtype),
    )

    def layer(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.elu(F.conv3d(x, kernel, bias, stride, padding, dilation, groups))

    enabled = torch.jit.onednn_fusion_enabled() if hasattr(torch.jit, "onednn_fusion_enabled") else False
    try:
        torch.jit.enable_onednn_fusion(True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; nothing that replaces it fuses ELU
            traced = torch.jit.trace(layer, examples, check_trace=False)
            for _ in range(WARM_UP):
                traced(*examples)
        if "oneDNNFusionGroup" not in str(traced.graph_for(*examples)):
            return None
        return traced
    except (AttributeError, RuntimeError):
        return None
    finally:
        if hasattr(torch.jit, "enable_onednn_fusion"):
            torch.jit.enable_onednn_fusion(enabled)
