"""Augmentation of a whole mini-batch on the training device, with MONAI's meaning.

Each letter is one transform; a string of letters applies them in order. ``draw`` makes the random
parameters of every sample (small tensors on the CPU), ``apply`` uses them, so that a test can hand
the same parameters to MONAI's own transforms.

A sample is a volume of C channels that share every parameter: a patch has one channel, the k
neighbours of a subject are one volume of k channels. Axes are the array's, (z, y, x) for a patch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.layout import HU_MAX, HU_MIN, StoreError

HALF_RANGE = (HU_MAX - HU_MIN) / 2  # 632 HU; intensities are (HU + 1024) / 632 - 1, in [-1, 1]

ROTATION = math.pi / 18  # radians, about each axis
TRANSLATION = 12.0  # voxels, along each axis
SCALING = 0.1  # about 1, on each axis
ELASTIC_SIGMA = (8.0, 12.0)  # voxels
ELASTIC_MAGNITUDE = (0.0, float(HU_MAX - HU_MIN))  # voxels before smoothing; as published
ELASTIC_CUTOFF = 3.0  # standard deviations
NOISE_PROB, NOISE_MAX_STD = 0.25, 50.0  # HU
CONTRAST_PROB, GAMMA = 0.25, (0.5, 4.5)
CONTRAST_EPSILON = 1e-7
FLIP_PROB = 0.5

SAMPLE_CHUNK = 4  # samples resampled together on the CPU, so that they stay in its cache
INPUT_CHUNK = 16  # patches converted together, likewise

Parameters = dict[str, Any]


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


# ---------------------------------------------------------------- resampling


def rotation_matrix(angles: torch.Tensor) -> torch.Tensor:
    """R0 R1 R2 with the signs of monai.transforms.utils.create_rotate: (n, 3) radians -> (n, 3, 3)."""
    sin, cos = torch.sin(angles), torch.cos(angles)
    zero, one = torch.zeros_like(sin[:, 0]), torch.ones_like(sin[:, 0])

    def rows(*values):
        return torch.stack(values, dim=1).view(-1, 3, 3)

    s0, s1, s2 = sin.unbind(1)
    c0, c1, c2 = cos.unbind(1)
    first = rows(one, zero, zero, zero, c0, -s0, zero, s0, c0)
    second = rows(c1, zero, s1, zero, one, zero, -s1, zero, c1)
    third = rows(c2, -s2, zero, s2, c2, zero, zero, zero, one)
    return first @ second @ third


def affine_matrix(parameters: Parameters) -> torch.Tensor:
    """Output to input voxel about the patch centre: rotation (scale x + translation), (n, 3, 4)."""
    rotation = rotation_matrix(parameters["rotation"])
    linear = rotation * parameters["scale"][:, None, :]
    offset = rotation @ parameters["translation"][:, :, None]
    return torch.cat([linear, offset], dim=2)


def _voxels(matrix: torch.Tensor, size: Sequence[int], offset: torch.Tensor | None = None) -> torch.Tensor:
    """Input voxel of every output voxel, (n, 3, *size): centre + matrix (x - centre + offset).

    Args:
        matrix: (n, 3, 4) from :func:`affine_matrix`, in the volumes' dtype.
        size: (D, H, W).
        offset: (n, 3, *size) voxels, or none.
    """
    centre = [(length - 1) / 2 for length in size]
    along = [
        torch.arange(length, dtype=matrix.dtype, device=matrix.device) - middle for length, middle in zip(size, centre)
    ]
    points = []
    for axis in range(3):
        a, b, c, shift = (value[:, None, None] for value in matrix[:, axis].unbind(1))
        plane = a * along[0][:, None] + (b * along[1] + (shift + centre[axis]))  # (n, D, H)
        points.append(plane[..., None] + (c * along[2])[:, None])
    voxels = torch.stack(points, dim=1)
    if offset is not None:
        voxels += torch.einsum("nij,njdhw->nidhw", matrix[:, :, :3], offset)
    return voxels


def _sample(volumes: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """Trilinear values at (n, 3, *size) voxel coordinates; beyond the border, the border's. (n, C, *size)."""
    if volumes.device.type != "cpu":
        return _sample_volumes(volumes, voxels)
    out = torch.empty_like(volumes)
    for some, where, to in zip(volumes.split(SAMPLE_CHUNK), voxels.split(SAMPLE_CHUNK), out.split(SAMPLE_CHUNK)):
        _sample_slices(some, where, to)
    return out


