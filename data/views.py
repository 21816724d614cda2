"""From raw patches to the network's input: the views of a training step, and patches as they are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from data.augment import Augmentation
from data.sampler import BatchIndex
from misc.sizes import HU_MAX, HU_MIN, PATCH_SIZE

HALF_RANGE = (HU_MAX - HU_MIN) / 2  # 632 HU; intensities are (HU + 1024) / 632 - 1, in [-1, 1]
PATCH = (PATCH_SIZE,) * 3
INPUT_CHUNK = 16  # patches converted together on the CPU, so that they stay in its cache


def stream_seeds(seed: int, epoch: int, location: int, step: int, group: int) -> tuple[int, int]:
    """Seeds of the parameters' and of the noise's stream, for one step of one group.

    Five numbers in, so no two steps, epochs, locations or groups share a stream, and a resumed run
    draws what the uninterrupted one would have drawn, on however many ranks.
    """
    state = np.random.SeedSequence([seed, epoch, location, step, group]).generate_state(2, np.uint64)
    return int(state[0] >> np.uint64(1)), int(state[1] >> np.uint64(1))


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


class StepDraws(NamedTuple):
    """Draws the random parameters of a rank's share of each step, in a data-loader worker or where the step is made.

    Attributes:
        augmentation: what to draw for.
        seed: of the run.
        groups: numbers, over all ranks, of the groups that the share is dealt to; each has streams of its own.
    """

    augmentation: Augmentation
    seed: int
    groups: range

    def __call__(self, index: BatchIndex, neighbors: bool, size: Sequence[int] = PATCH) -> torch.Tensor:
        """(2 or 3, B, W) float32, packed: of query, key and, if there are ``neighbors``, these."""
        count = len(index.rows) // len(self.groups)
        drawn = []
        for group in self.groups:
            seed, _ = stream_seeds(self.seed, index.epoch, index.location, index.step, group)
            generator = torch.Generator().manual_seed(seed)
            views = list(self._draw(2 * count, size, generator).chunk(2))  # query and key
            if neighbors:  # the k of a subject are one volume and share one draw
                views.append(self._draw(count, size, generator))
            drawn.append(torch.stack(views))
        return torch.cat(drawn, dim=1)

    def _draw(self, count: int, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        drawn = self.augmentation.draw(count, size, generator)
        return self.augmentation.pack(self.augmentation.prepare(drawn, size), count)  # (count, W)


class Views(NamedTuple):
    """The inputs of a training step, in the network's units."""

    query: torch.Tensor  # (B, 1, 32, 32, 32)
    key: torch.Tensor  # (B, 1, 32, 32, 32), another view of the same patches
    neighbors: torch.Tensor | None  # (B, k, 32, 32, 32), one view


class StepViews:
    """Makes the views of one rank's share of a step.

    Args:
        draws: of the parameters.
        device: where they are made.
        dense: all groups at once, in operations whose sizes no draw decides, so that a GPU's kernels can be recorded.
            Default: on a GPU. Else group by group, and each transform only for the samples that are drawn for it.
    """

    def __init__(self, draws: StepDraws, device: torch.device, dense: bool | None = None):
        self.augmentation, self.draws = draws.augmentation, draws
        self.dense = device.type != "cpu" if dense is None else dense
        self.generators = [torch.Generator(device) for _ in draws.groups]  # of the noise

    def seed(self, epoch: int, location: int, step: int) -> None:
        """Begin each group's stream of noise for a step."""
        for group, generator in zip(self.draws.groups, self.generators):
            generator.manual_seed(stream_seeds(self.draws.seed, epoch, location, step, group)[1])

    def __call__(self, patches: torch.Tensor, neighbors: torch.Tensor | None, draws: torch.Tensor) -> Views:
        """The views of a step that :meth:`seed` has begun.

        Args:
            patches: (B, 32, 32, 32) HU, on the device like the others.
            neighbors: (B, k, 32, 32, 32) HU, or None.
            draws: (2 or 3, B, W), of :class:`StepDraws`.
        """
        if self.dense:
            return self._make(patches, neighbors, draws, self.generators)
        count = len(self.generators)
        near = [None] * count if neighbors is None else neighbors.chunk(count)
        shares = zip(patches.chunk(count), near, draws.chunk(count, dim=1), self.generators, strict=True)
        views = [self._make(*share, [generator]) for *share, generator in shares]
        if count == 1:
            return views[0]
        query, key, around = zip(*views)
        return Views(torch.cat(query), torch.cat(key), None if neighbors is None else torch.cat(around))

    def _make(
        self,
        patches: torch.Tensor,
        neighbors: torch.Tensor | None,
        draws: torch.Tensor,
        generators: Sequence[torch.Generator],
    ) -> Views:
        """The views of the groups that the generators are of, each an equal share of the samples in order."""
        batch, size = len(patches), patches.shape[1:]

        def noise(like: torch.Tensor) -> torch.Tensor:
            if len(generators) == 1:
                return torch.randn(like.shape, generator=generators[0], device=like.device, dtype=like.dtype)
            # (m, groups, b, C, D, H, W): of the m views of a batch, each group's own samples
            blocks = like.new_empty(len(like) // batch, len(generators), batch // len(generators), *like.shape[1:])
            for of_group, generator in zip(blocks.unbind(dim=1), generators):
                of_group.copy_(torch.randn(of_group.shape, generator=generator, device=like.device, dtype=like.dtype))
            return blocks.flatten(0, 2)

        def augment(volumes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
            unpacked = self.augmentation.unpack(packed, size)
            return to_unit(self.augmentation.apply(volumes, unpacked, noise, self.dense))

        shifted = shift_to_zero(patches)[:, None]  # (B, 1, 32, 32, 32)
        views = augment(torch.cat([shifted, shifted]), draws[:2].flatten(0, 1))  # (2 B, 1, 32, 32, 32)
        if neighbors is not None:
            neighbors = augment(shift_to_zero(neighbors), draws[2])  # (B, k, 32, 32, 32)
        return Views(views[:batch], views[batch:], neighbors)


def grid_of_views(views: Views, subjects: int = 8) -> np.ndarray:
    """What the encoders see, as a picture: a column a subject; rows are query, key and each neighbour.

    Args:
        views: of :class:`StepViews`.
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
