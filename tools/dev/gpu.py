"""Measure training and extraction on a GPU, part by part, and compare the speed with an old commit.

    python tools/dev/gpu.py --out-dir gpu --old-commit 4eccfb9          all sections, 5 minutes
    python tools/dev/gpu.py --out-dir gpu --quick                       fewer rounds, 2 minutes
    python tools/dev/gpu.py --out-dir gpu --quick --device cpu          tiny sizes, to check that it runs

The script needs only torch, NumPy and SciPy. Each section writes <out-dir>/<section>.json when it ends, so an
interruption loses only the running section. --sections selects sections. Without the git history, use --old TREE with
the exported files of a commit.
"""

import argparse
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from misc.command import OneOf, Parser, run
from models.fast.memory import keep_freed_memory_in_process
from tools.dev.gpu_lab.sections import ROOT, SECTIONS, Lab
from tools.dev.gpu_lab.setting import QUICK, TINY, Sizes, write_result
from tools.dev.gpu_lab.store import FileStore


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="folder for the results and for the random patches that are used as input")
    add("--quick", action="store_true", help="take fewer measurements, at fewer locations")
    add(
        "--device",
        type=OneOf("auto", "cpu", "cuda"),
        default="auto",
        help="device to measure; auto uses a GPU if there is one; cpu uses tiny sizes, to check that the script runs",
    )
    add("--old-commit", help="commit to compare with; the script exports its files with git archive")
    add("--old", metavar="TREE", help="folder with the exported files of the commit to compare with")
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable GPU; use --device cpu")
    return args


def export_commit(commit: str, folder: Path) -> Path:
    """Export the files of a commit to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def main() -> None:
    args = parse_arguments()
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    keep_freed_memory_in_process(device)
    sizes = TINY if device.type == "cpu" else QUICK if args.quick else Sizes()
    out = Path(args.out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    old = (
        Path(args.old).resolve()
        if args.old
        else export_commit(args.old_commit, out / "old")
        if args.old_commit
        else None
    )
    lab = Lab(sizes, device, FileStore(out / "store", sizes.locations, sizes.subjects), out, old)
    for name in args.sections:
        start = time.perf_counter()
        try:
            found = SECTIONS[name](lab)
        except Exception as error:  # one failing section must not waste the GPU time of the others
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        found["section_seconds"] = round(time.perf_counter() - start, 1)
        write_result(out, name, found)
        print(f"== {name}: {found['section_seconds']} s", flush=True)
        for key, value in found.items():
            print(f"{key}: {str(value)[:2000]}", flush=True)


if __name__ == "__main__":
    run(main)
