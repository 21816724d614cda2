"""Run tools/dev/gpu.py at tiny sizes, and check the implementations that it compares."""

import json
import subprocess
import sys

import pytest
import torch

from models import cnn3d, fast
from tools.dev.gpu_lab.convolutions import WAYS, convert_kernel_for_space_to_depth, space_to_depth

from ...conftest import ROOT


@pytest.mark.parametrize("name", list(WAYS))
def test_the_first_convolutions_three_ways(name):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 32, 32, 32, dtype=torch.float64)
    kernels = [torch.randn(*shape, dtype=torch.float64) for shape in ((8, 1, 3, 3, 3), (8, 8, 3, 3, 3))]
    torch.testing.assert_close(WAYS[name](x, *kernels), WAYS["plain"](x, *kernels), rtol=1e-12, atol=1e-12)


def test_space_to_depth_convolution_is_exact():
    x, kernel = torch.randn(2, 3, 8, 6, 4, dtype=torch.float64), torch.randn(5, 3, 3, 3, 3, dtype=torch.float64)
    wanted = space_to_depth(torch.conv3d(x, kernel, padding=1))
    torch.testing.assert_close(
        torch.conv3d(space_to_depth(x), convert_kernel_for_space_to_depth(kernel), padding=1), wanted
    )


def test_batchnorm_on_images_equals_batchnorm_on_volumes(monkeypatch):
    """On a GPU, the volumes are reshaped to images for BatchNorm.

    Test on a CPU that BatchNorm gives the same results for volumes and for reshaped volumes.
    """
    norms, results = [torch.nn.BatchNorm3d(8).double() for _ in range(2)], []
    x = torch.randn(4, 8, 6, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    for norm, way in zip(norms, (cnn3d._flatten_volumes_to_images_on_gpu, lambda x: x.flatten(2, 3))):
        monkeypatch.setattr(cnn3d, "_flatten_volumes_to_images_on_gpu", way)
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with fast.disable_fast_paths():
            (y,) = cnn3d.norm_elu(norm, [inputs], groups=2)
        y.square().sum().backward()
        assert way(x).data_ptr() == x.data_ptr() and y.is_contiguous(memory_format=torch.channels_last_3d)
        results.append([y.detach(), inputs.grad, norm.weight.grad, norm.running_var])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


ALONE = """
import runpy, sys

missing = ("pandas", "SimpleITK", "monai", "tqdm", "easydict", "torchvision", "ants", "sklearn", "tensorboard_logger")
sys.modules.update(dict.fromkeys(missing))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_every_section_on_a_cpu(tmp_path):
    """The script needs only torch, NumPy and SciPy, because a GPU machine may have no other packages."""
    script = ROOT / "tools" / "dev" / "gpu.py"
    command = [sys.executable, "-c", ALONE, script, "--out-dir", tmp_path, "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(found) == 11 and not [name for name, content in found.items() if "failed" in content], done.stdout
    assert found["training"]["samples_per_s"]["float32"]["median"] > 0
    assert found["correctness"]["float32, plain against eager"]["first step"] < 1e-4
    assert found["extraction"]["one_scan_apart"] < 1e-5
