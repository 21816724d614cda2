"""Augment a whole mini-batch on the training device, with the conventions of MONAI's transforms.

Each transform has a letter, and a string of letters lists the transforms to apply, in order. ``draw`` draws the
random parameters of every sample; tests pass these parameters to MONAI's transforms. ``prepare`` computes the tensors
for ``apply`` in advance, so that a step on a GPU does not wait for computations on the CPU.

All C channels of a sample are transformed with the same parameters. A patch is a sample with one channel; a subject's
patches at the k neighbouring locations are one sample with k channels. Axes are in array order, (z, y, x) for a patch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.resample import Parameters, affine_matrix, sample_trilinearly, voxel_coordinates
from misc.run.augmentation import PUBLISHED, Ranges, check_augmentation_letters
from misc.sizes import HU_MIN

ELASTIC_SIGMA = (8.0, 12.0)  # voxels
ELASTIC_CUTOFF = 3.0  # standard deviations
CONTRAST_EPSILON = 1e-7
FLIP_PROB = 0.5
SMOOTH_CUTOFF = 4.0  # standard deviations, as monai.transforms.GaussianSmooth
SMOOTH_LEAST = 0.05  # voxels; a smaller sigma has no effect, and the kernel is undefined for 0
DETAIL_SIGMA = 1.0  # voxels; fine detail is the image minus a copy smoothed with this sigma
LUNG_HU, TISSUE_HU = -500.0, 0.0  # breathing has its full effect on density below LUNG_HU, and none above TISSUE_HU

Noise = Callable[[torch.Tensor], torch.Tensor]  # returns normal noise of unit variance in the shape of its argument


def draw_uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def broadcast_to_volumes(values: torch.Tensor) -> torch.Tensor:
    """Reshape (n,) to (n, 1, 1, 1, 1), to broadcast with volumes."""
    return values[:, None, None, None, None]


def apply_to_chosen(
    chosen: torch.Tensor,
    work: Callable[..., torch.Tensor],
    volumes: torch.Tensor,
    *parameters: torch.Tensor,
    dense: bool,
) -> torch.Tensor:
    """Apply ``work(volumes, *parameters)`` to the samples in ``chosen``, (n,) bool, and leave other samples unchanged.

    With ``dense``, all samples are computed, so that tensor sizes do not depend on the random draws. A CUDA graph needs
    constant tensor sizes. Without ``dense``, only the samples in ``chosen`` are computed, which is faster on a CPU.
    """
    if dense:
        return torch.where(broadcast_to_volumes(chosen), work(volumes, *parameters), volumes)
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        return volumes
    return volumes.index_copy(0, rows, work(volumes[rows], *(values[rows] for values in parameters)))


# ---------------------------------------------------------------- affine, elastic


def draw_affine(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    rotate = math.radians(ranges.rotate)
    return {
        "rotation": draw_uniform((count, 3), -rotate, rotate, generator),
        "translation": draw_uniform((count, 3), -ranges.translate, ranges.translate, generator),
        "scale": draw_uniform((count, 3), 1 - ranges.scale, 1 + ranges.scale, generator),
    }


def prepare_affine(parameters: Parameters, size: Sequence[int]) -> Parameters:
    return {"matrix": affine_matrix(parameters)}


def apply_affine(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.RandAffine with bilinear interpolation and border padding.

    A scale above 1 zooms out.
    """
    return sample_trilinearly(volumes, voxel_coordinates(parameters["matrix"], volumes.shape[2:]))


