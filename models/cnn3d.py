"""The location-conditioned encoder: maps a 32 x 32 x 32 patch and its location to a representation.

Module names, and therefore state-dict keys, match the published checkpoint.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.condconv3d import CondConv3D, channels_last
from models.fast.groups import encode_bn_groups_in_parallel
from models.fast.norm_elu import norm_elu as fast_norm_elu

# The last three layers stay in float32 under autocast, because their outputs have only 8, 8 and 1 voxels per patch.
# With few values per channel, BatchNorm amplifies small differences, and bfloat16 can round all values to one number.
# If all values are equal, the variance is 0, and BatchNorm multiplies the gradient by 1 / sqrt(eps).
# With the last three layers in bfloat16, training with batches of 3 patches collapsed within ten steps.
# Float32 costs little time here, because the last three layers perform only 3 % of the arithmetic.
FLOAT32_LAYERS = 3


def conv3x3x3(
    in_channels: int, out_channels: int, num_experts: int, num_coordinates: int, stride: int = 1
) -> CondConv3D:
    """Create a 3 x 3 x 3 conditional convolution with padding 1."""
    return CondConv3D(in_channels, out_channels, 3, num_experts, num_coordinates, stride=stride, padding=1)


def norm_elu(
    norm: nn.BatchNorm3d, blocks: Sequence[torch.Tensor], groups: int = 1, track: bool = True
) -> list[torch.Tensor]:
    """Compute elu(norm(x)) for a batch in blocks (n, C, D, H, W).

    In training, each group of samples has its own BatchNorm statistics.

    Args:
        norm: the BatchNorm layer.
        blocks: consecutive parts of the batch. A block of n samples contains n / groups consecutive samples of
            every group.
        groups: number of BatchNorm groups; must divide n.
        track: whether group 0 updates the running statistics.
    """
    result = fast_norm_elu(norm, blocks, groups, track)
    if result is not None:
        return result
    if not norm.training:
        return [F.elu(norm(block), inplace=True) for block in blocks]
    of_groups = zip(*(_split_batch(block, groups) for block in blocks))  # for each group, its samples in every block
    done = [
        _split_batch(_norm_elu_in_training(norm, _join_batch_parts(parts), track and group == 0), len(blocks))
        for group, parts in enumerate(of_groups)
    ]
    return [_join_batch_parts(parts) for parts in zip(*done)]


def _split_batch(x: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """Split a batch into ``count`` equal consecutive parts. If ``count`` is 1, the only part is the batch itself."""
    return (x,) if count == 1 else x.chunk(count)


def _join_batch_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Invert :func:`_split_batch`. The result is channels-last if all parts are channels-last."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _norm_elu_in_training(norm: nn.BatchNorm3d, x: torch.Tensor, track: bool) -> torch.Tensor:
    """Compute elu(norm(x)) for x (B, C, D, H, W), the samples of one group."""
    if track and norm.momentum is None:  # the layer averages its statistics over all passes
        return F.elu(norm(x), inplace=True)
    images = _flatten_volumes_to_images_on_gpu(x)
    running = (norm.running_mean, norm.running_var) if track else (None, None)
    if track:
        norm.num_batches_tracked += 1
    y = F.batch_norm(images, *running, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    return F.elu(y, inplace=True).view(x.shape)  # in place, because no backward pass needs y


def _flatten_volumes_to_images_on_gpu(volumes: torch.Tensor) -> torch.Tensor:
    """View (B, C, D, H, W) as images (B, C, D H, W) on a GPU, where channels-last BatchNorm supports only images.

    On a CPU, return ``volumes`` unchanged, because BatchNorm on a CPU is faster for volumes than for images. For shape
    (4, 8, 32, 32, 32), a forward and backward pass of BatchNorm and ELU takes 6.3 ms, but 10.0 ms after flattening.
    """
    return volumes if volumes.device.type == "cpu" else volumes.flatten(2, 3)


def count_location_blocks(x: torch.Tensor, kernels: Sequence[torch.Tensor]) -> int:
    """Return the number of blocks of consecutive samples that share a location.

    Return G for kernels (G, ...), or 1 if every sample has its own location.
    """
    locations = len(kernels[0])
    if locations == 0 or len(x) % locations:
        raise ValueError(f"a batch of {len(x)} samples cannot be divided evenly among {locations} locations")
    return locations if locations < len(x) else 1


class Block(nn.Module):
    """Three convolutions: the first one doubles the channels, and the third one halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_experts: int, num_coordinates: int):
        super().__init__()
        self.conv1 = conv3x3x3(in_channels, out_channels, num_experts, num_coordinates)
        self.bn1 = nn.BatchNorm3d(out_channels)
        self.conv2 = conv3x3x3(out_channels, out_channels, num_experts, num_coordinates)
        self.bn2 = nn.BatchNorm3d(out_channels)
        self.conv3 = conv3x3x3(out_channels, out_channels, num_experts, num_coordinates, stride=2)
        self.bn3 = nn.BatchNorm3d(out_channels)

    def layers(self) -> Iterator[tuple[CondConv3D, nn.BatchNorm3d]]:
        """Yield the convolutions in order, each with the normalisation that follows it."""
        yield from ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))


