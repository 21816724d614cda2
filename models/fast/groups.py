"""Encode the BatchNorm groups of a batch in parallel on the CPU cores, as separate ranks would do."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from models import fast
from models.fast.pieces import run_in_parallel

Pair = tuple[torch.Tensor, torch.Tensor]  # z and h


def encode_bn_groups_in_parallel(
    encoder: nn.Module, patches: torch.Tensor, layer_kernels: Sequence[torch.Tensor], bn_groups: int
) -> Pair | None:
    """Run ``encoder.encode`` on each BatchNorm group in parallel, because no data passes between groups.

    Cores that work on the same layer wait for each other at the end of the layer. With one group per core, the cores
    wait for each other only twice in a pass, and the batch is not split and joined in every layer. On 2 cores with
    AVX2, parallel groups make a training step with 16 samples in 2 groups 1.26 times as fast (range
    1.25 to 1.28). A step with 32 samples in 4 groups becomes 1.28 times as fast (range 1.21 to 1.37).

    Args:
        encoder: models.cnn3d.Encoder. Only BatchNorm group 0 updates the encoder's running statistics.
        patches, layer_kernels, bn_groups: see :meth:`models.cnn3d.Encoder.encode`.

    Returns:
        z (B, moco_dim) and h (B, rep_dim), or None if this fast path does not apply.
    """
    if bn_groups == 1 or not encoder.training or torch.compiler.is_compiling() or not fast.is_enabled():
        return None
    own = len(layer_kernels[0]) == len(
        patches
    )  # if each sample has its own kernel, the kernels are split into groups too
    blocks = 1 if own else len(layer_kernels[0])
    if patches.device.type != "cpu" or patches.requires_grad or len(patches) % (bn_groups * blocks):
        return None
    parts = patches.unflatten(0, (blocks, bn_groups, -1)).unbind(1)  # (blocks, b, 1, 32, 32, 32) for each group
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in encoder.parameters())

    def encode_group(group: int, kernels: Sequence[torch.Tensor]) -> Pair:
        # Do not cache casts, because a cast from another thread would connect the autograd graphs of two groups.
        casts = torch.autocast("cpu", autocast[1], enabled=autocast[0], cache_enabled=False)
        with torch.set_grad_enabled(needs_grad), casts:
            if own:
                kernels = [kernel.chunk(bn_groups)[group] for kernel in kernels]
            return encoder.encode(parts[group].flatten(0, 1), kernels, track=group == 0)

    if needs_grad:
        parameters = [value for value in encoder.parameters() if value.requires_grad]
        encoded = _Encode.apply(encode_group, bn_groups, len(layer_kernels), *layer_kernels, *parameters)
    else:
        encoded = [
            value
            for pair in run_in_parallel(lambda group: encode_group(group, layer_kernels), range(bn_groups))
            for value in pair
        ]
    z, h = (torch.stack([value.unflatten(0, (blocks, -1)) for value in encoded[i::2]], dim=1) for i in (0, 1))
    return z.flatten(0, 2), h.flatten(0, 2)  # (B, dim) from (blocks, groups, b, dim)


class _Encode(torch.autograd.Function):
    """Runs the forward and backward passes of each group in a separate autograd graph, with all groups in parallel.

    The tensors in ``inputs`` are the mixed kernels, which all groups share, and the encoder's parameters. The outputs
    are z and h of the first group, z and h of the second group, and so on.
    """

    @staticmethod
    def forward(ctx, encode: Callable[..., Pair], groups: int, num_kernels: int, *inputs: torch.Tensor):
        kernels = [kernel.detach().requires_grad_(kernel.requires_grad) for kernel in inputs[:num_kernels]]
        ctx.inputs = [*kernels, *inputs[num_kernels:]]
        ctx.encoded = run_in_parallel(lambda group: encode(group, kernels), range(groups))  # keeps the autograd graphs
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for pair in ctx.encoded for value in pair)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor | None):
        wanted = [value for value in ctx.inputs if value.requires_grad]

        def compute_group_gradients(group: int) -> tuple[torch.Tensor | None, ...]:
            pairs = zip(ctx.encoded[group], grads[2 * group : 2 * group + 2])
            outputs, incoming = zip(*(pair for pair in pairs if pair[1] is not None))
            return torch.autograd.grad(outputs, wanted, incoming, allow_unused=True)

        sums = iter(
            [_sum_present(values) for values in zip(*run_in_parallel(compute_group_gradients, range(len(ctx.encoded))))]
        )
        ctx.encoded = None  # frees the activations too
        return None, None, None, *(next(sums) if value.requires_grad else None for value in ctx.inputs)


def _sum_present(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the sum of the tensors that are not None, or None if there is no such tensor.

    The gradients of the experts and their routing are None, because the kernels are mixed outside :class:`_Encode`.
    """
    given = [value for value in values if value is not None]
    return functools.reduce(torch.add, given) if given else None
