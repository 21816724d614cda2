"""Compare interpreted Triton kernels with the code without fast paths.

test_norm_elu_gpu.py runs this script in its own process.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from models import fast
from models.cnn3d import norm_elu
from models.fast import norm_elu_gpu

CASES = [  # shape, groups, blocks
    ((12, 8, 4, 4, 4), 1, 1),
    ((12, 8, 4, 4, 4), 2, 3),
    ((12, 5, 2, 2, 2), 4, 1),  # 5 channels are rounded up to 8 columns
    ((24, 128, 1, 1, 1), 4, 3),
    ((8, 8, 16, 16, 16), 2, 1),  # each program has several tiles, and the last tile is only partly full
]


def results_of(norm: nn.BatchNorm3d, x: torch.Tensor, weights: torch.Tensor, groups: int, blocks: int) -> list:
    x = x.contiguous(memory_format=torch.channels_last_3d).detach().requires_grad_()
    y = torch.cat(norm_elu(norm, x.chunk(blocks), groups))
    (y * weights.to(y)).sum().backward()
    found = [y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [value.detach().double() for value in found]


def compare(shape, groups: int, blocks: int, dtype: torch.dtype) -> list[float]:
    """Return the largest difference of each result from torch's in float64, relative to the largest value."""
    torch.manual_seed(0)
    x, weights = (torch.randn(shape) * 3 + 50).to(dtype), torch.randn(shape)
    norm = nn.BatchNorm3d(shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    other = copy.deepcopy(norm).double()
    ours = results_of(norm, x, weights, groups, blocks)
    with fast.disable_fast_paths():
        theirs = results_of(other, x.double(), weights, groups, blocks)
    assert int(norm.num_batches_tracked) == int(other.num_batches_tracked) == 1
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs)]


if __name__ == "__main__":
    norm_elu_gpu.can_fuse_norm_elu = lambda *_: fast.is_enabled()
    norm_elu_gpu.PROGRAMS = 3  # a small number of programs, so that each program processes several tiles
    apart = [[*case, str(dtype), compare(*case, dtype)] for case in CASES for dtype in (torch.float32, torch.bfloat16)]
    norm = nn.BatchNorm3d(8)
    norm_elu(norm, [torch.randn(4, 8, 2, 2, 2)], track=False)
    print(json.dumps({"apart": apart, "untracked": norm.running_mean.tolist()}))
