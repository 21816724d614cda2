"""Location-conditioned 3-D convolution: one kernel per location, mixed from a few experts.

DrasCLR (Yu et al., Medical Image Analysis 2024), section on the conditional encoder; the idea is
CondConv (Yang et al., NeurIPS 2019) with the routing driven by where a patch lies, not by what it
shows:  kernel(loc) = sum_e sigmoid(W loc + b)_e * weight_e.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _triple

from models.fast.pairs import convolve_pairs


class Routing(nn.Module):
    """Location -> one weight in (0, 1) per expert: (G, 3 * num_coordinates) -> (G, experts)."""

    def __init__(self, num_coordinates: int, num_experts: int):
        super().__init__()
        self.fc = nn.Linear(3 * num_coordinates, num_experts)

    def forward(self, locs: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.fc(locs))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, D, H, W) with the channels of a voxel side by side in memory, copied if they are not.

    For one channel both orders are the same memory, and torch's ``contiguous`` leaves the strides as they are. They
    still decide what a convolution returns: without these, every layer would run channels-first.
    """
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last_3d)
    depth, height, width = x.shape[2:]
    return x.contiguous().as_strided(x.shape, (depth * height * width, 1, height * width, width, 1))


def dense_conv3d(
    inputs: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int, int],
    padding: int | str | tuple[int, int, int],
    dilation: tuple[int, int, int] = (1, 1, 1),
    groups: int = 1,
    convolve: Callable[..., torch.Tensor] = F.conv3d,
) -> torch.Tensor:
    """F.conv3d in the layout of the inputs. ``convolve`` may add what is done number by number, an activation."""
    fast = convolve_pairs(inputs, kernel, bias, (tuple(stride), padding, tuple(dilation), groups), convolve)
    if fast is not None:
        return fast
    if inputs.is_contiguous(memory_format=torch.channels_last_3d):
        kernel = channels_last(kernel)
    return convolve(inputs, kernel, bias, stride, padding, dilation, groups)


class CondConv3D(_ConvNd):
    """3-D convolution whose kernel depends on the location of the patch.

    Parameters are ``weight`` (experts, out, in / groups, k, k, k), one ``bias`` (out,) that the
    experts share, and ``_routing_fn.fc``; these are the published checkpoint's names. The other
    arguments mean what they mean for :class:`torch.nn.Conv3d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        num_experts: int,
        num_coordinates: int,
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ):
        super().__init__(
            in_channels,
            out_channels,
            _triple(kernel_size),
            _triple(stride),
            padding if isinstance(padding, str) else _triple(padding),
            _triple(dilation),
            False,  # not transposed
            _triple(0),
            groups,
            bias,
            padding_mode,
        )
        self.num_experts = num_experts
        self._routing_fn = Routing(num_coordinates, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, *self.weight.shape))
        # The published code fills the 6-D tensor with the rule for a 5-D one, so the fan-in counts
        # the output channels too and the kernels start small. That sets the effective step size.
        self.reset_parameters()

    def mix_kernels(self, locs: torch.Tensor) -> torch.Tensor:
        """Kernels of the given locations: (G, 3 * num_coordinates) -> (G, out, in / groups, k, k, k)."""
        routing = self._routing_fn(locs)  # (G, experts)
        return (routing @ self.weight.flatten(1)).view(-1, *self.weight.shape[1:])

    def _convolve(self, inputs: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            inputs = F.pad(inputs, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return dense_conv3d(inputs, kernel, self.bias, self.stride, padding, self.dilation, self.groups)

    def forward(self, inputs: torch.Tensor, locs: torch.Tensor) -> torch.Tensor:
        """Convolve each block of the batch with the kernel of its location.

        Args:
            inputs: (B, in, D, H, W).
            locs: (G, 3 * num_coordinates) where G divides B; block g of B / G consecutive samples
                shares location g. G = B is one location per sample, G = 1 one for all.

        Returns:
            (B, out, D', H', W').

        Raises:
            ValueError: G does not divide B.
        """
        return self.convolve(inputs, self.mix_kernels(locs))

    def convolve(self, inputs: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` with the kernels mixed already: (G, out, in / groups, k, k, k), G divides B."""
        batch, blocks = inputs.shape[0], kernels.shape[0]
        if blocks == 0 or batch % blocks:
            raise ValueError(f"{blocks} locations do not divide a batch of {batch} samples")
        if blocks == 1:
            return self._convolve(inputs, kernels[0])
        return torch.cat(self.convolve_blocks(inputs.chunk(blocks), kernels))

    def convolve_blocks(self, blocks: Sequence[torch.Tensor], kernels: torch.Tensor) -> list[torch.Tensor]:
        """Each block (B, in, D, H, W) with its kernel, (G, out, in / groups, k, k, k) -> G of (B, out, D', H', W').

        One dense convolution per location: a grouped one would be one call, but few libraries are fast at it in 3-D.
        """
        return [self._convolve(block, kernel) for block, kernel in zip(blocks, kernels, strict=True)]
