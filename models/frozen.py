"""The encoder frozen at one location, for inference: every convolution dense, every BatchNorm folded in."""

import torch

from models.cnn3d import Encoder
from models.condconv3d import dense_conv3d
from models.fused import conv_elu

TOGETHER = 8  # locations to freeze at a time: 31 MB of float32 kernels at the published sizes


class FrozenEncoder:
    """Representations h of patches that share a location, from an encoder in eval mode.

    At one location a conditional convolution is an ordinary one, and BatchNorm with fixed
    statistics is a factor and an offset per output channel, which the kernel and the bias take up:

        norm(conv(x)) = (gamma / s) * (kernel * x + bias - mean) + beta,  s = sqrt(var + eps)

    So a layer is one dense convolution and an ELU. Made by :func:`freeze`.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._layers: list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...], tuple[int, ...]]] = []

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 32, 32, 32), intensities in [-1, 1] -> h (B, rep_dim) float32."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        for kernel, bias, stride, padding in self._layers:
            x = dense_conv3d(x, kernel, bias, stride, padding, convolve=conv_elu)
        return x.flatten(1).float()


@torch.no_grad()
def freeze(encoder: Encoder, locs: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[FrozenEncoder]:
    """The encoder frozen at each of the locations; several at once read its experts once.

    Args:
        encoder: its state is read now; later changes to it do not matter.
        locs: (G, 3) normalised locations.
        dtype: of the computation; float32 or bfloat16.
    """
    frozen = [FrozenEncoder(dtype) for _ in locs]
    for conv, norm in encoder.layers():
        factor = (norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)).float()
        bias = ((conv.bias - norm.running_mean) * factor + norm.bias).to(dtype)
        for one, kernel in zip(frozen, conv.mix_kernels(locs)):
            kernel = (kernel * factor[:, None, None, None, None]).to(dtype)
            kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
            one._layers.append((kernel, bias, conv.stride, conv.padding))
    return frozen
