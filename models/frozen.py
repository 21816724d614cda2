"""The encoder frozen at one location, for inference: every convolution dense, every BatchNorm folded in."""

import torch

from models.cnn3d import Encoder
from models.condconv3d import dense_conv3d
from models.norm_elu import elu_


class FrozenEncoder:
    """Representations h of patches that share a location, from an encoder in eval mode.

    At one location a conditional convolution is an ordinary one, and BatchNorm with fixed
    statistics is a factor and an offset per output channel, which the kernel and the bias take up:

        norm(conv(x)) = (gamma / s) * (kernel * x + bias - mean) + beta,  s = sqrt(var + eps)

    So a layer is one dense convolution and an ELU.

    Args:
        encoder: its state is read once; later changes to it do not matter.
        loc: (1, 3) normalised location.
        dtype: of the computation; float32 or bfloat16.
    """

    @torch.no_grad()
    def __init__(self, encoder: Encoder, loc: torch.Tensor, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self._layers = []
        for conv, norm in encoder.layers():
            factor = (norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)).float()
            kernel = conv.mix_kernels(loc)[0] * factor[:, None, None, None, None]
            bias = (conv.bias - norm.running_mean) * factor + norm.bias
            kernel = kernel.to(dtype).contiguous(memory_format=torch.channels_last_3d)
            self._layers.append((kernel, bias.to(dtype), conv.stride, conv.padding))

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 32, 32, 32), intensities in [-1, 1] -> h (B, rep_dim) float32."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        for kernel, bias, stride, padding in self._layers:
            x = elu_(dense_conv3d(x, kernel, bias, stride, padding))
        return x.flatten(1).float()
