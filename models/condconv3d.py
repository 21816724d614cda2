"""Location-conditioned 3-D convolution: one kernel per location, mixed from a few experts.

See DrasCLR (Yu et al., Medical Image Analysis 2024), section on the conditional encoder. The layer follows
CondConv (Yang et al., NeurIPS 2019), but the routing depends on the location of a patch and not on its content:
kernel(loc) = sum_e sigmoid(W loc + b)_e * weight_e.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _triple

from models.fast.pairs import convolve_one_channel_in_pairs


class Routing(nn.Module):
    """Map a location to one weight in (0, 1) per expert: (G, 3 * num_coordinates) -> (G, experts)."""

    def __init__(self, num_coordinates: int, num_experts: int):
        super().__init__()
        self.fc = nn.Linear(3 * num_coordinates, num_experts)

    def forward(self, locs: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.fc(locs))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, C, D, H, W) with the channels of each voxel adjacent in memory; copy x only if needed.

    With one channel, channels-first and channels-last data are in the same order, and ``contiguous`` does not change
    the strides. A convolution chooses the layout of its output from the strides of its input. Without the strides that
    this function sets, every layer would run channels-first.
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
    """Run F.conv3d in the memory layout of the inputs.

    ``convolve`` replaces F.conv3d, and may also apply an elementwise function such as an activation to the result.
    """
    fast = convolve_one_channel_in_pairs(
        inputs, kernel, bias, (tuple(stride), padding, tuple(dilation), groups), convolve
    )
    if fast is not None:
        return fast
    if inputs.is_contiguous(memory_format=torch.channels_last_3d):
        kernel = channels_last(kernel)
    return convolve(inputs, kernel, bias, stride, padding, dilation, groups)


class CondConv3D(_ConvNd):
    """3-D convolution with a kernel that depends on the location of the patch.

    The parameters are ``weight`` (experts, out, in / groups, k, k, k), one ``bias`` (out,) shared by the
    experts, and ``_routing_fn.fc``. The parameter names match those in the published checkpoint. All
    arguments except ``num_experts`` and ``num_coordinates`` work as in :class:`torch.nn.Conv3d`.
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
        # As in the published code, torch's initialisation for 5-D convolution weights is applied to the 6-D weight.
        # For the 6-D weight, torch's fan-in includes the output channels, so the initial kernels are small.
        # With BatchNorm, the magnitude of the initial weights determines the effective learning rate.
        self.reset_parameters()

    def mix_kernels(self, locs: torch.Tensor) -> torch.Tensor:
        """Mix one kernel per location: (G, 3 * num_coordinates) -> (G, out, in / groups, k, k, k)."""
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
            locs: (G, 3 * num_coordinates), where G divides B. Block g of B / G consecutive samples
                shares location g. With one row per sample (G = B), each sample has its own location. With G = 1, all
                samples share one location.

        Returns:
            (B, out, D', H', W').

        Raises:
            ValueError: G does not divide B.
        """
        return self.convolve(inputs, self.mix_kernels(locs))

    def convolve(self, inputs: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Run :meth:`forward` with mixed kernels (G, out, in / groups, k, k, k), where G divides B."""
        batch, blocks = inputs.shape[0], kernels.shape[0]
        if blocks == 0 or batch % blocks:
            raise ValueError(f"a batch of {batch} samples cannot be divided evenly among {blocks} locations")
        if blocks == 1:
            return self._convolve(inputs, kernels[0])
        return torch.cat(self.convolve_blocks(inputs.chunk(blocks), kernels))

    def convolve_blocks(self, blocks: Sequence[torch.Tensor], kernels: torch.Tensor) -> list[torch.Tensor]:
        """Convolve each of G blocks (b, in, D, H, W) with its kernel from (G, out, in / groups, k, k, k).

        A separate dense convolution is run for each location. A grouped convolution could process all locations in a
        single call, but few libraries have fast grouped convolutions in 3-D.

        Returns:
            G tensors (b, out, D', H', W').
        """
        return [self._convolve(block, kernel) for block, kernel in zip(blocks, kernels, strict=True)]
