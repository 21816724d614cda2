"""The location-conditioned encoder: a 32 x 32 x 32 patch and where it lies -> a representation.

Module names, and so the keys of a state dict, are the published checkpoint's.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.condconv3d import CondConv3D

PATCH_SIZE = 32  # voxels; five halvings take it to 1, so that h has rep_dim numbers


def conv3x3x3(in_channels: int, out_channels: int, num_experts: int, num_coordinates: int, stride: int = 1):
    """3 x 3 x 3 conditional convolution with padding 1."""
    return CondConv3D(in_channels, out_channels, 3, num_experts, num_coordinates, stride=stride, padding=1)


def norm_elu(norm: nn.BatchNorm3d, x: torch.Tensor) -> torch.Tensor:
    """BatchNorm, then ELU in place: the backward pass of neither needs the value in between."""
    return F.elu(norm(x), inplace=True)


class Block(nn.Module):
    """Three convolutions; the first doubles the channels, the third halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_experts: int, num_coordinates: int):
        super().__init__()
        self.conv1 = conv3x3x3(in_channels, out_channels, num_experts, num_coordinates)
        self.bn1 = nn.BatchNorm3d(out_channels)
        self.conv2 = conv3x3x3(out_channels, out_channels, num_experts, num_coordinates)
        self.bn2 = nn.BatchNorm3d(out_channels)
        self.conv3 = conv3x3x3(out_channels, out_channels, num_experts, num_coordinates, stride=2)
        self.bn3 = nn.BatchNorm3d(out_channels)

    def forward(self, x: torch.Tensor, loc: torch.Tensor) -> torch.Tensor:
        x = norm_elu(self.bn1, self.conv1(x, loc))
        x = norm_elu(self.bn2, self.conv2(x, loc))
        return norm_elu(self.bn3, self.conv3(x, loc))


class Encoder(nn.Module):
    """Patch and location -> (z, h): h is the representation, z its projection for the loss.

    Args:
        rep_dim: size of h.
        moco_dim: size of z.
        num_experts: kernels that every convolution mixes.
        num_coordinates: 3-D points in one location; DrasCLR uses 1.
    """

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

    def forward(self, x: torch.Tensor, loc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a batch of patches.

        Args:
            x: (B, 1, 32, 32, 32), intensities in [-1, 1].
            loc: (G, 3) normalised locations, G divides B; see :meth:`CondConv3D.forward`.

        Returns:
            z (B, moco_dim) and h (B, rep_dim).
        """
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = norm_elu(self.bn1, self.conv1(x, loc))  # (B, 8, 32, 32, 32)
        x = norm_elu(self.bn2, self.conv2(x, loc))  # (B, 8, 16, 16, 16)
        x = self.downsample1(x, loc)  # (B, 16, 8, 8, 8)
        x = self.downsample2(x, loc)  # (B, 32, 4, 4, 4)
        x = self.downsample3(x, loc)  # (B, 64, 2, 2, 2)
        x = norm_elu(self.bn3, self.conv3(x, loc))  # (B, 128, 2, 2, 2)
        x = norm_elu(self.bn4, self.conv4(x, loc))  # (B, rep_dim, 1, 1, 1)
        h = x.flatten(1)
        return self.fc(h), h