class Encoder(nn.Module):
    """Map a patch and its location to (z, h): h is the representation, and z is its projection for the loss.

    Args:
        rep_dim: size of h.
        moco_dim: size of z.
        num_experts: number of kernels that every convolution mixes.
        num_coordinates: number of 3-D points per location; DrasCLR uses 1.

    Attributes:
        bn_groups: number of groups of consecutive samples with separate BatchNorm statistics in training. If
            the batch consists of several blocks with one location each, every block must contain equally many samples
            of every group.
    """

    bn_groups = 1

    def __init__(self, rep_dim: int, moco_dim: int, num_experts: int, num_coordinates: int):
        super().__init__()
        experts = (num_experts, num_coordinates)
        self.conv1 = conv3x3x3(1, 8, *experts)
        self.bn1 = nn.BatchNorm3d(8)
        self.conv2 = conv3x3x3(8, 8, *experts, stride=2)
        self.bn2 = nn.BatchNorm3d(8)
        self.downsample1 = Block(8, 16, *experts)
        self.downsample2 = Block(16, 32, *experts)
        self.downsample3 = Block(32, 64, *experts)
        self.conv3 = conv3x3x3(64, 128, *experts)
        self.bn3 = nn.BatchNorm3d(128)
        self.conv4 = conv3x3x3(128, rep_dim, *experts, stride=2)
        self.bn4 = nn.BatchNorm3d(rep_dim)
        self.fc = nn.Linear(rep_dim, moco_dim)

    def layers(self) -> Iterator[tuple[CondConv3D, nn.BatchNorm3d]]:
        """Yield the convolutions in order, each with its normalisation. An ELU follows each normalisation."""
        yield from ((self.conv1, self.bn1), (self.conv2, self.bn2))  # outputs: 8 x 32^3, 8 x 16^3
        yield from self.downsample1.layers()  # output: 16 x 8^3
        yield from self.downsample2.layers()  # output: 32 x 4^3
        yield from self.downsample3.layers()  # output: 64 x 2^3
        yield from ((self.conv3, self.bn3), (self.conv4, self.bn4))  # outputs: 128 x 2^3, rep_dim x 1^3

    def forward(self, x: torch.Tensor, loc: torch.Tensor, *kernels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a batch of patches.

        Args:
            x: (B, 1, 32, 32, 32), intensities in [-1, 1].
            loc: (G, 3) normalised locations, where G divides B; see :meth:`CondConv3D.forward`.
            kernels: kernels of every layer at ``loc`` from :meth:`mix_kernels` (default: mix them from ``loc``).

        Returns:
            z (B, moco_dim) and h (B, rep_dim).
        """
        kernels = kernels or self.mix_kernels(loc)
        encoded = encode_bn_groups_in_parallel(self, x, kernels, self.bn_groups)
        return self.encode(x, kernels, self.bn_groups) if encoded is None else encoded

    def mix_kernels(self, loc: torch.Tensor) -> list[torch.Tensor]:
        """Mix the kernels of every layer for (G, 3) locations: one (G, out, in, 3, 3, 3) tensor per layer."""
        convolutions = [conv for conv, _ in self.layers()]
        kernels = [conv.mix_kernels(loc) for conv in convolutions[:-FLOAT32_LAYERS]]
        with torch.autocast(loc.device.type, enabled=False):
            return kernels + [conv.mix_kernels(loc) for conv in convolutions[-FLOAT32_LAYERS:]]

    def encode(
        self, x: torch.Tensor, kernels: Sequence[torch.Tensor], groups: int = 1, track: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run :meth:`forward` with the ``kernels`` of :meth:`mix_kernels`.

        For ``groups`` and ``track``, see :func:`norm_elu`.
        """
        layers = [(conv, kernel, norm) for (conv, norm), kernel in zip(self.layers(), kernels, strict=True)]
        blocks = channels_last(x).chunk(count_location_blocks(x, kernels))  # G blocks of (B / G, 1, 32, 32, 32)
        for conv, kernel, norm in layers[:-FLOAT32_LAYERS]:
            blocks = norm_elu(norm, self._convolve(conv, blocks, kernel), groups, track)
        with torch.autocast(x.device.type, enabled=False):
            blocks = [block.to(self.bn4.weight.dtype) for block in blocks]
            for conv, kernel, norm in layers[-FLOAT32_LAYERS:]:
                blocks = norm_elu(norm, self._convolve(conv, blocks, kernel), groups, track)
            h = torch.cat(blocks).flatten(1)  # (B, rep_dim)
            return self.fc(h), h

    @staticmethod
    def _convolve(conv: CondConv3D, blocks: Sequence[torch.Tensor], kernels: torch.Tensor) -> list[torch.Tensor]:
        """Convolve each block with the kernel of its location.

        If there is only one block, each sample may have its own kernel.
        """
        return [conv.convolve(blocks[0], kernels)] if len(blocks) == 1 else conv.convolve_blocks(blocks, kernels)
