"""Step 2: a lung mask for every scan.

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches

uses lungmask (Hofmanninger et al., 2020), which downloads its R231 weights on first use. On a
machine without that download, copy the weights there once and name them:

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches \\
        --lungmask-weights unet_r231-d5d2fc3d.pth --num-workers 4

or use the classical method, which needs no weights (see preprocess/threshold.py for its limits):

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches --method threshold

Writes <root-dir>/lung_mask/{sid}.nii.gz, uint8 on the scan's own grid: 1 right lung, 2 left lung
(the patient's). A mask of your own under that name is checked and kept.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout
from misc.command import OneOf, Parser, run
from misc.progress import add_progress_flag
from preprocess.geometry import same_grid, write_image
from preprocess.lungs import air_share, check_lungs, load_lungmask, lung_mask, lung_volumes
from preprocess.outputs import Output, file_stamp
from preprocess.scan import FACTS, ScanError, read_mask, with_warnings
from preprocess.subjects import Subject, add_store, add_subjects, parse_flags, read_subjects
from preprocess.workers import Step, load_shared, run_steps


def segment(
    subject: Subject, previous: dict, *, root_dir: str, method: str, weights: str | None, settings: str, overwrite: bool
) -> dict[str, Any]:
    """Step 2 for one subject; see run_subjects. Raises ScanError, Skip."""
    subject.check_image()
    layout = StoreLayout(root_dir)
    target = layout.lung_mask(subject.sid)
    stamps = {"method": settings, "image_stamp": file_stamp(subject.image, subject.series)}
    output = Output(layout, "segment_lung", subject.sid, previous, [target], stamps)

    def verify() -> dict[str, float]:
        mask = read_mask(target)
        figures = lung_volumes(mask, target)
        if output.ours:
            return {**figures, **output.earlier("air", *FACTS)}
        scan = load_shared(subject)
        if not same_grid(mask, scan.image):
            raise ScanError(
                f"{target}, which was not made here, is not on the grid of {subject.image}; remove it or resample it"
            )
        figures["air"] = round(air_share(mask, scan.image), 3)
        return {**figures, **with_warnings(scan.facts, check_lungs(mask, scan.image, target))}

    output.keep(verify, overwrite)
    output.begin()
    scan = load_shared(subject)
    mask = lung_mask(scan.image, method, weights, subject.image)
    facts = with_warnings(scan.facts, check_lungs(mask, scan.image, f"the mask of {subject.image}"))
    write_image(mask, target)
    return {**lung_volumes(mask, subject.image), "air": round(air_share(mask, scan.image), 3), **facts, **stamps}


# ============================================================ the step


def add_segmentation(parser: Parser) -> None:
    """Flags of this step alone."""
    text = (
        "lungmask is a network and handles consolidated lungs; threshold needs no weights and suits air-filled lungs, "
        "emphysema included"
    )
    parser.add_argument("--method", type=OneOf("lungmask", "threshold"), default="lungmask", help=text)
    text = "R231 state dict, for machines that cannot download it (default: download)"
    parser.add_argument("--lungmask-weights", metavar="FILE", help=text)


def check_segmentation(args: argparse.Namespace) -> None:
    """Raise StoreError for flags that do not go together or name a missing file."""
    if args.lungmask_weights and args.method != "lungmask":
        raise StoreError("--lungmask-weights goes with --method lungmask")
    if args.lungmask_weights and not os.path.isfile(args.lungmask_weights):
        raise StoreError(f"--lungmask-weights {args.lungmask_weights} does not exist")


def segmentation_step(args: argparse.Namespace) -> Step:
    """The step, by its flags. Raises UserError."""
    check_segmentation(args)
    settings, weights = args.method, None
    if args.lungmask_weights:
        weights = os.path.abspath(args.lungmask_weights)
        with open(weights, "rb") as stream:
            settings += "-" + hashlib.sha256(stream.read()).hexdigest()[:12]
    if args.method == "lungmask" and not args.scheduler:
        load_lungmask(weights)  # a download that fails is one error, not one for every subject
    made_by = dict(method=args.method, weights=weights, settings=settings)
    where = dict(root_dir=os.path.abspath(args.root_dir), overwrite=args.overwrite)
    return Step("segment_lung", segment, {**where, **made_by})


def main() -> int:
    args = parse_flags(__doc__, add_subjects, add_store, add_segmentation, add_progress_flag)
    check_segmentation(args)
    subjects = read_subjects(args.input_csv)  # before the weights are downloaded
    return run_steps([segmentation_step(args)], subjects, args)


if __name__ == "__main__":
    run(main)
