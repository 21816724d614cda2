"""Convert raw patches to network input: augmented views for training, or patches without augmentation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from data.augment import Augmentation
from data.sampler import BatchIndex
from misc.sizes import HU_MAX, HU_MIN, PATCH_SIZE

HALF_RANGE = (HU_MAX - HU_MIN) / 2  # 632 HU; intensities are (HU + 1024) / 632 - 1, in [-1, 1]
PATCH = (PATCH_SIZE,) * 3
INPUT_CHUNK = 16  # number of patches to convert at a time, so that they stay in the CPU cache


def make_random_stream_seeds(seed: int, epoch: int, location: int, step: int, group: int) -> tuple[int, int]:
    """Return two seeds for one step of one BatchNorm group: one for the transform parameters, one for the noise.

    Each combination of the arguments has a separate random stream. A resumed run therefore draws the same numbers as an
    uninterrupted one, with any number of ranks.
    """
    state = np.random.SeedSequence([seed, epoch, location, step, group]).generate_state(2, np.uint64)
    return int(state[0] >> np.uint64(1)), int(state[1] >> np.uint64(1))


def clip_and_shift_hu(patches: torch.Tensor) -> torch.Tensor:
    """Clip HU to [-1024, 240] and add 1024: the result is float32 in [0, 1264], the range used by augmentation."""
    return patches.to(torch.float32, copy=True).clamp_(HU_MIN, HU_MAX).sub_(HU_MIN)  # the input stays unchanged


def scale_to_unit_range(volumes: torch.Tensor) -> torch.Tensor:
    """Scale values from [0, 1264] to [-1, 1], the range of the network's input."""
    return (volumes / HALF_RANGE).sub_(1)


