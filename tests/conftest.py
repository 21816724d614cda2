"""Fixtures shared by several test folders."""

import atexit
import functools
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from data.sampler import BatchIndex
from data.views import StepDraws, StepViews
from misc.command import STOPPING
from misc.files import wait_for_lock

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Parallel test processes (pytest -n) get one thread each, because more threads would slow the processes down.
# Results are only compared at the same number of threads, because rounding depends on this number.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_reference = pytest.mark.skip(reason=f"the published outputs are not at {SHARED}")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "reference" in item.keywords and not (SHARED / "reference").is_dir():
            item.add_marker(no_reference)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder with the published implementation's outputs."""
    return SHARED / "reference"


def run_process(*command, cwd=None, check=True, timeout=600, env=None) -> subprocess.CompletedProcess:
    """Run a script of the project in a separate process, from another folder and without PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": str(THREADS), **(env or {})}
    first, *rest = [str(part) for part in command]
    program = ["sh", str(ROOT / first)] if first.endswith(".sh") else [sys.executable, str(ROOT / first)]
    result = subprocess.run(
        [*program, *rest], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=timeout, check=False
    )
    if check:
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def run_ranks(main: Callable[..., None], world: int, *inputs) -> None:
    """Run ``main(rank, world, *inputs)`` in one process per rank, forked so that torch is already imported."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(rank, world, *inputs), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * world


def leave_test(status: int) -> NoReturn:
    """Replace misc.command.exit_at_once, which would end the test process."""
    raise SystemExit(status)


def run_script(*command, cwd=None, check=True, env=None) -> subprocess.CompletedProcess:
    """Run a script of the project as a command in this process, which saves importing torch again.

    Shell scripts, launch.py, and commands with a modified environment run in a separate process.
    """
    script, *flags = [str(part) for part in command]
    if script.endswith((".sh", "launch.py")) or env:
        return run_process(*command, cwd=cwd, check=check, env=env)
    path, output, errors = str(ROOT / script), io.StringIO(), io.StringIO()
    before = os.getcwd(), sys.argv, sys.path[:]
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        os.chdir(cwd or before[0])
        sys.argv = [path, *flags]
        with redirect_stdout(output), redirect_stderr(errors), mock.patch("misc.command.exit_at_once", leave_test):
            runpy.run_path(path, run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code or 0
    finally:
        atexit.unregister(leave_test)  # run() registers its exit in a rank
        os.chdir(before[0])
        sys.argv, sys.path[:] = before[1], before[2]
        for number, handler in handlers.items():
            signal.signal(number, handler)
    result = subprocess.CompletedProcess([path, *flags], status, output.getvalue(), errors.getvalue())
    if check:
        assert status == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def run():
    """Run a command, in this process if possible. ``run_apart`` always starts a new process."""
    return run_script


@pytest.fixture(scope="session")
def run_apart():
    return run_process


@pytest.fixture(scope="session")
def run_here():
    """Run a command in this process; the command may fail."""
    return functools.partial(run_script, check=False)


@pytest.fixture
def one_thread():
    """Limit torch to one thread, as in parallel encoding. torch's profiler does not record work in other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_error(value, wanted) -> float:
    """Return ‖value − wanted‖ / ‖wanted‖ in float64."""
    a = torch.as_tensor(value).detach().double()
    b = torch.as_tensor(wanted).detach().double()
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="session")
def rel():
    return relative_error


def calibrate(*encoders: nn.Module, batch: int = 16) -> None:
    """Give every BatchNorm realistic statistics, so that outputs in eval mode differ between patches.

    In a new network, every BatchNorm layer has running mean 0 and running variance 1. With mean 0 and
    variance 1 in every layer, the network's small kernels give all patches nearly the same output, and a comparison
    would not notice swapped patches.
    """
    generator = torch.Generator().manual_seed(5)
    patches = torch.randn(batch, 1, 32, 32, 32, generator=generator)
    locs = torch.rand(batch, 3, generator=generator) * 2 - 1
    for encoder in encoders:
        norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm3d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            encoder.train()(patches, locs)
        for norm in norms:
            norm.momentum = 0.1
        encoder.eval()
        with torch.no_grad():
            directions = nn.functional.normalize(encoder(patches, locs)[0], dim=1)
        assert float(directions.std(dim=0).mean()) > 0.1


def write_store(
    root: Path, num_subjects: int, locations: np.ndarray, seed: int = 0, grouped: bool = True
) -> np.ndarray:
    """Write a store of random patches; return the patches as (N, L, 32, 32, 32) int16."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(-1024, 241, (num_subjects, len(locations), 32, 32, 32), dtype=np.int16)
    root.mkdir(parents=True, exist_ok=True)
    np.save(root / "atlas_patch_loc.npy", np.asarray(locations, dtype=np.int64))
    sids = [f"{index:03d}" for index in range(num_subjects)]
    if grouped:
        (root / "grouped_patch").mkdir()
        for index in range(len(locations)):
            np.save(root / "grouped_patch" / f"patch_loc_{index}.npy", patches[:, index])
        (root / "subjects.csv").write_text("sid\n" + "\n".join(sids) + "\n")
    else:
        (root / "patch").mkdir()
        for sid, one in zip(sids, patches):
            np.save(root / "patch" / f"{sid}_patch.npy", one)
    return patches


@pytest.fixture(scope="session")
def make_store():
    return write_store


@pytest.fixture(scope="session")
def grid():
    """Return six locations; some of the distances between them are equal."""
    return np.array([[0, 0, 0], [26, 0, 0], [0, 26, 0], [26, 26, 0], [0, 0, 26], [52, 0, 0]], dtype=np.int64)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Return (cohort folder, store folder) of a synthetic cohort of six subjects, which tests must not change."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if THREADS == 2 else base.parent) / "cohort with a space"  # parallel test processes share one cohort
    folder.mkdir(exist_ok=True)
    with wait_for_lock(folder / "lock"):
        if not (folder / "made").exists():
            run_process("tools/make_cohort.py", "--out-dir", folder / "cohort", "--num-subjects", 6, "--num-workers", 2)
            run_process(
                "preprocess/run_preprocess.sh",
                *("--input-csv", folder / "cohort" / "dataset.csv", "--root-dir", folder / "store"),
                *("--atlas-mask", folder / "cohort" / "atlas_lung_mask.nii.gz", "--method=threshold"),
                *("--num-workers", 2, "--strict"),
            )
            (folder / "made").touch()
    return folder / "cohort", folder / "store"


def step_views(batch, augmentation, seed, groups, device, dense=None):
    """Draw the random parameters of a step and make its views, as train.py does."""
    views = StepViews(StepDraws(augmentation, seed, groups), device, dense)
    views.seed_noise(batch.epoch, batch.location, batch.step)
    index = BatchIndex(batch.epoch, batch.location, batch.step, range(len(batch.patches)))
    draws = views.draws(index, batch.neighbors is not None, batch.patches.shape[1:])
    near = None if batch.neighbors is None else batch.neighbors.to(device)
    return views(batch.patches.to(device), near, draws.to(device))
