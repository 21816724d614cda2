"""From raw patches to the network's input: the views of a training step, and patches as they are."""

import numpy as np
import torch

from data.augment import Augmentation
from data.dataset import PatchBatch
from misc.sizes import HU_MAX, HU_MIN

HALF_RANGE = (HU_MAX - HU_MIN) / 2  # 632 HU; intensities are (HU + 1024) / 632 - 1, in [-1, 1]
INPUT_CHUNK = 16  # patches converted together on the CPU, so that they stay in its cache


def step_generators(
    seed: int, epoch: int, location: int, step: int, group: int, device: torch.device
) -> tuple[torch.Generator, torch.Generator]:
    """Two streams for one step of one group: parameters on the CPU, noise on the device.

    Five numbers in, so no two steps, epochs, locations or groups share a stream, and a resumed run
    draws what the uninterrupted one would have drawn, on however many ranks.
    """
    state = np.random.SeedSequence([seed, epoch, location, step, group]).generate_state(2, np.uint64)
    parameters = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
    noise = torch.Generator(device).manual_seed(int(state[1] >> np.uint64(1)))
    return parameters, noise


def shift_to_zero(patches: torch.Tensor) -> torch.Tensor:
    """HU -> float32 in [0, 1264]: clipped to [-1024, 240], plus 1024. Augmentation works on these."""
    return patches.to(torch.float32, copy=True).clamp_(HU_MIN, HU_MAX).sub_(HU_MIN)  # the caller keeps its own


def to_unit(volumes: torch.Tensor) -> torch.Tensor:
    """[0, 1264] -> [-1, 1], the network's input."""
    return (volumes / HALF_RANGE).sub_(1)


def to_input(patches: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """HU -> the network's input without augmentation: (B, 32, 32, 32) -> (B, 1, 32, 32, 32) in [-1, 1].

    On the CPU a few patches at a time, which stay in the cache from one operation to the next.
    """
    x = torch.empty(patches.shape, dtype=dtype, device=patches.device)
    count = INPUT_CHUNK if patches.device.type == "cpu" else max(1, len(patches))
    for out, piece in zip(x.split(count), patches.split(count)):
        out.copy_(to_unit(shift_to_zero(piece)))
    return x[:, None]


Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # query, key, neighbours


def make_views(
    patches: torch.Tensor,
    neighbors: torch.Tensor | None,
    augmentation: Augmentation,
    generators: tuple[torch.Generator, torch.Generator],
) -> Views:
    """The inputs of a step from raw HU.

    Args:
        patches: (B, 32, 32, 32).
        neighbors: (B, k, 32, 32, 32); the k of a subject are one volume and share one draw. Or None.
        augmentation: what to apply.
        generators: from :func:`step_generators`.

    Returns:
        Two independent views of the patches, each (B, 1, 32, 32, 32), and one of the neighbours,
        (B, k, 32, 32, 32); all in the network's units.
    """
    batch = len(patches)
    shifted = shift_to_zero(patches)[:, None]  # (B, 1, 32, 32, 32)
    views = augmentation(torch.cat([shifted, shifted]), *generators)  # (2 B, 1, 32, 32, 32)
    if neighbors is not None:
        neighbors = to_unit(augmentation(shift_to_zero(neighbors), *generators))  # (B, k, 32, 32, 32)
    views = to_unit(views)  # (2 B, 1, 32, 32, 32)
    return views[:batch], views[batch:], neighbors


def step_views(batch: PatchBatch, augmentation: Augmentation, seed: int, groups: range, device: torch.device) -> Views:
    """The views of one rank's share of a training step, on ``device``; see :func:`make_views`.

    ``groups`` are the numbers, over all ranks, of the groups that the share is dealt to; each has streams of its own.
    """
    patches = batch.patches.to(device, non_blocking=True).chunk(len(groups))  # of each group (b, 32, 32, 32)
    neighbors = [None] * len(groups)
    if batch.neighbors is not None:
        neighbors = batch.neighbors.to(device, non_blocking=True).chunk(len(groups))  # (b, k, 32, 32, 32)
    views = []
    for group, of_group, near in zip(groups, patches, neighbors, strict=True):
        generators = step_generators(seed, batch.epoch, batch.location, batch.step, group, device)
        views.append(make_views(of_group, near, augmentation, generators))
    if len(views) == 1:
        return views[0]
    query, key, near = zip(*views)
    return torch.cat(query), torch.cat(key), None if batch.neighbors is None else torch.cat(near)


def grid_of_views(views: Views, subjects: int = 8) -> np.ndarray:
    """What the encoders see, as a picture: a column a subject; rows are query, key and each neighbour.

    Args:
        views: from :func:`step_views`.
        subjects: how many of the batch to show.

    Returns:
        (H, W, 3) uint8, the middle axial slice of each volume, -1024 HU black and 240 HU white.
    """
    from torchvision.utils import make_grid  # imported here: a CPU-only torch may lack a matching torchvision

    given = [view[:subjects].float().cpu() for view in views if view is not None]
    rows = torch.cat(given, dim=1).transpose(0, 1)  # (2 + k, n, 32, 32, 32)
    slices = rows[:, :, rows.shape[2] // 2].flatten(0, 1)[:, None]  # ((2 + k) n, 1, 32, 32)
    grid = make_grid(slices, nrow=rows.shape[1], normalize=True, value_range=(-1, 1), pad_value=0.5)  # (3, H, W)
    return (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (H, W, 3)