def convert_hu_to_input(patches: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Convert HU to network input without augmentation: (B, 32, 32, 32) -> (B, 1, 32, 32, 32) in [-1, 1].

    A CPU converts a few patches at a time, so that these patches stay in its cache between operations.
    """
    x = torch.empty(patches.shape, dtype=dtype, device=patches.device)
    count = INPUT_CHUNK if patches.device.type == "cpu" else max(1, len(patches))
    for out, piece in zip(x.split(count), patches.split(count)):
        out.copy_(scale_to_unit_range(clip_and_shift_hu(piece)))
    return x[:, None]


class StepDraws(NamedTuple):
    """Draws the transform parameters for one rank's samples, in a data-loader worker or the training process.

    Attributes:
        augmentation: the transforms to draw parameters for.
        seed: seed of the run.
        groups: indices of this rank's BatchNorm groups among all groups; each group has separate random streams.
    """

    augmentation: Augmentation
    seed: int
    groups: range

    def __call__(self, index: BatchIndex, neighbors: bool, size: Sequence[int] = PATCH) -> torch.Tensor:
        """Return packed parameters (2 or 3, B, W) float32 of query, key and, with ``neighbors``, the neighbours."""
        count = len(index.rows) // len(self.groups)
        drawn = []
        for group in self.groups:
            seed, _ = make_random_stream_seeds(self.seed, index.epoch, index.location, index.step, group)
            generator = torch.Generator().manual_seed(seed)
            views = list(self._draw_packed_parameters(2 * count, size, generator).chunk(2))  # query and key
            if neighbors:  # one draw per subject, shared by its k neighbouring patches
                views.append(self._draw_packed_parameters(count, size, generator))
            drawn.append(torch.stack(views))
        return torch.cat(drawn, dim=1)

    def _draw_packed_parameters(self, count: int, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        drawn = self.augmentation.draw_parameters(count, size, generator)
        return self.augmentation.pack_parameters(self.augmentation.prepare_parameters(drawn, size), count)  # (count, W)


class Views(NamedTuple):
    """Inputs of a training step, scaled to the network's range [-1, 1]."""

    query: torch.Tensor  # (B, 1, 32, 32, 32)
    key: torch.Tensor  # (B, 1, 32, 32, 32), a second view of the same patches
    neighbors: torch.Tensor | None  # (B, k, 32, 32, 32), one view of each neighbour


class StepViews:
    """Makes the augmented views of one rank's samples in a step.

    Args:
        draws: object that draws the transform parameters.
        device: device that computes the views.
        dense: if True, process all groups at once, with tensor sizes that do not depend on the random draws, so that a
            CUDA graph can record the kernels. If False, process group by group, and compute each transform only for
            the samples that use the transform. By default, dense is True on a GPU.
    """

    def __init__(self, draws: StepDraws, device: torch.device, dense: bool | None = None):
        self.augmentation, self.draws = draws.augmentation, draws
        self.dense = device.type != "cpu" if dense is None else dense
        self.generators = [torch.Generator(device) for _ in draws.groups]  # one generator of random noise per group

    def seed_noise(self, epoch: int, location: int, step: int) -> None:
        """Seed the noise stream of each group for a step."""
        for group, generator in zip(self.draws.groups, self.generators):
            generator.manual_seed(make_random_stream_seeds(self.draws.seed, epoch, location, step, group)[1])

    def __call__(self, patches: torch.Tensor, neighbors: torch.Tensor | None, drawn_parameters: torch.Tensor) -> Views:
        """Make the views of a step; call :meth:`seed_noise` first. All tensors must be on the device of the views.

        Args:
            patches: (B, 32, 32, 32) HU.
            neighbors: (B, k, 32, 32, 32) HU, or None.
            drawn_parameters: (2 or 3, B, W), from :class:`StepDraws`.
        """
        if self.dense:
            return self._make_views(patches, neighbors, drawn_parameters, self.generators)
        count = len(self.generators)
        near = [None] * count if neighbors is None else neighbors.chunk(count)
        shares = zip(patches.chunk(count), near, drawn_parameters.chunk(count, dim=1), self.generators, strict=True)
        views = [self._make_views(*share, [generator]) for *share, generator in shares]
        if count == 1:
            return views[0]
        query, key, around = zip(*views)
        return Views(torch.cat(query), torch.cat(key), None if neighbors is None else torch.cat(around))

    def _make_views(
        self,
        patches: torch.Tensor,
        neighbors: torch.Tensor | None,
        draws: torch.Tensor,
        generators: Sequence[torch.Generator],
    ) -> Views:
        """Make the views of some BatchNorm groups of consecutive samples, with one generator per group."""
        batch, size = len(patches), patches.shape[1:]

        def draw_noise_like(like: torch.Tensor) -> torch.Tensor:
            if len(generators) == 1:
                return torch.randn(like.shape, generator=generators[0], device=like.device, dtype=like.dtype)
            # (m, groups, b, C, D, H, W): m views of the batch, split into the samples of each group
            blocks = like.new_empty(len(like) // batch, len(generators), batch // len(generators), *like.shape[1:])
            for of_group, generator in zip(blocks.unbind(dim=1), generators):
                of_group.copy_(torch.randn(of_group.shape, generator=generator, device=like.device, dtype=like.dtype))
            return blocks.flatten(0, 2)

        def augment(volumes: torch.Tensor, packed_parameters: torch.Tensor) -> torch.Tensor:
            unpacked = self.augmentation.unpack_parameters(packed_parameters, size)
            return scale_to_unit_range(self.augmentation.apply(volumes, unpacked, draw_noise_like, self.dense))

        shifted = clip_and_shift_hu(patches)[:, None]  # (B, 1, 32, 32, 32)
        views = augment(torch.cat([shifted, shifted]), draws[:2].flatten(0, 1))  # (2 B, 1, 32, 32, 32)
        if neighbors is not None:
            neighbors = augment(clip_and_shift_hu(neighbors), draws[2])  # (B, k, 32, 32, 32)
        return Views(views[:batch], views[batch:], neighbors)


def draw_view_grid(views: Views, subjects: int = 8) -> np.ndarray:
    """Draw the input of the encoders as a picture: one column per subject; rows are query, key and each neighbour.

    Args:
        views: views from :class:`StepViews`.
        subjects: number of subjects of the batch to show.

    Returns:
        (H, W, 3) uint8, the middle axial slice of each volume, with -1024 HU black and 240 HU white.
    """
    from torchvision.utils import make_grid  # imported here, because a CPU-only torch may lack a matching torchvision

    given = [view[:subjects].float().cpu() for view in views if view is not None]
    rows = torch.cat(given, dim=1).transpose(0, 1)  # (2 + k, n, 32, 32, 32)
    slices = rows[:, :, rows.shape[2] // 2].flatten(0, 1)[:, None]  # ((2 + k) n, 1, 32, 32)
    grid = make_grid(slices, nrow=rows.shape[1], normalize=True, value_range=(-1, 1), pad_value=0.5)  # (3, H, W)
    return (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (H, W, 3)
