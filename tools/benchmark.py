"""Measure the speed of each part of the package, and compare it with a literal implementation of the method.

    python tools/benchmark.py --quick            under 2 minutes on 2 cores
    python tools/benchmark.py --json speed.json  the whole table, about 10 minutes on 2 cores
    python tools/benchmark.py --choices          what each option of train.py costs
    python tools/benchmark.py --scan thorax.nii.gz --atlas-mask M    preprocessing of a scan, part by part
    python tools/dev/gpu.py --out-dir gpu        more measurements on a GPU

For each row of the table, timings of this code alternate with timings of the literal implementation in dev/literal.py.
The literal implementation runs in a separate process. The literal code processes one sample at a time in every
convolution and in MONAI's transforms, keeps a queue of shape (moco_dim, K, L), and encodes all patches of a subject at
once. This package and the literal implementation both use one BatchNorm group. To compare machines, use the ratio of
the literal timing to this code's timing. Each row of the table shows the median, smallest and largest ratio over the
rounds.

Both implementations must give the same loss before anything is timed. Rows that cannot be measured on this machine are
marked as unmeasured.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from misc.command import OneOf, Parser, at_least, run
from misc.files import write_json
from models.fast.memory import keep_freed_memory_in_process
from tools.dev.apart import PUBLISHED_LOCATIONS, LiteralProcess
from tools.timing.choices import format_option_timings, time_training_options
from tools.timing.data import measure_augmentation, measure_reading
from tools.timing.extraction import measure_extraction
from tools.timing.measure import describe_machine, format_timing_table
from tools.timing.runs import measure_memory, measure_scaling
from tools.timing.scans import time_scan_preprocessing
from tools.timing.store import make_store
from tools.timing.training import measure_training


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="use smaller inputs, repeat each measurement less often, and skip the scaling section",
    )
    add(
        "--choices",
        action="store_true",
        help="measure only the cost of each option of train.py: about 10 minutes on 2 cores",
    )
    add(
        "--scan",
        metavar="FILE",
        help="measure only the preprocessing of this scan, in 1 to 2 minutes; needs --atlas-mask",
    )
    add("--atlas-mask", metavar="FILE", help="lung mask of the atlas, for --scan")
    add("--atlas-patch-loc", metavar="FILE", help="table of locations, for --scan (default: a grid over --atlas-mask)")
    add("--json", help="also write all results to this JSON file")
    add(
        "--device",
        type=OneOf("auto", "cpu", "cuda"),
        default="auto",
        help="device to measure; auto uses a GPU if there is one",
    )
    add("--batch", type=at_least(int, 2), default=32, help="number of samples per training step")
    add(
        "--rounds",
        type=at_least(int, 1),
        help="number of times to repeat each measurement (default: 5, or 2 with --quick)",
    )
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: this machine has no usable GPU; use --device cpu")
    if bool(args.scan) != bool(args.atlas_mask) or (args.atlas_patch_loc and not args.scan):
        parser.error("--scan and --atlas-mask need each other, and --atlas-patch-loc needs both flags")
    for name in ("scan", "atlas_mask", "atlas_patch_loc"):
        if getattr(args, name) and not Path(getattr(args, name)).exists():
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} does not exist")
    args.device = torch.device("cuda" if gpu and args.device != "cpu" else "cpu")
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.steps = 2 if args.quick else 6
    args.reading_subjects = 64 if args.quick else 1024
    return args


def main() -> None:
    args = parse_arguments()
    if args.device.type == "cpu":
        keep_freed_memory_in_process()
    machine = describe_machine(args.device)
    print(
        ", ".join(
            f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in machine.items()
        )
    )
    locations, K = (64, 512) if args.quick else (PUBLISHED_LOCATIONS, 4096)
    report: dict = {"machine": machine, "quick": args.quick}
    with tempfile.TemporaryDirectory(prefix="drasclr-benchmark-") as scratch:
        folder = Path(scratch)
        if args.choices or args.scan:
            rows = time_scan_preprocessing(args) if args.scan else time_training_options(folder / "choices", args)
            print(format_timing_table(rows) if args.scan else format_option_timings(rows))
            if args.json:
                write_json(args.json, {**report, "rows": [asdict(row) for row in rows]})
            return
        store = make_store(folder / "store", locations, 64 if args.quick else 256)
        apart = LiteralProcess(store, K, args)
        rows = measure_training(store, K, apart, args, machine, report)
        rows += measure_extraction(store, apart, args, machine)
        apart.close()
        rows += measure_augmentation(args)
        rows += measure_reading(folder / "reading", args)
        rows.append(measure_memory(store, K, folder / "memory_run", args))
        print(format_timing_table(rows))
        print(f"\nloss of the first step: {report['first_step_loss']}")
        for name, parts in report["profile_ms"].items():
            listed = ", ".join(
                f"{part} {value:.1f}" for part, value in sorted(parts.items(), key=lambda item: -item[1])
            )
            print(f"time of each part of a step, ms, {name}: {listed}")
        if not args.quick:
            report["scaling"] = measure_scaling(folder / "scaling", args)
            print("\n| size | value | ms per step |\n| --- | --- | --- |")
            for case in report["scaling"]:
                value = "unmeasured" if case["ms_per_step"] is None else f"{case['ms_per_step']:.0f}"
                print(f"| {case['grown']} | {case['value']} | {value} |")
    report["rows"] = [asdict(row) for row in rows]
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    run(main)
