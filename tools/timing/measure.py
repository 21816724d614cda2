"""Time several jobs alternately, and format the results as a table."""

import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Row:
    """One row of the benchmark table. Values are None if they were not measured."""

    what: str
    unit: str
    ours: float | None = None
    literal: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    of_matrix_rate: float | None = None
    goal: str = ""
    note: str = ""


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_seconds(work: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def time_in_turns(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Call each job once to warm up, then time each job once per round. Return the times of each job in seconds."""
    for work in jobs.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, work in jobs.items():
            times[name].append(time_seconds(work))
    return times


def make_comparison_row(
    row_name: str,
    unit: str,
    ours: list[float],
    literal: list[float] | None,
    work_per_round: float,
    literal_work_per_round: float = 0.0,
    gflop_per_work: float = 0.0,
    machine_gflop_per_s: float = 0.0,
    **more,
) -> Row:
    """Make a table row from the times of this package and, if given, of the literal implementation in the same rounds.

    Args:
        row_name: name of the row.
        unit: unit of the row; a rate if the unit ends in '/s', otherwise a time per amount of work.
        ours, literal: seconds per round of this package and of the literal implementation.
        work_per_round, literal_work_per_round: amount of work per round of each implementation.
        gflop_per_work: GFLOP per unit of work.
        machine_gflop_per_s: GFLOP/s of the machine in matrix products. The row shows this package's GFLOP/s as a
            fraction of the machine's GFLOP/s.
    """
    row = Row(row_name, unit, **more)
    middle = statistics.median(ours)
    is_rate = unit.endswith("/s")
    row.ours = work_per_round / middle if is_rate else middle / work_per_round
    if gflop_per_work and machine_gflop_per_s:
        row.of_matrix_rate = gflop_per_work * work_per_round / middle / machine_gflop_per_s
    if literal:
        slow = statistics.median(literal)
        row.literal = literal_work_per_round / slow if is_rate else slow / literal_work_per_round
        ratios = [(b / literal_work_per_round) / (a / work_per_round) for a, b in zip(ours, literal)]
        row.ratio, row.ratio_low, row.ratio_high = statistics.median(ratios), min(ratios), max(ratios)
    return row


def measure_matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the GFLOP/s that torch reaches in a large matrix product on this machine."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = time_in_turns({"product": lambda: a @ b}, 5)["product"]
    return 2 * size**3 / statistics.median(times) / 1e9


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


NO_BF16 = "unmeasured: the processor has no bf16 arithmetic"


def list_precisions(machine: dict) -> list[str]:
    """Return the dtypes to time. Emulated bfloat16 is left out, because its speed is not representative."""
    return ["float32", "bf16"] if machine["fast_bf16"] else ["float32"]


def describe_machine(device: torch.device) -> dict[str, object]:
    """Describe the machine: processor, torch version, device and the speed of matrix products."""
    name = platform.processor() or platform.machine()
    flags = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text)[1]
        flags = " ".join(sorted(set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b", text))))
    except (OSError, TypeError):
        pass
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": name,
        "instructions": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    found["matrix_gflops_float32"] = measure_matmul_gflops(device, torch.float32)
    found["fast_bf16"] = has_fast_bf16(device)
    if found["fast_bf16"]:  # with emulated bfloat16, this measurement would take minutes
        found["matrix_gflops_bf16"] = measure_matmul_gflops(device, torch.bfloat16)
    return found


def format_timing_table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""

    def format_number(value: float | None, unit: str) -> str:
        return "unmeasured" if value is None else f"{value:.3g} {unit}"

    lines = [
        "| what | here | literal | ratio (range) | of matrix rate | goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.1f} ({row.ratio_low:.1f} to {row.ratio_high:.1f})"
        share = "" if row.of_matrix_rate is None else f"{100 * row.of_matrix_rate:.0f} %"
        what = f"{row.what} ({row.note})" if row.note else row.what
        literal = "" if row.literal is None else format_number(row.literal, row.unit)
        lines.append(f"| {what} | {format_number(row.ours, row.unit)} | {literal} | {ratio} | {share} | {row.goal} |")
    return "\n".join(lines)
