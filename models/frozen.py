"""The encoder frozen at one location, for inference: ordinary convolutions with folded BatchNorm."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.cnn3d import Encoder
from models.condconv3d import channels_last, dense_conv3d
from models.fast.fused import conv_elu
from models.fast.pieces import PATCHES_AT_ONCE, encode_in_pieces

AT_ONCE = 64  # patches per call in encode_patch_per_location; with 8 experts, the first layer then takes 0.5 GB
SUMMARIZED = 2**20  # number of values summarised at once on the CPU, so that these values stay in the CPU cache
LOCATIONS_AT_ONCE = 8  # number of locations to compute kernels for at a time; 33 MB in float32 at the published sizes

Prepare = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


class Layer(NamedTuple):
    """A convolution and the ELU after it."""

    kernel: torch.Tensor  # (out, in, 3, 3, 3)
    bias: torch.Tensor  # (out,)
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]


class FrozenEncoder:
    """Encoder in eval mode that computes representations h of patches at one location.

    At a fixed location, a conditional convolution is an ordinary convolution. BatchNorm with fixed
    statistics is a factor and an offset per output channel, which are folded into the kernel and the bias:

        norm(conv(x)) = (gamma / s) * (kernel * x + bias - mean) + beta,  s = sqrt(var + eps)

    Each layer is then one dense convolution and an ELU. Use :func:`freeze_at_locations` to create an instance.
    """

    def __init__(self, layers: list[Layer]):
        self._layers = layers

    def __call__(self, x: torch.Tensor, prepare: Prepare = torch.Tensor.to, layers: bool = False) -> torch.Tensor:
        """Encode a batch of patches.

        Args:
            x: patches (B, 1, 32, 32, 32) in [-1, 1], or a tensor that ``prepare`` converts to such patches.
            prepare: called as ``prepare(x, dtype)`` on each piece of the batch before it is encoded.
            layers: whether to append the result of :func:`compute_channel_means_and_sds` for every layer.

        Returns:
            h (B, rep_dim) float32, or (B, rep_dim + W) with ``layers``; :func:`count_layer_features` returns W.
        """
        encoded = encode_in_pieces(lambda piece: self._compute_representations(piece, prepare, layers), x)
        return self._compute_representations(x, prepare, layers) if encoded is None else encoded

    @torch.no_grad()
    def _compute_representations(
        self, patches: torch.Tensor, convert_input: Prepare, add_layer_features: bool
    ) -> torch.Tensor:
        patches = convert_input(patches, self._layers[0].kernel.dtype)  # (B, 1, 32, 32, 32)
        patches = channels_last(patches)
        one_pass = patches.device.type == "cpu" and len(patches) == PATCHES_AT_ONCE
        summaries = []
        for kernel, bias, stride, padding in self._layers:
            if one_pass:
                patches = dense_conv3d(patches, kernel, bias, stride, padding, convolve=conv_elu)  # (B, out, D, H, W)
            else:
                patches = F.elu_(
                    dense_conv3d(patches, kernel, bias, stride, padding, convolve=F.conv3d)
                )  # (B, out, D, H, W)
            if add_layer_features:
                summaries.append(compute_channel_means_and_sds(patches))
        return torch.cat([patches.flatten(1).float(), *summaries], dim=1)  # (B, rep_dim [+ W])


def count_layer_features(encoder: Encoder) -> int:
    """Return W, the number of layer summaries per patch: a mean and an SD for each channel of each layer."""
    return sum(2 * conv.out_channels for conv, _ in encoder.layers())


def compute_channel_means_and_sds(x: torch.Tensor) -> torch.Tensor:
    """Compute mean and SD of every channel in each patch: (B, C, D, H, W) -> (B, 2 C) float32, means first."""
    some = max(1, SUMMARIZED // x[0].numel()) if x.device.type == "cpu" else len(x)
    found = []
    for part in x.split(some):
        voxels = part.permute(0, 2, 3, 4, 1).flatten(1, 3).float()  # (b, D H W, C)
        mean = voxels.mean(dim=1)  # (b, C)
        squares = (voxels - mean[:, None]).square_().mean(dim=1)  # (b, C)
        found.append(torch.cat([mean, squares.sqrt_()], dim=1))
    return torch.cat(found)


@torch.no_grad()
def encode_patch_per_location(
    encoder: Encoder,
    patches: torch.Tensor,
    locs: torch.Tensor,
    convert_input: Prepare = torch.Tensor.to,
    add_layer_features: bool = False,
    patches_at_once: int = AT_ONCE,
) -> torch.Tensor:
    """Compute representations h of one patch per location: apply every expert to every patch, then mix the results.

    A convolution is linear in its kernel, so mixing the experts' results gives the result of the mixed kernel. The
    amount of arithmetic is multiplied by the number of experts, but only a few large calls are needed. On a GPU, a few
    large calls are faster than launching the layers for each location separately.

    Args:
        encoder: encoder in eval mode, on the device.
        patches: patches (L, 1, 32, 32, 32) in [-1, 1], or a tensor that ``convert_input`` converts to such patches.
        locs: (L, 3) normalised locations.
        convert_input, add_layer_features: see :class:`FrozenEncoder`.
        patches_at_once: patches to encode in one call.

    Returns:
        (L, rep_dim) float32, or (L, rep_dim + W) with ``add_layer_features``.
    """
    results = []
    for some, where in zip(patches.split(patches_at_once), locs.split(patches_at_once)):
        some = channels_last(convert_input(some, torch.float32))  # (n, 1, 32, 32, 32)
        summaries = []
        for conv, norm in encoder.layers():
            experts = channels_last(conv.weight.flatten(0, 1))  # (experts * out, in, 3, 3, 3)
            routing = conv._routing_fn(where)  # (n, experts)
            apart = F.conv3d(some, experts, None, conv.stride, conv.padding)  # (n, experts * out, D, H, W)
            mixed = torch.einsum("ne,neodhw->nodhw", routing, apart.unflatten(1, (conv.num_experts, -1)))
            some = F.elu_(norm(mixed + conv.bias[:, None, None, None]))
            if add_layer_features:
                summaries.append(compute_channel_means_and_sds(some))
        results.append(torch.cat([some.flatten(1), *summaries], dim=1))
    return torch.cat(results)


@torch.no_grad()
def freeze_at_locations(
    encoder: Encoder, locs: torch.Tensor, dtype: torch.dtype = torch.float32
) -> list[FrozenEncoder]:
    """Freeze the encoder at each location. The kernels of the experts are read from memory once for all locations.

    Args:
        encoder: encoder to freeze; later changes to it have no effect on the result.
        locs: (G, 3) normalised locations.
        dtype: data type of the computation, float32 or bfloat16.
    """
    layers: list[list[Layer]] = [[] for _ in locs]
    for conv, norm in encoder.layers():
        factor = (norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)).float()  # (out,)
        bias = ((conv.bias - norm.running_mean) * factor + norm.bias).to(dtype)  # (out,)
        for of_location, kernel in zip(layers, conv.mix_kernels(locs)):
            kernel = (kernel * factor[:, None, None, None, None]).to(dtype)  # (out, in, 3, 3, 3)
            of_location.append(Layer(channels_last(kernel), bias, conv.stride, conv.padding))
    return [FrozenEncoder(of_location) for of_location in layers]


class FrozenLocations:
    """Sequence of frozen encoders, one per location. LOCATIONS_AT_ONCE encoders are created at a time.

    The grouping of locations into calls is fixed, so that a resumed extraction gives the same rounding errors.

    Args:
        encoder, dtype: see :func:`freeze_at_locations`.
        locations: (L, 3) normalised locations, on the encoder's device.
    """

    def __init__(self, encoder: Encoder, locations: torch.Tensor, dtype: torch.dtype = torch.float32):
        self.encoder, self.locations, self.dtype = encoder, locations, dtype
        self._first, self._frozen = -1, []

    def __getitem__(self, location: int) -> FrozenEncoder:
        first = location - location % LOCATIONS_AT_ONCE
        if first != self._first:
            some = self.locations[first : first + LOCATIONS_AT_ONCE]
            self._first, self._frozen = first, freeze_at_locations(self.encoder, some, self.dtype)
        return self._frozen[location - first]
