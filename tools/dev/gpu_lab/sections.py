"""Sections of tools/dev/gpu.py. Each function returns the content of its section's JSON file."""

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.locations import normalize_locations
from data.pieces import encode_pieces, split_store_into_pieces
from data.views import convert_hu_to_input
from models import condconv3d, fast, frozen
from models.cnn3d import norm_elu
from models.fast import norm_elu_gpu
from models.frozen import FrozenLocations, encode_patch_per_location
from tools.dev.gpu_lab.convolutions import WAYS
from tools.dev.gpu_lab.kernels import compile_kernels
from tools.dev.gpu_lab.setting import PRECISIONS, Run, Sizes, convert_to_rates, synchronize, time_in_turns
from tools.dev.gpu_lab.store import FileStore
from tools.timing.step import make_encoder

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ((8, 32), (8, 16), (16, 8), (32, 4), (64, 2), (128, 2), (128, 1))  # (channels, side length in voxels)


class Lab(NamedTuple):
    """Inputs of every section."""

    sizes: Sizes
    device: torch.device
    store: FileStore
    out: Path
    old: Path | None  # folder with the exported files of an old commit

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        return PRECISIONS if self.on_gpu else ("float32",)

    def make_training_run(self, precision: str | None = None, **options: Any) -> Run:
        gc.collect()  # free the last run's CUDA graph and workers, which reference cycles keep alive
        return Run(self.store, self.sizes, self.device, precision or self.precisions[0], **options)

    def time_jobs(self, jobs: dict[str, Callable[[], object]], warm_up: int = 1) -> dict:
        return time_in_turns(jobs, self.sizes.rounds, self.device, warm_up)


@contextlib.contextmanager
def keep_channels_first() -> Iterator[None]:
    """Make ``channels_last`` call ``contiguous``, which leaves tensors with one channel in channels-first layout."""

    def convert_to_channels_last(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d)

    with contextlib.ExitStack() as stack:
        for module in (condconv3d, frozen, sys.modules["models.cnn3d"]):
            stack.enter_context(mock.patch.object(module, "channels_last", convert_to_channels_last))
        yield


def measure_hardware_limits(lab: Lab) -> dict:
    """Measure the limits of the machine: matrix products, memory copies, kernel launches."""
    size = 8192 if lab.on_gpu else 256
    device = torch.cuda.get_device_name() if lab.on_gpu else "CPU"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    for precision in lab.precisions:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        a = torch.randn(size, size, device=lab.device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        times = lab.time_jobs({"product": lambda a=a: a @ a})["product"]
        found[f"tflops_{precision}"] = round(2 * size**3 / times["median"] / 1e12, 2)
    memory = torch.zeros(2**28 if lab.on_gpu else 2**20, device=lab.device)
    found["copy_gb_s"] = round(2 * memory.nbytes / lab.time_jobs({"copy": memory.clone})["copy"]["median"] / 1e9, 1)
    small = torch.zeros(1, device=lab.device)
    launches = lab.time_jobs({"launches": lambda: [small.add_(1) for _ in range(1000)]})["launches"]
    found["launch_us"] = round(1e3 * launches["median"], 2)
    return found


def list_kernel_registers(lab: Lab) -> dict:
    """Return registers and spilled bytes of the Triton kernels, for the channels of the first and last layers."""
    if norm_elu_gpu.triton is None:
        return {"skipped": "no Triton"}
    return {str(channels): compile_kernels(channels) for channels in (8, 128)}


def record_conv_layouts_and_kernels(lab: Lab) -> dict:
    """Record the strides of every convolution's input, and the kernels that a GPU runs for a training step."""
    run, strides = lab.make_training_run(recorded=False), []
    convolve = condconv3d.CondConv3D._convolve

    def record_strides_and_convolve(self, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        strides.append([tuple(x.shape), x.stride()])
        return convolve(self, x, kernel)

    run.run_steps(1)
    with mock.patch.object(condconv3d.CondConv3D, "_convolve", record_strides_and_convolve):
        run.run_steps(1)
    found: dict[str, Any] = {"inputs": strides[: 13 * 3]}
    if lab.on_gpu:
        found["kernels"] = profile_gpu_kernels(lambda: run.run_steps(1))["kernels"][:40]
    return found


def check_fast_path_correctness(lab: Lab) -> dict:
    """Compare CUDA-graph steps with eager steps, and steps with and without fast paths; run the GPU tests."""
    found, steps = {}, 6
    for precision in lab.precisions:
        wanted = torch.stack(lab.make_training_run(precision, recorded=False).run_steps(steps))
        runs = {"plain": lambda precision=precision: lab.make_training_run(precision, recorded=False)}
        if lab.on_gpu:
            runs["recorded"] = lambda precision=precision: lab.make_training_run(precision, recorded=True)
        for name, make in runs.items():
            with fast.disable_fast_paths() if name == "plain" else contextlib.nullcontext():
                ours = torch.stack(make().run_steps(steps))
            apart = ((ours - wanted).abs() / wanted.abs().clamp(min=1e-3))[:, :3]  # the three losses
            found[f"{precision}, {name} against eager"] = {
                "first step": float(apart[0].max()),
                "in six": float(apart.max()),
            }
    if lab.on_gpu:
        tests = ["tests/test_gpu.py", "tests/models/fast", "tests/data/test_device.py"]
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests]
        done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False)
        found["pytest -m gpu"] = (done.stdout + done.stderr)[-1500:]
    return found


