"""Measure the step time and memory of each option of train.py."""

import argparse
import re
import statistics
from pathlib import Path

from tools.timing.measure import Row
from tools.timing.runs import launch_training, read_peak_gb, stop_process
from tools.timing.store import make_store

CHOICES: dict[str, dict[str, object]] = {
    "as published": {},
    "--bn-groups 1": {"bn-groups": 1},
    "--negatives batch": {"negatives": "batch"},
    "--mask-own": {"mask-own": None},
    "--translate 3": {"translate": 3},
    "--augmentation asg": {"augmentation": "asg"},
    "--augmentation agi": {"augmentation": "agi"},
    "--location-order interleaved": {"location-order": "interleaved"},
    "--optimizer adamw": {"optimizer": "adamw"},
    "--accumulate 4": {"accumulate": 4},
    "--num-experts 4": {"num-experts": 4},
    "--k-neighbors 1": {"k-neighbors": 1},
}
STEPS = 4  # steps per printed line


def measure_step_time_and_memory(
    store: Path, folder: Path, train_flags: dict[str, object], args: argparse.Namespace
) -> tuple[float, float]:
    """Return seconds per step (the median over all printed lines except the first) and peak memory in GB."""
    sizes = {"batch-size": args.batch, "moco-k": 4096, "epochs": 1, "workers": 1, "device": args.device.type}
    process = launch_training(store, folder, 1, {**sizes, "print-freq": STEPS, **train_flags})
    rates, peak = [], float("nan")
    try:
        for line in process.stdout:
            found = re.search(r"([\d.]+) samples/s", line)
            if found and "[" in line:
                rates.append(float(found[1]))
                peak = read_peak_gb(process.pid)
            if len(rates) == 4:
                break
    finally:
        stop_process(process)
    if len(rates) < 4:
        raise RuntimeError(f"train.py ended early with the flags {train_flags}")
    return args.batch / statistics.median(rates[1:]), peak


def time_training_options(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Return one row per option: ms per step, ratio to the published options in the same round, and memory."""
    store = make_store(folder / "store", 37, 4 * args.batch)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CHOICES}
    for number in range(max(2, args.rounds // 2)):
        for name, flags in CHOICES.items():
            run = folder / f"run{number}" / re.sub(r"\W+", "-", name)
            found[name].append(measure_step_time_and_memory(store, run, flags, args))
    rows = []
    for name, values in found.items():
        ratios = [ours[0] / base[0] for ours, base in zip(values, found["as published"])]
        row = Row(f"step with {name}", "ms", note=f"memory {statistics.median(peak for _, peak in values):.2f} GB")
        row.ours = 1e3 * statistics.median(time for time, _ in values)
        row.ratio, row.ratio_low, row.ratio_high = statistics.median(ratios), min(ratios), max(ratios)
        rows.append(row)
    return rows


def format_option_timings(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = ["| option | ms per step | relative to published (range) | peak memory |", "| --- | --- | --- | --- |"]
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        name, peak = row.what.removeprefix("step with "), row.note.removeprefix("memory ")
        lines.append(f"| {name} | {row.ours:.0f} | {ratio} | {peak} |")
    return "\n".join(lines)
