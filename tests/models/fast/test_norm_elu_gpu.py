"""Test norm_elu_gpu.py's kernels: interpreted on the CPU, compiled without a GPU, and run on a GPU if available."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from models import fast
from models.cnn3d import norm_elu
from models.fast import norm_elu as entrance
from models.fast import norm_elu_gpu as gpu

from ...conftest import ROOT

needs_triton = pytest.mark.skipif(gpu.triton is None, reason="this torch comes without Triton")


@needs_triton
def test_interpreted_kernels_equal_the_plain_path():
    script = ROOT / "tests" / "models" / "fast" / "interpreted.py"
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["apart"]) == 10 and not any(found["untracked"])
    for *case, dtype, apart in found["apart"]:
        # The mean is 17 standard deviations from 0. A float32 variance from sums of squares would be off by 1e-4.
        assert max(apart) < (2e-5 if dtype == "torch.float32" else 2e-2), (case, dtype, apart)


@needs_triton
@pytest.mark.parametrize("channels", [8, 128])
def test_compiled_kernels_do_not_spill_registers(channels):
    from tools.dev.gpu_lab.kernels import compile_kernels

    compiled = compile_kernels(channels)
    assert len(compiled) == 5
    for name, facts in compiled.items():
        assert facts["spilled_bytes"] == 0 and facts["registers"] <= 255, name


@pytest.mark.parametrize(
    ("change", "groups"),
    [({}, 1), ({"momentum": None}, 2), ({"affine": False}, 2), ({"track_running_stats": False}, 2)],
)
def test_unsupported_cases_use_torch(monkeypatch, change, groups):
    """Test the choice of the GPU path with a tensor that only claims to be on a GPU."""

    class There(torch.Tensor):
        device = torch.device("cuda")

    x = torch.randn(4, 3, 2, 2, 2).as_subclass(There)
    monkeypatch.setattr(gpu, "apply_norm_elu", lambda *_: "taken")
    monkeypatch.setattr(gpu, "_can_compile", lambda _: True)
    assert entrance.norm_elu(nn.BatchNorm3d(3), [x], groups) == "taken"
    if change:
        assert entrance.norm_elu(nn.BatchNorm3d(3, **change), [x], groups) is None
    assert entrance.norm_elu(nn.BatchNorm3d(3).eval(), [x], 2) is None
    assert entrance.norm_elu(nn.BatchNorm3d(3), [x[:2, :, :1, :1, :1]], 2) is None  # one value per group
    assert entrance.norm_elu(nn.BatchNorm3d(3), [x.double()], 2) is None
    with fast.disable_fast_paths():
        assert entrance.norm_elu(nn.BatchNorm3d(3), [x], 2) is None


def test_torch_is_used_without_a_compiler(monkeypatch):
    monkeypatch.setattr(gpu, "triton", object())

    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "apply_norm_elu", fail)
    gpu._can_compile.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler.*torch's slower BatchNorm"):
        assert gpu._can_compile(torch.device("cpu")) is False
    gpu._can_compile.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(12, 8, 4, 4, 4), (24, 5, 1, 1, 1), (12, 8, 32, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups, blocks", [(1, 1), (4, 1), (2, 3)])
def test_kernels_on_a_gpu(shape, dtype, groups, blocks):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).cuda() * 3 + 2
    x = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    norm = nn.BatchNorm3d(shape[1]).cuda()
    results = []
    for layer, plain in ((norm, False), (copy.deepcopy(norm).double(), True)):
        inputs = (x.double() if plain else x).clone(memory_format=torch.preserve_format).requires_grad_()
        fast._off.append(plain)
        try:
            y = torch.cat(norm_elu(layer, inputs.chunk(blocks), groups))
        finally:
            fast._off.pop()
        y.double().square().sum().backward()
        results.append([y.detach(), inputs.grad, layer.weight.grad, layer.running_mean, layer.running_var])
    for ours, wanted in zip(*results):
        apart = float((ours.double() - wanted).norm() / wanted.norm())
        assert apart < (1e-4 if dtype == torch.float32 else 2e-2)
