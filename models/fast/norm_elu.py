"""BatchNorm3d followed by ELU in training: the one entrance to the versions for CPUs, GPUs and torch.compile."""

import torch
import torch.nn.functional as F
from torch import nn

from models import fast
from models.fast import norm_elu_cpu, norm_elu_gpu


def norm_elu(
    norm: nn.BatchNorm3d, x: torch.Tensor, groups: int = 1, blocks: int = 1, track: bool = True
) -> torch.Tensor | None:
    """elu(norm(x)) for x (B, C, D, H, W), as :func:`models.cnn3d.norm_elu`; None if the plain path must do it.

    Under torch.compile there is one version only, whatever the switch says.
    """
    if not norm.training:
        return None
    if torch.compiler.is_compiling():
        return _norm_elu_compiled(norm, x, track) if groups == 1 else None
    if not (fast.enabled() and _has_usual_settings(norm)):
        return None
    if norm_elu_gpu.is_faster(x, groups):
        y, mean, variance = norm_elu_gpu.apply(norm, x, groups, blocks)
    elif groups == 1 and norm_elu_cpu.is_faster(x):
        y, mean, variance = norm_elu_cpu.apply(norm, x)
    else:
        return None
    if track:
        _update_running(norm, mean, variance, x.numel() // x.shape[1] // groups)
    return y


def _has_usual_settings(norm: nn.BatchNorm3d) -> bool:
    """Whether a layer is one like the encoder's: scaled, with running statistics of a fixed momentum."""
    return type(norm) is nn.BatchNorm3d and norm.affine and norm.track_running_stats and norm.momentum is not None


@torch.no_grad()
def _update_running(norm: nn.BatchNorm3d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Move the running statistics towards a batch's mean and biased variance, (C,) each, of ``count`` values."""
    norm.num_batches_tracked += 1
    # .data, as torch's own kernel writes them: an earlier pass may hold them for its backward pass, which does
    # not read their values in training and must not find a new version.
    norm.running_mean.data.lerp_(mean, norm.momentum)
    norm.running_var.data.lerp_(variance * (count / (count - 1)), norm.momentum)


def _norm_elu_compiled(norm: nn.BatchNorm3d, x: torch.Tensor, track: bool) -> torch.Tensor:
    """For torch.compile, whose graphs keep the running statistics that they were given for the backward pass.

    Patches and neighbours go through a layer one after the other, so those of the first pass would have changed by
    then. Here the layer gets none, and they are updated beside it.
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