def draw_elastic(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {
        "offset": torch.rand(count, 3, *size, generator=generator) * 2 - 1,
        "magnitude": draw_uniform((count,), 0.0, ranges.elastic, generator),
        "sigma": draw_uniform((count,), *ELASTIC_SIGMA, generator),
        **draw_affine(count, size, generator, ranges),
    }


def make_gaussian_bands(sigma: torch.Tensor, size: int, cutoff: float = ELASTIC_CUTOFF) -> torch.Tensor:
    """Return the matrix that smooths a zero-padded axis with a Gaussian: sigma (n,) -> (n, size, size).

    The kernel is MONAI's: the difference of error functions over each voxel, cut off at int(cutoff * sigma + 0.5)
    voxels and not renormalised. For an axis of 32 voxels, the matrix product needs 32 multiplications per voxel; a
    convolution with this kernel needs up to 73.
    """
    index = torch.arange(size, dtype=torch.float64, device=sigma.device)
    distance = (index[:, None] - index[None, :])[None]  # (1, size, size)
    scale = (0.70710678 / sigma.abs().double())[:, None, None]
    band = 0.5 * (torch.erf(scale * (distance + 0.5)) - torch.erf(scale * (distance - 0.5)))
    tail = torch.floor(torch.clamp(sigma.double() * cutoff, min=0.5) + 0.5)
    return torch.where(distance.abs() <= tail[:, None, None], band.clamp(min=0), 0.0)


def smooth_along_axes(volumes: torch.Tensor, parameters: Parameters, axes: Sequence[int] = (0, 1, 2)) -> torch.Tensor:
    """Multiply volumes (n, C, D, H, W) by the band matrix (n, size, size) of each sample, along each axis in turn."""
    for axis in axes:
        subscripts = ("nai,ncijk->ncajk", "nbj,ncijk->ncibk", "ndk,ncijk->ncijd")[axis]
        volumes = torch.einsum(subscripts, parameters[f"band{axis}"], volumes)
    return volumes


def prepare_elastic(parameters: Parameters, size: Sequence[int]) -> Parameters:
    bands = {f"band{axis}": make_gaussian_bands(parameters["sigma"], length) for axis, length in enumerate(size)}
    offset = {"offset": parameters["offset"], "magnitude": parameters["magnitude"]}
    return offset | bands | prepare_affine(parameters, size)


def apply_elastic(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.Rand3DElastic: add smoothed random offsets, and apply the affine transform."""
    offset = smooth_along_axes(parameters["offset"], parameters) * broadcast_to_volumes(
        parameters["magnitude"]
    )  # (n, 3, *size)
    return sample_trilinearly(volumes, voxel_coordinates(parameters["matrix"], volumes.shape[2:], offset))


# ---------------------------------------------------------------- flip, noise, contrast


def draw_flip(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {"flip": torch.rand(count, 3, generator=generator) < FLIP_PROB}


def apply_flip(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.RandFlip, independently on each axis.

    This transform is not in the published method.
    """
    for axis, chosen in enumerate(parameters["flip"].bool().unbind(dim=1), start=2):
        volumes = apply_to_chosen(chosen, lambda some, axis=axis: some.flip(axis), volumes, dense=dense)
    return volumes


def draw_noise(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {
        "chosen": torch.rand(count, generator=generator) < ranges.noise_prob,
        "std": draw_uniform((count,), 0.0, ranges.noise_std, generator),
    }


def apply_noise(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.RandGaussianNoise, with a random standard deviation."""

    def add_scaled_noise(values: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return values + noise(values) * broadcast_to_volumes(std)

    return apply_to_chosen(parameters["chosen"].bool(), add_scaled_noise, volumes, parameters["std"], dense=dense)


def draw_contrast(
    count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED
) -> Parameters:
    return {
        "chosen": torch.rand(count, generator=generator) < ranges.contrast_prob,
        "gamma": draw_uniform((count,), *ranges.gamma, generator),
    }


def apply_contrast(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.RandAdjustContrast: gamma correction between minimum and maximum of all channels."""

    def apply_gamma(chosen: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        low, high = chosen.flatten(1).aminmax(dim=1)
        low, span = broadcast_to_volumes(low), broadcast_to_volumes(high - low)
        return ((chosen - low) / (span + CONTRAST_EPSILON)).pow(broadcast_to_volumes(gamma)) * span + low

    return apply_to_chosen(parameters["chosen"].bool(), apply_gamma, volumes, parameters["gamma"], dense=dense)


# ---------------------------------------------------------------- smoothing, shift


def draw_smooth(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {"sigma": draw_uniform((count, 3), 0.0, ranges.smooth, generator)}


def make_normalized_bands(sigma: torch.Tensor, size: Sequence[int], axes: Sequence[int]) -> Parameters:
    """Make the smoothing matrix for each axis in ``axes``; ``sigma`` (n, len(axes)) has one column per axis.

    The weights of the voxels inside the volume are normalised to a sum of 1. MONAI's zero padding would darken the
    border.
    """
    bands = {}
    for column, axis in enumerate(axes):
        band = make_gaussian_bands(sigma[:, column].clamp(min=SMOOTH_LEAST), size[axis], SMOOTH_CUTOFF)
        bands[f"band{axis}"] = band / band.sum(dim=2, keepdim=True)  # (n, length, length)
    return bands


def prepare_smooth(parameters: Parameters, size: Sequence[int]) -> Parameters:
    return make_normalized_bands(parameters["sigma"], size, axes=(0, 1, 2))


def apply_smooth(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.RandGaussianSmooth, with one sigma per axis, to imitate smoother scans.

    This transform is not in the published method.
    """
    return smooth_along_axes(volumes, parameters)


def draw_intensity_shift(
    count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED
) -> Parameters:
    return {"offset": draw_uniform((count,), -ranges.shift, ranges.shift, generator)}


def apply_intensity_shift(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Reproduce monai.transforms.RandShiftIntensity: add one HU offset to all voxels of a volume.

    This transform is not in the published method.

    A deeper breath lowers the HU of the lung.
    """
    return volumes + broadcast_to_volumes(parameters["offset"])


# ---------------------------------------------------------------- breath, kernel, slice thickness


def draw_breath(count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED) -> Parameters:
    return {"growth": draw_uniform((count,), 1 - ranges.breath, 1 + ranges.breath, generator)}


def apply_breath(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Expand the lung by a factor and reduce its density to preserve its mass; the density of soft tissue is unchanged.

    This transform is not in the published method.
    """
    growth = parameters["growth"]
    zoom = torch.diag_embed(growth.pow(-1 / 3)[:, None].expand(-1, 3))  # (n, 3, 3)
    volumes = sample_trilinearly(volumes, voxel_coordinates(F.pad(zoom, (0, 1)), volumes.shape[2:]))
    vacuum, lung, tissue = (value - HU_MIN for value in (-1000.0, LUNG_HU, TISSUE_HU))  # volumes hold HU - HU_MIN
    # Fraction of each voxel that changes volume with breathing.
    share = ((tissue - volumes) / (tissue - lung)).clamp(0, 1)
    return volumes + share * (volumes - vacuum) * (1 / broadcast_to_volumes(growth) - 1)


def draw_recon_kernel(
    count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED
) -> Parameters:
    return {"amount": draw_uniform((count,), -ranges.kernel, ranges.kernel, generator)}


def prepare_recon_kernel(parameters: Parameters, size: Sequence[int]) -> Parameters:
    sigma = torch.full((len(parameters["amount"]), 2), DETAIL_SIGMA)
    return parameters | make_normalized_bands(sigma, size, axes=(1, 2))


def apply_recon_kernel(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Sharpen or soften fine detail in the axial plane, including noise.

    This transform is not in the published method.
    """
    return volumes + broadcast_to_volumes(parameters["amount"]) * (
        volumes - smooth_along_axes(volumes, parameters, axes=(1, 2))
    )


def draw_thickness(
    count: int, size: Sequence[int], generator: torch.Generator, ranges: Ranges = PUBLISHED
) -> Parameters:
    return {"sigma": draw_uniform((count, 1), 0.0, ranges.thickness, generator)}


def prepare_thickness(parameters: Parameters, size: Sequence[int]) -> Parameters:
    return make_normalized_bands(parameters["sigma"], size, axes=(0,))


def apply_thickness(volumes: torch.Tensor, parameters: Parameters, noise: Noise, dense: bool) -> torch.Tensor:
    """Smooth along z only, to imitate thicker slices.

    This transform is not in the published method.
    """
    return smooth_along_axes(volumes, parameters, axes=(0,))


class Transform(NamedTuple):
    """The functions of one transform."""

    draw: Callable[[int, Sequence[int], torch.Generator, Ranges], Parameters]
    apply: Callable[[torch.Tensor, Parameters, Noise, bool], torch.Tensor]
    prepare: Callable[[Parameters, Sequence[int]], Parameters] = lambda parameters, size: parameters


TRANSFORMS = {  # the names and ranges of the transforms are in misc/run/augmentation.py
    "f": Transform(draw_flip, apply_flip),
    "a": Transform(draw_affine, apply_affine, prepare_affine),
    "e": Transform(draw_elastic, apply_elastic, prepare_elastic),
    "g": Transform(draw_noise, apply_noise),
    "c": Transform(draw_contrast, apply_contrast),
    "s": Transform(draw_smooth, apply_smooth, prepare_smooth),
    "i": Transform(draw_intensity_shift, apply_intensity_shift),
    "b": Transform(draw_breath, apply_breath),
    "k": Transform(draw_recon_kernel, apply_recon_kernel, prepare_recon_kernel),
    "t": Transform(draw_thickness, apply_thickness, prepare_thickness),
}


# ---------------------------------------------------------------- sequence of transforms


class Augmentation:
    """A sequence of transforms, given by letters of TRANSFORMS, with parameters drawn from ``ranges``.

    Raises:
        UserError: a letter does not stand for a transform.
    """

    def __init__(self, transform_letters: str, ranges: Ranges = PUBLISHED):
        check_augmentation_letters(transform_letters)
        self.letters, self.ranges = transform_letters, ranges

    def draw_parameters(self, count: int, size: Sequence[int], generator: torch.Generator) -> list[Parameters]:
        """Draw the parameters of ``count`` samples with spatial shape ``size``; return one entry per transform."""
        return [TRANSFORMS[letter].draw(count, size, generator, self.ranges) for letter in self.letters]

    def prepare_parameters(self, drawn_parameters: Sequence[Parameters], size: Sequence[int]) -> list[Parameters]:
        """Compute the tensors that ``apply`` needs, each (n, ...), from the drawn parameters."""
        pairs = zip(self.letters, drawn_parameters, strict=True)
        return [TRANSFORMS[letter].prepare(parameters, size) for letter, parameters in pairs]

    def pack_parameters(self, parameters_per_transform: Sequence[Parameters], sample_count: int) -> torch.Tensor:
        """Pack all prepared tensors into one tensor, (count, W) float32, which needs a single copy to a GPU."""
        values = [value for parameters in parameters_per_transform for value in parameters.values()]
        packed = [value.reshape(sample_count, -1).to(torch.float32) for value in values]
        return torch.cat(packed, dim=1) if packed else torch.zeros(sample_count, 0)

    def unpack_parameters(self, packed_parameters: torch.Tensor, size: Sequence[int]) -> list[Parameters]:
        """Invert :meth:`pack_parameters`; the returned tensors are views of ``packed_parameters``."""
        shapes = [
            {name: value.shape[1:] for name, value in some.items()}
            for some in self.prepare_example_parameters(tuple(size))
        ]
        values = iter(packed_parameters.split([math.prod(shape) for some in shapes for shape in some.values()], dim=1))
        count = len(packed_parameters)
        return [{name: next(values).reshape(count, *shape) for name, shape in some.items()} for some in shapes]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a process makes only one or two Augmentation objects
    def prepare_example_parameters(self, size: tuple[int, ...]) -> list[Parameters]:
        """Prepare the parameters of one sample as an example of the shapes that :meth:`unpack_parameters` needs."""
        return self.prepare_parameters(self.draw_parameters(1, size, torch.Generator()), size)

    def apply(
        self, volumes: torch.Tensor, prepared: Sequence[Parameters], noise: Noise, dense: bool = False
    ) -> torch.Tensor:
        """Transform volumes (n, C, D, H, W); the input is not modified.

        Args:
            volumes: HU + 1024, in [0, 1264].
            prepared: tensors from :meth:`prepare_parameters` or :meth:`unpack_parameters`.
            noise: function that makes the noise of transform ``g``.
            dense: as in :func:`apply_to_chosen`.
        """
        for letter, parameters in zip(self.letters, prepared, strict=True):
            parameters = {name: value.to(volumes) for name, value in parameters.items()}
            volumes = TRANSFORMS[letter].apply(volumes, parameters, noise, dense)
        return volumes
