"""Stage 2: segment the lungs in every scan.

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches

This command uses lungmask (Hofmanninger et al., 2020), which downloads its R231 weights on first use. If the machine
cannot download the weights, copy their file to the machine and pass its path:

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches \\
        --lungmask-weights unet_r231-d5d2fc3d.pth --num-workers 4

The classical method needs no weights (its limits are described in preprocess/threshold.py):

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches --method threshold

Writes <root-dir>/lung_mask/{sid}.nii.gz, uint8 on the scan's own grid: 1 right lung, 2 left lung (the subject's right
and left). If lung_mask/{sid}.nii.gz is your own mask, the script checks the mask and keeps it.
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
from preprocess.geometry import have_same_grid, write_image
from preprocess.lungs import check_lungs, load_lungmask_network, lung_mask, lung_volumes, measure_air_share
from preprocess.outputs import Output, make_file_stamp
from preprocess.scan import FACTS, ScanError, add_warnings, read_mask
from preprocess.subjects import Subject, add_store_flag, add_subject_flags, parse_flags, read_subjects
from preprocess.workers import Step, load_scan_once, run_steps


def segment_subject(
    subject: Subject, previous: dict, *, root_dir: str, method: str, weights: str | None, settings: str, overwrite: bool
) -> dict[str, Any]:
    """Segment the lungs of one subject and return its report values; see Step.work. Raises ScanError, Skip."""
    subject.check_image_exists()
    layout = StoreLayout(root_dir)
    target = layout.lung_mask(subject.sid)
    stamps = {"method": settings, "image_stamp": make_file_stamp(subject.image, subject.series)}
    output = Output(layout, "segment_lung", subject.sid, previous, [target], stamps)

    def check_existing_mask() -> dict[str, float]:
        mask = read_mask(target)
        figures = lung_volumes(mask, target)
        if output.ours:
            return {**figures, **output.get_previous_report_columns("air", *FACTS)}
        scan = load_scan_once(subject)
        if not have_same_grid(mask, scan.image):
            raise ScanError(
                f"{target} was not made by this script and is not on the grid of {subject.image}; remove or resample it"
            )
        figures["air"] = round(measure_air_share(mask, scan.image), 3)
        return {**figures, **add_warnings(scan.facts, check_lungs(mask, scan.image, target))}

    output.skip_if_valid(check_existing_mask, overwrite)
    output.claim_and_remove_old_files()
    scan = load_scan_once(subject)
    mask = lung_mask(scan.image, method, weights, subject.image)
    facts = add_warnings(scan.facts, check_lungs(mask, scan.image, f"the mask of {subject.image}"))
    write_image(mask, target)
    return {
        **lung_volumes(mask, subject.image),
        "air": round(measure_air_share(mask, scan.image), 3),
        **facts,
        **stamps,
    }


# ============================================================ the stage


def add_segmentation_flags(parser: Parser) -> None:
    """Add the flags that only segment_lung.py has."""
    text = (
        "segmentation method: lungmask is a network and handles consolidated lungs; threshold needs no weights and "
        "suits air-filled lungs, including emphysema"
    )
    parser.add_argument("--method", type=OneOf("lungmask", "threshold"), default="lungmask", help=text)
    text = "file with lungmask's R231 state dict, for machines without internet access (default: download it)"
    parser.add_argument("--lungmask-weights", metavar="FILE", help=text)


def check_segmentation_flags(args: argparse.Namespace) -> None:
    """Raise StoreError if the flags contradict each other or if the weights file is missing."""
    if args.lungmask_weights and args.method != "lungmask":
        raise StoreError(
            "--lungmask-weights works only with --method lungmask; change --method or leave out the weights"
        )
    if args.lungmask_weights and not os.path.isfile(args.lungmask_weights):
        raise StoreError(f"--lungmask-weights {args.lungmask_weights} does not exist")


def make_segmentation_step(args: argparse.Namespace) -> Step:
    """Build the stage from its flags. Raises UserError."""
    check_segmentation_flags(args)
    settings, weights = args.method, None
    if args.lungmask_weights:
        weights = os.path.abspath(args.lungmask_weights)
        with open(weights, "rb") as stream:
            settings += "-" + hashlib.sha256(stream.read()).hexdigest()[:12]
    if args.method == "lungmask" and not args.scheduler:
        load_lungmask_network(weights)  # report a failed download once, not once per subject
    made_by = dict(method=args.method, weights=weights, settings=settings)
    where = dict(root_dir=os.path.abspath(args.root_dir), overwrite=args.overwrite)
    return Step("segment_lung", segment_subject, {**where, **made_by})


def main() -> int:
    args = parse_flags(__doc__, add_subject_flags, add_store_flag, add_segmentation_flags, add_progress_flag)
    check_segmentation_flags(args)
    subjects = read_subjects(args.input_csv)  # check the table before downloading weights
    return run_steps([make_segmentation_step(args)], subjects, args)


if __name__ == "__main__":
    run(main)
