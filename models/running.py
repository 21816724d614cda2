"""What every way of computing BatchNorm in training has in common."""

import torch
from torch import nn


def is_plain(norm: nn.BatchNorm3d) -> bool:
    """Whether a layer in training is one as the encoder's: scaled, with running statistics of a fixed momentum."""
    own = type(norm) is nn.BatchNorm3d and norm.training and norm.affine
    return own and norm.track_running_stats and norm.momentum is not None


@torch.no_grad()
def update_running(norm: nn.BatchNorm3d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Move the running statistics towards a batch's mean and biased variance, (C,) each, of ``count`` values."""
    norm.num_batches_tracked += 1
    # .data, as torch's kernel writes them: a pass through it may hold them for its backward,
    # which does not look at their values in training, and must not find a new version.
    norm.running_mean.data.lerp_(mean, norm.momentum)
    norm.running_var.data.lerp_(variance * (count / (count - 1)), norm.momentum)