def time_convolutions(lab: Lab) -> dict:
    """Time the implementations of the first two convolutions, forward and backward, at the batch size of a step."""
    found = {}
    for precision in lab.precisions:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x = condconv3d.channels_last(torch.randn(lab.sizes.batch, 1, 32, 32, 32, device=lab.device, dtype=dtype))
        shapes = ((8, 1, 3, 3, 3), (8, 8, 3, 3, 3))
        kernels = [torch.randn(*shape, device=lab.device, dtype=dtype, requires_grad=True) for shape in shapes]

        def run_forward_backward(
            convolve: Callable[..., torch.Tensor], x: torch.Tensor = x, kernels: list[torch.Tensor] = kernels
        ) -> None:
            convolve(x, *kernels).sum().backward()

        jobs = {name: lambda way=way: run_forward_backward(way) for name, way in WAYS.items()}
        found[precision] = {name: {k: 1e3 * v for k, v in t.items()} for name, t in lab.time_jobs(jobs, 3).items()}
    return {"ms": found}


def time_norms(lab: Lab) -> dict:
    """Time BatchNorm with ELU for every layer size: torch on volumes, torch on images, and Triton."""
    found = {}
    dtype = torch.bfloat16 if lab.on_gpu else torch.float32
    for channels, side in LAYERS:
        norm = nn.BatchNorm3d(channels).to(lab.device)
        x = torch.randn(lab.sizes.batch, channels, side, side, side, device=lab.device).to(dtype)
        x = condconv3d.channels_last(x).requires_grad_()

        def apply_norm_elu_to_volumes(norm: nn.BatchNorm3d = norm, x: torch.Tensor = x) -> torch.Tensor:
            parts = [F.elu(norm(part)) for part in x.chunk(lab.sizes.groups)]
            return torch.cat(parts)

        def apply_norm_elu_to_images(norm: nn.BatchNorm3d = norm, x: torch.Tensor = x) -> torch.Tensor:
            with fast.disable_fast_paths():
                return norm_elu(norm, [x], lab.sizes.groups)[0]

        jobs = {
            name: lambda way=way: way().sum().backward()
            for name, way in (("volumes", apply_norm_elu_to_volumes), ("images", apply_norm_elu_to_images))
        }
        if lab.on_gpu:
            for tile in (2048, 4096, 8192):

                def run_triton_norm_elu(norm=norm, x=x, tile=tile) -> None:
                    with mock.patch.object(norm_elu_gpu, "TILE", tile):
                        norm_elu(norm, [x], lab.sizes.groups)[0].sum().backward()

                jobs[f"Triton, tiles of {tile}"] = run_triton_norm_elu
        times = lab.time_jobs(jobs, 3)
        found[f"{channels} x {side}^3"] = {name: round(1e3 * value["median"], 3) for name, value in times.items()}
    return {"ms": found}


def measure_fast_path_ablation(lab: Lab) -> dict:
    """Measure samples per second with all fast paths, with files on the GPU, and with one or all fast paths off."""
    if not lab.on_gpu:
        ways = {"as it is": ({}, contextlib.nullcontext), "plain": ({}, fast.disable_fast_paths)}
    else:
        without_norm = lambda: mock.patch.object(norm_elu_gpu, "can_fuse_norm_elu", lambda *_: False)  # noqa: E731
        ways = {
            "as it is": ({"recorded": True}, contextlib.nullcontext),
            "files on the GPU": ({"recorded": True, "resident": True}, contextlib.nullcontext),
            "not recorded": ({"recorded": False}, contextlib.nullcontext),
            "torch's BatchNorm": ({"recorded": True}, without_norm),
            "channels first": ({"recorded": True}, keep_channels_first),
            "none of these": ({"recorded": False, "dense": False}, fast.disable_fast_paths),
        }
    found = {}
    for name, (choices, context) in ways.items():
        with context():
            run = lab.make_training_run(**choices)
            run.run_steps(6)
            times = lab.time_jobs({name: lambda run=run: run.run_steps(lab.sizes.steps)}, warm_up=0)
        found |= convert_to_rates(times, lab.sizes.batch * lab.sizes.steps)
    return {"samples_per_s": found}


