"""Augmentation of a whole mini-batch on the training device, with MONAI's meaning.

Each letter is one transform; a string of letters applies them in order. ``draw`` makes the random
parameters of every sample (small tensors on the CPU), ``apply`` uses them, so that a test can hand
the same parameters to MONAI's own transforms.

A sample is a volume of C channels that share every parameter: a patch has one channel, the k
neighbours of a subject are one volume of k channels. Axes are the array's, (z, y, x) for a patch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from data.resample import Parameters, affine_matrix, sample, voxel_coordinates
from misc.run.augmentation import PUBLISHED, Ranges, refuse_unknown_letters

ELASTIC_SIGMA = (8.0, 12.0)  # voxels
ELASTIC_CUTOFF = 3.0  # standard deviations
CONTRAST_EPSILON = 1e-7
FLIP_PROB = 0.5
SMOOTH_CUTOFF = 4.0  # standard deviations, as monai.transforms.GaussianSmooth
SMOOTH_LEAST = 0.05  # voxels: less changes nothing, and 0 has no kernel


def _uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def _moved(drawn: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor:
    """Parameters where the volumes are, numbers in their dtype, indices as they are.

    From pinned memory, because a copy from ordinary memory waits until a GPU has done all that it
    was given before; the step after would start only then.
    """
    if drawn.is_floating_point():
        drawn = drawn.to(volumes.dtype)
    if volumes.device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(volumes.device, non_blocking=True)


# ---------------------------------------------------------------- affine, elastic


def draw_affine(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    rotate = math.radians(ranges.rotate)
    return {
        "rotation": _uniform((count, 3), -rotate, rotate, generator),
        "translation": _uniform((count, 3), -ranges.translate, ranges.translate, generator),
        "scale": _uniform((count, 3), 1 - ranges.scale, 1 + ranges.scale, generator),
    }


def apply_affine(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandAffine, bilinear, border. A scale above 1 zooms out."""
    return sample(volumes, voxel_coordinates(_moved(affine_matrix(parameters), volumes), volumes.shape[2:]))


