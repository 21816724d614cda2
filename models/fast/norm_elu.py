"""BatchNorm3d followed by ELU in training: selects the version for the CPU, the GPU or torch.compile."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models import fast
from models.fast import norm_elu_cpu, norm_elu_gpu


def norm_elu(
    norm: nn.BatchNorm3d, blocks: Sequence[torch.Tensor], groups: int = 1, track: bool = True
) -> list[torch.Tensor] | None:
    """Compute elu(norm(x)) for blocks (n, C, D, H, W), as in :func:`models.cnn3d.norm_elu`.

    Under torch.compile, the version for torch.compile is used even if the fast paths are switched off.

    Returns:
        The blocks of the result, or None if no fast path applies.
    """
    if not norm.training:
        return None
    if torch.compiler.is_compiling():
        return None if groups > 1 else _apply_to_joined_blocks(_norm_elu_compiled, norm, blocks, track)
    if not (fast.is_enabled() and _has_usual_settings(norm)):
        return None
    if norm_elu_gpu.can_fuse_norm_elu(blocks, groups):
        return norm_elu_gpu.apply_norm_elu(norm, blocks, groups, track)
    if groups == 1 and norm_elu_cpu.is_fused_norm_elu_faster(blocks[0]):
        return _apply_to_joined_blocks(_norm_elu_cpu, norm, blocks, track)
    return None


def _apply_to_joined_blocks(
    norm_elu_function, norm: nn.BatchNorm3d, blocks: Sequence[torch.Tensor], track: bool
) -> list[torch.Tensor]:
    """Join the blocks, run ``norm_elu_function(norm, x, track)`` on the result, and split it into blocks again."""
    if len(blocks) == 1:
        return [norm_elu_function(norm, blocks[0], track)]
    return list(norm_elu_function(norm, torch.cat(list(blocks)), track).chunk(len(blocks)))


def _has_usual_settings(norm: nn.BatchNorm3d) -> bool:
    """Return whether a layer is set up as in the encoder: affine, with running statistics and a fixed momentum."""
    return type(norm) is nn.BatchNorm3d and norm.affine and norm.track_running_stats and norm.momentum is not None


def _norm_elu_cpu(norm: nn.BatchNorm3d, x: torch.Tensor, track: bool) -> torch.Tensor:
    y, mean, variance = norm_elu_cpu.apply_norm_elu(norm, x)
    if track:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked += 1
            # Autograd refuses a backward pass if the version counter of a saved tensor, such as running_mean, changes.
            # Write through .data, which does not change the version counters of the running statistics.
            norm.running_mean.data.lerp_(mean, norm.momentum)
            norm.running_var.data.lerp_(variance * (count / (count - 1)), norm.momentum)
    return y


def _norm_elu_compiled(norm: nn.BatchNorm3d, x: torch.Tensor, track: bool) -> torch.Tensor:
    """Compute elu(norm(x)) under torch.compile, and update the running statistics separately from the BatchNorm call.

    A compiled graph saves BatchNorm's running statistics for the backward pass. A step runs each layer on the patches
    and then on their neighbours, and the second run would change the statistics saved by the first run. Therefore,
    the BatchNorm function is called without running statistics.
    """
    y, mean, inverse = torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
    if track:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            variance = inverse.detach() ** -2 - norm.eps  # (C,)
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean.detach(), norm.momentum)
            norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return F.elu(y)
