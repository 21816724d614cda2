"""The encoder frozen at one location, for inference: every convolution dense, every BatchNorm folded in."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.cnn3d import Encoder
from models.condconv3d import dense_conv3d
from models.first_layers import first_layers
from models.fused import conv_elu
from models.norm_elu import elu_

TOGETHER = 8  # locations to freeze at a time: 33 MB of float32 kernels at the published sizes
# Patches encoded at a time on the CPU, in one pass a layer; a rest smaller than that takes two. One number, because
# oneDNN's code is made for each number anew, and a small one, because a layer's result then takes tens of MB.
PIECE = 32
FEW_THREADS = 2  # for a piece: with more of them the library's first layers are faster than ours, which take one


Prepare = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


class Layer(NamedTuple):
    """A convolution and the ELU after it."""

    kernel: torch.Tensor
    bias: torch.Tensor
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]


class FrozenEncoder:
    """Representations h of patches that share a location, from an encoder in eval mode.

    At one location a conditional convolution is an ordinary one, and BatchNorm with fixed
    statistics is a factor and an offset per output channel, which the kernel and the bias take up:

        norm(conv(x)) = (gamma / s) * (kernel * x + bias - mean) + beta,  s = sqrt(var + eps)

    So a layer is one dense convolution and an ELU. Made by :func:`freeze`.
    """

    def __init__(self, layers: list[Layer]):
        self._layers = layers
        first, second = layers[:2]
        self._first_two = first_layers((first.kernel, second.kernel), (first.bias, second.bias))

    def __call__(self, x: torch.Tensor, prepare: Prepare = torch.Tensor.to) -> torch.Tensor:
        """(B, 1, 32, 32, 32), intensities in [-1, 1] -> h (B, rep_dim) float32.

        ``prepare(x, dtype)`` makes such a tensor of each piece of the batch, where ``x`` is none yet.
        """
        if x.device.type != "cpu" or len(x) <= PIECE:
            return self._encode(x, prepare)
        pieces, cores = x.split(PIECE), torch.get_num_threads()
        threads = min(cores, len(pieces))
        encode = functools.partial(self._encode, prepare=prepare)
        made = map(encode, pieces) if threads == 1 else _pool(threads, cores // threads).map(encode, pieces)
        return torch.cat(list(made))

    @torch.no_grad()
    def _encode(self, x: torch.Tensor, prepare: Prepare) -> torch.Tensor:
        x = prepare(x, self._layers[0].kernel.dtype).contiguous(memory_format=torch.channels_last_3d)
        one_pass = x.device.type == "cpu" and len(x) == PIECE
        layers = self._layers
        if self._first_two and torch.get_num_threads() <= FEW_THREADS:
            x, layers = self._first_two(x), layers[2:]
        for kernel, bias, stride, padding in layers:
            if one_pass:
                x = dense_conv3d(x, kernel, bias, stride, padding, convolve=conv_elu)
            else:
                x = elu_(dense_conv3d(x, kernel, bias, stride, padding, convolve=F.conv3d))
        return x.flatten(1).float()


@functools.lru_cache(maxsize=2)  # for full batches and the last one
def _pool(threads: int, cores: int) -> ThreadPoolExecutor:
    """Threads with some cores each: pieces side by side, which never wait for each other within a layer.

    Measured on 2 cores, 64 patches in bf16: 49 ms one piece after the other on both, 45 ms so.
    """
    return ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(cores,))


@torch.no_grad()
def freeze(encoder: Encoder, locs: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[FrozenEncoder]:
    """The encoder frozen at each of the locations; several at once read its experts once.

    Args:
        encoder: its state is read now; later changes to it do not matter.
        locs: (G, 3) normalised locations.
        dtype: of the computation; float32 or bfloat16.
    """
    layers: list[list[Layer]] = [[] for _ in locs]
    for conv, norm in encoder.layers():
        factor = (norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)).float()
        bias = ((conv.bias - norm.running_mean) * factor + norm.bias).to(dtype)
        for mine, kernel in zip(layers, conv.mix_kernels(locs)):
            kernel = (kernel * factor[:, None, None, None, None]).to(dtype)
            kernel = kernel.contiguous(memory_format=torch.channels_last_3d)
            mine.append(Layer(kernel, bias, conv.stride, conv.padding))
    return [FrozenEncoder(mine) for mine in layers]