def draw_elastic(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {
        "offset": torch.rand(count, 3, *size, generator=generator) * 2 - 1,
        "magnitude": _uniform((count,), 0.0, ranges.elastic, generator),
        "sigma": _uniform((count,), *ELASTIC_SIGMA, generator),
        **draw_affine(count, size, generator, ranges),
    }


def gaussian_band(sigma: torch.Tensor, size: int, cutoff: float = ELASTIC_CUTOFF) -> torch.Tensor:
    """Gaussian smoothing of a zero-padded axis as a matrix: (n,) -> (n, size, size).

    MONAI's kernel: the difference of error functions over each voxel, cut off at
    int(cutoff sigma + 0.5) voxels and not normalised again. As a matrix product it costs 32 multiplications
    a voxel; the kernel itself has up to 73 taps.
    """
    index = torch.arange(size, dtype=torch.float64, device=sigma.device)
    distance = (index[:, None] - index[None, :])[None]  # (1, size, size)
    scale = (0.70710678 / sigma.abs().double())[:, None, None]
    band = 0.5 * (torch.erf(scale * (distance + 0.5)) - torch.erf(scale * (distance - 0.5)))
    tail = torch.floor(torch.clamp(sigma.double() * cutoff, min=0.5) + 0.5)
    return torch.where(distance.abs() <= tail[:, None, None], band.clamp(min=0), 0.0)


def _along_axes(volumes: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Volumes (n, C, D, H, W) times each sample's own matrix, (n, size, size), along each axis in turn."""
    for subscripts, matrix in zip(("nai,ncijk->ncajk", "nbj,ncijk->ncibk", "ndk,ncijk->ncijd"), matrices, strict=True):
        volumes = torch.einsum(subscripts, _moved(matrix, volumes), volumes)
    return volumes


def apply_elastic(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.Rand3DElastic: smoothed random offsets of the voxel centres, then the affine."""
    size = volumes.shape[2:]
    offset = _moved(parameters["offset"], volumes)  # (n, 3, *size)
    offset = _along_axes(offset, [gaussian_band(parameters["sigma"], length) for length in size])
    offset = offset * _moved(parameters["magnitude"], volumes)[:, None, None, None, None]

    return sample(volumes, voxel_coordinates(_moved(affine_matrix(parameters), volumes), size, offset))


# ---------------------------------------------------------------- flip, noise, contrast


def draw_flip(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {"flip": torch.rand(count, 3, generator=generator) < FLIP_PROB}


def apply_flip(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandFlip on each axis by itself. Not in the publication."""
    volumes = volumes.clone()
    for axis in range(3):
        chosen = _moved(parameters["flip"][:, axis].nonzero()[:, 0], volumes)
        if len(chosen):
            volumes[chosen] = volumes[chosen].flip(axis + 2)
    return volumes


def draw_noise(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {
        "chosen": (torch.rand(count, generator=generator) < ranges.noise_prob).nonzero()[:, 0],
        "std": _uniform((count,), 0.0, ranges.noise_std, generator),
    }


def apply_noise(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandGaussianNoise: the standard deviation is itself drawn.

    ``parameters["noise"]``, of unit variance, replaces the generator's where it is given.
    """
    chosen = parameters["chosen"]
    if not len(chosen):
        return volumes
    noise = parameters.get("noise")
    if noise is None:
        noise = torch.randn(
            len(chosen), *volumes.shape[1:], generator=generator, device=volumes.device, dtype=volumes.dtype
        )
    std = _moved(parameters["std"][chosen], volumes)
    noise = noise * std[:, None, None, None, None]
    return volumes.index_add(0, _moved(chosen, volumes), noise)


def draw_contrast(
    count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED
) -> Parameters:
    return {
        "chosen": (torch.rand(count, generator=generator) < ranges.contrast_prob).nonzero()[:, 0],
        "gamma": _uniform((count,), *ranges.gamma, generator),
    }


def apply_contrast(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandAdjustContrast: gamma between the minimum and maximum over all channels."""
    chosen = parameters["chosen"]
    if not len(chosen):
        return volumes
    rows = _moved(chosen, volumes)
    some = volumes[rows]
    flat = some.flatten(1)
    low = flat.amin(1)[:, None, None, None, None]
    span = flat.amax(1)[:, None, None, None, None] - low
    gamma = _moved(parameters["gamma"][chosen], volumes)[:, None, None, None, None]
    some = ((some - low) / (span + CONTRAST_EPSILON)).pow(gamma) * span + low
    return volumes.index_copy(0, rows, some)


# ---------------------------------------------------------------- smoothing, shift


def draw_smooth(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {"sigma": _uniform((count, 3), 0.0, ranges.smooth, generator)}


def apply_smooth(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandGaussianSmooth, each axis with a sigma of its own, as kernels and slices blur. Unpublished.

    At the border the voxels inside are weighed as if they were all, where MONAI's zeros would darken the rim.
    """
    bands = []
    for sigma, length in zip(parameters["sigma"].clamp(min=SMOOTH_LEAST).unbind(dim=1), volumes.shape[2:]):
        band = gaussian_band(sigma, length, SMOOTH_CUTOFF)  # (n, length, length)
        bands.append(band / band.sum(dim=2, keepdim=True))
    return _along_axes(volumes, bands)


def draw_shift(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {"offset": _uniform((count,), -ranges.shift, ranges.shift, generator)}


def apply_shift(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandShiftIntensity: the same HU for all voxels, as a deeper breath takes off. Unpublished."""
    return volumes + _moved(parameters["offset"], volumes)[:, None, None, None, None]


class Transform(NamedTuple):
    """What a letter stands for."""

    draw: Callable[[int, Sequence[int], torch.Generator, Ranges], Parameters]
    apply: Callable[[torch.Tensor, Parameters, torch.Generator], torch.Tensor]


TRANSFORMS = {  # their names and ranges are in misc/run/augmentation.py
    "f": Transform(draw_flip, apply_flip),
    "a": Transform(draw_affine, apply_affine),
    "e": Transform(draw_elastic, apply_elastic),
    "g": Transform(draw_noise, apply_noise),
    "c": Transform(draw_contrast, apply_contrast),
    "s": Transform(draw_smooth, apply_smooth),
    "i": Transform(draw_shift, apply_shift),
}


# ---------------------------------------------------------------- a string of letters


class Augmentation:
    """Transforms named by the letters of TRANSFORMS, in order, with parameters drawn from ``ranges``.

    Raises:
        UserError: an unknown letter.
    """

    def __init__(self, letters: str, ranges: Ranges = PUBLISHED):
        refuse_unknown_letters(letters)
        self.letters, self.ranges = letters, ranges

    def draw(self, count: int, size: Sequence[int], generator: torch.Generator) -> list[Parameters]:
        """Parameters of ``count`` samples of spatial ``size``, one entry per letter."""
        return [TRANSFORMS[letter].draw(count, size, generator, self.ranges) for letter in self.letters]

    def apply(
        self, volumes: torch.Tensor, parameters: Sequence[Parameters], generator: torch.Generator
    ) -> torch.Tensor:
        """Transform (n, C, D, H, W); the input is not modified. ``generator`` makes the noise."""
        for letter, drawn in zip(self.letters, parameters, strict=True):
            volumes = TRANSFORMS[letter].apply(volumes, drawn, generator)
        return volumes

    def __call__(self, volumes: torch.Tensor, parameters: torch.Generator, noise: torch.Generator) -> torch.Tensor:
        """Draw for every sample and apply."""
        return self.apply(volumes, self.draw(len(volumes), volumes.shape[2:], parameters), noise)