def _sample_volumes(volumes: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
    """torch's own sampler, which counts from -1 to 1 between the outer faces of the outer voxels."""
    grid = torch.stack([(voxels[:, axis] + 0.5) * (2 / volumes.shape[2 + axis]) - 1 for axis in (2, 1, 0)], dim=-1)
    return F.grid_sample(volumes, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _sample_slices(volumes: torch.Tensor, voxels: torch.Tensor, out: torch.Tensor) -> None:
    """Trilinear sampling as two bilinear ones, in the slices below and above, into ``out``.

    torch's sampler is vectorised for images and not for volumes. So the slices lie one under the
    other in one tall image, and each of them beside its successor as a second set of channels. The
    image is padded to a power of two plus one, so that coordinates are scaled without rounding.
    Measured on one core with AVX-512, an affine view of 32^3: 1.4 ms with the sampler for volumes,
    0.4 ms so.
    """
    count, channels, depth, height, width = volumes.shape
    z, y, x = (
        voxels[:, axis].clamp(0, length - 1) for axis, length in enumerate((depth, height, width))
    )  # (n, D, H, W)
    rows, columns = 1 << (depth * height + height).bit_length(), 1 << width.bit_length()
    image = volumes.new_empty(count, 2 * channels, rows + 1, columns + 1)
    used = depth * height
    flat = volumes.reshape(count, channels, used, width)
    image[:, :channels, :used, :width] = flat
    image[:, channels:, : used - height, :width] = flat[:, :, height:]
    # Read with a weight of zero, so it must be finite.
    image[:, :channels, used : used + height + 1] = 0
    image[:, channels:, used - height : used + height + 1] = 0
    image[:, :, :, width : width + 1] = 0

    below = z.floor()
    share = z.sub_(below)[:, None]
    grid = volumes.new_empty(count, depth, height * width, 2)
    flat_grid = grid.view(count, depth, height, width, 2)
    torch.mul(x.sub_(columns / 2), 2 / columns, out=flat_grid[..., 0])
    torch.add(below.mul_(2 * height / rows).sub_(1), y, alpha=2 / rows, out=flat_grid[..., 1])
    both = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    both = both.view(count, 2, channels, depth, height, width)
    torch.lerp(both[:, 0], both[:, 1], share, out=out)


def draw_affine(count: int, size: Sequence[int], generator: torch.Generator) -> Parameters:
    return {
        "rotation": _uniform((count, 3), -ROTATION, ROTATION, generator),
        "translation": _uniform((count, 3), -TRANSLATION, TRANSLATION, generator),
        "scale": _uniform((count, 3), 1 - SCALING, 1 + SCALING, generator),
    }


def apply_affine(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandAffine, bilinear, border. A scale above 1 zooms out."""
    return _sample(volumes, _voxels(_moved(affine_matrix(parameters), volumes), volumes.shape[2:]))


def draw_elastic(count: int, size: Sequence[int], generator: torch.Generator) -> Parameters:
    return {
        "offset": torch.rand(count, 3, *size, generator=generator) * 2 - 1,
        "magnitude": _uniform((count,), *ELASTIC_MAGNITUDE, generator),
        "sigma": _uniform((count,), *ELASTIC_SIGMA, generator),
        **draw_affine(count, size, generator),
    }


def gaussian_band(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """Gaussian smoothing of a zero-padded axis as a matrix: (n,) -> (n, size, size).

    MONAI's kernel: the difference of error functions over each voxel, cut off at
    int(3 sigma + 0.5) voxels and not normalised again. As a matrix product it costs 32 multiplications
    a voxel; the kernel itself has up to 73 taps.
    """
    index = torch.arange(size, dtype=torch.float64, device=sigma.device)
    distance = (index[:, None] - index[None, :])[None]  # (1, size, size)
    scale = (0.70710678 / sigma.abs().double())[:, None, None]
    band = 0.5 * (torch.erf(scale * (distance + 0.5)) - torch.erf(scale * (distance - 0.5)))
    tail = torch.floor(torch.clamp(sigma.double() * ELASTIC_CUTOFF, min=0.5) + 0.5)
    return torch.where(distance.abs() <= tail[:, None, None], band.clamp(min=0), 0.0)


def apply_elastic(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.Rand3DElastic: smoothed random offsets of the voxel centres, then the affine."""
    size = volumes.shape[2:]
    offset = _moved(parameters["offset"], volumes)  # (n, 3, *size)
    for axis, subscripts in enumerate(("nai,ncijk->ncajk", "nbj,ncijk->ncibk", "ndk,ncijk->ncijd")):
        band = _moved(gaussian_band(parameters["sigma"], size[axis]), volumes)
        offset = torch.einsum(subscripts, band, offset)
    offset = offset * _moved(parameters["magnitude"], volumes)[:, None, None, None, None]

    return _sample(volumes, _voxels(_moved(affine_matrix(parameters), volumes), size, offset))


# ---------------------------------------------------------------- flip, noise, contrast


def draw_flip(count: int, size: Sequence[int], generator: torch.Generator) -> Parameters:
    return {"flip": torch.rand(count, 3, generator=generator) < FLIP_PROB}


def apply_flip(volumes: torch.Tensor, parameters: Parameters, generator: torch.Generator) -> torch.Tensor:
    """monai.transforms.RandFlip on each axis by itself. Not in the publication."""
    volumes = volumes.clone()
    for axis in range(3):
        chosen = _moved(parameters["flip"][:, axis].nonzero()[:, 0], volumes)
        if len(chosen):
            volumes[chosen] = volumes[chosen].flip(axis + 2)
    return volumes


def draw_noise(count: int, size: Sequence[int], generator: torch.Generator) -> Parameters:
    return {
        "chosen": (torch.rand(count, generator=generator) < NOISE_PROB).nonzero()[:, 0],
        "std": _uniform((count,), 0.0, NOISE_MAX_STD, generator),
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


def draw_contrast(count: int, size: Sequence[int], generator: torch.Generator) -> Parameters:
    return {
        "chosen": (torch.rand(count, generator=generator) < CONTRAST_PROB).nonzero()[:, 0],
        "gamma": _uniform((count,), *GAMMA, generator),
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


TRANSFORMS: dict[str, tuple[Callable, Callable]] = {
    "f": (draw_flip, apply_flip),
    "a": (draw_affine, apply_affine),
    "e": (draw_elastic, apply_elastic),
    "g": (draw_noise, apply_noise),
    "c": (draw_contrast, apply_contrast),
}


# ---------------------------------------------------------------- a training step's views


def step_generators(
    seed: int, epoch: int, location: int, step: int, rank: int, device: torch.device
) -> tuple[torch.Generator, torch.Generator]:
    """Two streams for one step of one rank: parameters on the CPU, noise on the device.

    Five numbers in, so no two steps, epochs, locations or ranks share a stream, and a resumed run
    draws what the uninterrupted one would have drawn.
    """
    state = np.random.SeedSequence([seed, epoch, location, step, rank]).generate_state(2, np.uint64)
    parameters = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
    noise = torch.Generator(device).manual_seed(int(state[1] >> np.uint64(1)))
    return parameters, noise


class Augmentation:
    """Transforms named by letters, in order: f flip, a affine, e elastic, g noise, c contrast.

    Raises:
        StoreError: an unknown letter.
    """

    def __init__(self, letters: str):
        unknown = sorted(set(letters) - set(TRANSFORMS))
        if unknown:
            raise StoreError(
                f"--augmentation {letters!r} has the unknown letter {unknown[0]!r}; known are "
                "f (flip), a (affine), e (elastic), g (Gaussian noise), c (contrast)"
            )
        self.letters = letters

    def draw(self, count: int, size: Sequence[int], generator: torch.Generator) -> list[Parameters]:
        """Parameters of ``count`` samples of spatial ``size``, one entry per letter."""
        return [TRANSFORMS[letter][0](count, size, generator) for letter in self.letters]

    def apply(
        self, volumes: torch.Tensor, parameters: Sequence[Parameters], generator: torch.Generator
    ) -> torch.Tensor:
        """Transform (n, C, D, H, W); the input is not modified. ``generator`` makes the noise."""
        for letter, drawn in zip(self.letters, parameters, strict=True):
            volumes = TRANSFORMS[letter][1](volumes, drawn, generator)
        return volumes

    def __call__(self, volumes: torch.Tensor, parameters: torch.Generator, noise: torch.Generator) -> torch.Tensor:
        """Draw for every sample and apply."""
        return self.apply(volumes, self.draw(len(volumes), volumes.shape[2:], parameters), noise)


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


def make_views(
    patches: torch.Tensor,
    neighbors: torch.Tensor,
    augmentation: Augmentation,
    generators: tuple[torch.Generator, torch.Generator],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three inputs of a step from raw HU.

    Args:
        patches: (B, 32, 32, 32).
        neighbors: (B, k, 32, 32, 32); the k of a subject are one volume and share one draw.
        augmentation: what to apply.
        generators: from :func:`step_generators`.

    Returns:
        Two independent views of the patches, each (B, 1, 32, 32, 32), and one of the neighbours,
        (B, k, 32, 32, 32); all in the network's units.
    """
    batch = len(patches)
    shifted = shift_to_zero(patches)[:, None]
    views = augmentation(torch.cat([shifted, shifted]), *generators)
    around = augmentation(shift_to_zero(neighbors), *generators)
    views = to_unit(views)
    return views[:batch], views[batch:], to_unit(around)