def measure_training(lab: Lab) -> dict:
    """Measure samples per second and loss curves at every precision, for this code and the old commit."""
    found: dict[str, Any] = {"samples_per_s": {}, "curves": {}}
    for precision in lab.precisions:
        run = lab.make_training_run(precision, resident=False)
        losses = torch.stack(run.run_steps(lab.sizes.curve))[:, 2].tolist()
        times = lab.time_jobs({precision: lambda run=run: run.run_steps(lab.sizes.steps)}, warm_up=0)
        found["samples_per_s"] |= convert_to_rates(times, lab.sizes.batch * lab.sizes.steps)
        found["curves"][precision] = losses
        del run
        gc.collect()
        if lab.old is None:
            continue
        result = lab.out / f"old_{precision}.json"
        command = [sys.executable, str(Path(__file__).with_name("old.py")), str(lab.old), str(lab.out / "store")]
        sizes = json.dumps(lab.sizes._asdict())
        command += [sizes, lab.device.type, precision, str(lab.sizes.curve), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            found["samples_per_s"][f"{precision}, old"] = done.stderr[-1500:]
            continue
        old = json.loads(result.read_text(encoding="utf-8"))
        found["samples_per_s"][f"{precision}, old"] = old["samples_per_s"]
        found["curves"][f"{precision}, old"] = old["losses"]
    return found


def profile_gpu_kernels(work: Callable[[], object]) -> dict:
    """Profile a function on a GPU: busy time, number of launches, and kernels sorted by time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        work()
        torch.cuda.synchronize()
    # Count kernels only, because CPU operations include the time of their kernels.
    kinds = torch.autograd.DeviceType
    rows = [
        event for event in record.key_averages() if event.device_type == kinds.CUDA and not event.is_user_annotation
    ]
    rows.sort(key=lambda event: -event.self_device_time_total)
    listed = [[event.key[:90], event.count, round(event.self_device_time_total / 1e3, 3)] for event in rows]
    return {
        "busy_ms": round(sum(row[2] for row in listed), 2),
        "launches": sum(row[1] for row in listed),
        "kernels": listed,
    }


def profile_step(lab: Lab) -> dict:
    """Profile a training step: wall time, busy time of the GPU, and kernels."""
    if not lab.on_gpu:
        return {"skipped": "no GPU"}
    found = {}
    for name, recorded in (("recorded", True), ("eager", False)):
        run = lab.make_training_run(recorded=recorded)
        run.run_steps(6)
        batches = [next(run.batches) for _ in range(4)]
        with mock.patch.object(run, "batches", iter(batches)):
            record = profile_gpu_kernels(lambda run=run: run.run_steps(4))
        times = lab.time_jobs({"step": lambda run=run: run.run_steps(10)})["step"]
        found[name] = {
            "wall_ms": round(1e2 * times["median"], 2),
            "busy_ms": round(record["busy_ms"] / 4, 2),
            "launches": record["launches"] // 4,
            "kernels": [[key, count // 4, round(ms / 4, 3)] for key, count, ms in record["kernels"][:40]],
        }
    return found


def measure_loader(lab: Lab) -> dict:
    """Measure samples per second from the data-loader workers, without and with the copy to the device."""
    run, steps = lab.make_training_run(recorded=False), lab.sizes.steps
    jobs = {
        "loader": lambda: [next(run.batches) for _ in range(steps)],
        "loader and copies": lambda: [run.carrier(next(run.batches)) for _ in range(steps)],
    }
    return {"samples_per_s": convert_to_rates(lab.time_jobs(jobs), lab.sizes.batch * steps)}


def measure_extraction(lab: Lab) -> dict:
    """Measure feature extraction: subjects (581 patches each) per second, and the seconds for a single scan."""
    store, encoder = lab.store, make_encoder(lab.device)
    locations = torch.from_numpy(normalize_locations(store.locations)).to(lab.device)
    pieces = split_store_into_pieces(store)
    found: dict[str, Any] = {}
    for precision in ("bf16", "float32"):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        at = FrozenLocations(encoder, locations, torch.bfloat16 if precision == "bf16" else torch.float32)
        work = lambda at=at: [len(h) for _, h in encode_pieces(at, store, pieces, 256, lab.device)]  # noqa: E731
        times = lab.time_jobs({precision: work})
        found |= convert_to_rates(times, store.num_subjects * store.num_locations / 581)
    count = 581 if lab.on_gpu else 8
    hu = torch.from_numpy(store.read(0, np.arange(count) % store.num_subjects))
    hu, places = hu.to(lab.device), torch.rand(count, 3, device=lab.device) * 2 - 1
    one = lab.time_jobs({"one scan": lambda: encode_patch_per_location(encoder, hu, places, convert_hu_to_input)})[
        "one scan"
    ]
    at = FrozenLocations(encoder, places)
    few = range(min(count, 16))
    wanted = torch.cat([at[index](hu[index : index + 1], convert_hu_to_input) for index in few])
    ours = encode_patch_per_location(encoder, hu[: len(few)], places[: len(few)], convert_hu_to_input)
    synchronize(lab.device)
    return {"subjects_per_s": found, "one_scan_s": one, "one_scan_apart": float((ours - wanted).norm() / wanted.norm())}


SECTIONS: dict[str, Callable[[Lab], dict]] = {
    "ceilings": measure_hardware_limits,
    "kernels": list_kernel_registers,
    "correctness": check_fast_path_correctness,
    "training": measure_training,
    "profile": profile_step,
    "ablation": measure_fast_path_ablation,
    "norms": time_norms,
    "convolutions": time_convolutions,
    "layouts": record_conv_layouts_and_kernels,
    "loader": measure_loader,
    "extraction": measure_extraction,
}
