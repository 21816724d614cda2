"""Measure runs of train.py, and training steps of several sizes."""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from data.store import PatchStore
from tools.dev.apart import PUBLISHED_LOCATIONS
from tools.timing.measure import Row, time_in_turns
from tools.timing.step import TimedStep
from tools.timing.store import make_store

ROOT = Path(__file__).resolve().parent.parent.parent


def launch_training(store: PatchStore, folder: Path, ranks: int, flags: dict[str, object]) -> subprocess.Popen:
    """Start train.py on the store in a new process group. A flag with the value None is passed without a value."""
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), "--root-dir", str(store.layout.root)]
    given = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
    return subprocess.Popen(
        [*command, "--exp-name", "x", "--no-progress", *given],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop_process(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def read_peak_gb(pid: int) -> float:
    """Return the peak resident memory of a process so far, in GB, as counted by the operating system."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024 / 1e9


def measure_memory(store: PatchStore, K: int, folder: Path, args: argparse.Namespace) -> Row:
    """Measure the peak memory of train.py, as counted by the operating system."""
    row = Row(f"memory of train.py, {store.num_locations} locations, K {K}, batch {args.batch}", "GB", goal="3 GB")
    if not Path("/proc/self/status").exists():
        row.note = "unmeasured: this system does not report the peak memory of a process"
        return row
    sizes = {"batch-size": args.batch, "moco-k": K, "epochs": 1, "workers": 1, "device": args.device.type}
    process = launch_training(store, folder, 1, {**sizes, "print-freq": 2})
    try:
        printed = 0
        for line in process.stdout:
            printed += line.startswith("epoch")
            if printed == 4:
                row.ours = read_peak_gb(process.pid)
                break
        if row.ours is None:
            row.note = "unmeasured: train.py ended early"
    finally:
        stop_process(process)
    return row


def measure_multi_rank_samples_per_second(folder: Path, ranks: int, args: argparse.Namespace) -> float | None:
    """Return samples per second of train.py on several ranks that share the batch, or None after a timeout."""
    store = make_store(folder / "store", 8, 64)
    sizes = {"batch-size": args.batch, "moco-k": 4 * args.batch, "epochs": 2, "workers": 1, "device": args.device.type}
    process = launch_training(store, folder, ranks, sizes)
    try:
        process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        stop_process(process)
        return None
    lines = (folder / "ssl_exp/x/log.jsonl").read_text().splitlines()
    epochs = [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch"]
    steps = 8 * (64 // args.batch)
    return steps * args.batch / epochs[-1]["seconds"]


def measure_scaling(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Measure the milliseconds per step as one size grows and the others stay constant."""
    base = dict(batch=args.batch, locations=37, subjects=64, K=1024)
    cases: list[dict] = []
    grown = {
        "batch": [8, 16, 32, 64],
        "locations": [37, PUBLISHED_LOCATIONS],
        "subjects": [64, 512],
        "K": [1024, 4096, 16384],
    }
    for what, values in grown.items():
        steps = {}
        for value in values:
            size = {**base, what: value}
            store = make_store(folder / f"{what}_{value}", size["locations"], size["subjects"])
            steps[value] = TimedStep(store, size["batch"], size["K"], args.device, bf16=False)
        jobs = {value: (lambda step=step: step.run_steps(2)) for value, step in steps.items()}
        for value, times in time_in_turns(jobs, args.rounds).items():
            cases.append({"grown": what, "value": value, "ms_per_step": 1e3 * statistics.median(times) / 2})
        del steps, jobs
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 4
    for ranks in (1, 2, 4):
        if ranks <= gpus:
            rate = measure_multi_rank_samples_per_second(folder / f"ranks_{ranks}", ranks, args)
            cases.append(
                {"grown": "ranks", "value": ranks, "ms_per_step": None if rate is None else 1e3 * args.batch / rate}
            )
    return cases
