"""Run all five preprocessing stages in order.

    sh preprocess/run_preprocess.sh --input-csv dataset.csv --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --atlas-patch-loc atlas_patch_loc.npy --num-workers 4

The script accepts the flags of all five stages. The script skips finished work, so run the same command again
after an interruption or after adding subjects. The flags and the input table are checked before anything is written.
Stages 2 to 4 run for one subject before the next subject starts, so each scan is read only once.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from misc.command import run
from misc.progress import add_progress_flag
from preprocess.atlas import load_atlas
from preprocess.group_patches import group_patches_by_location
from preprocess.patchify_atlas import add_location_flags, write_locations
from preprocess.patchify_images import add_cutting_flags, make_cutting_step
from preprocess.qc_page import write_qc_page
from preprocess.register import add_registration_flags, make_registration_step
from preprocess.segment_lung import add_segmentation_flags, check_segmentation_flags, make_segmentation_step
from preprocess.subjects import (
    add_atlas_flag,
    add_patch_size_flag,
    add_store_flag,
    add_subject_flags,
    parse_flags,
    read_subjects,
)
from preprocess.workers import run_steps


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of all stages."""
    shared = (add_subject_flags, add_store_flag, add_atlas_flag, add_patch_size_flag, add_progress_flag)
    return parse_flags(
        __doc__,
        *shared,
        add_location_flags,
        add_segmentation_flags,
        add_registration_flags,
        add_cutting_flags,
        argv=argv,
    )


def main() -> int:
    args = parse_arguments()
    check_segmentation_flags(args)
    subjects = read_subjects(args.input_csv)
    load_atlas(args.atlas_mask)
    write_locations(args)
    steps = [make_segmentation_step(args), make_registration_step(args), make_cutting_step(args, subjects)]
    status = run_steps(steps, subjects, args) or group_patches_by_location(args)
    print(f"qc_page: open {write_qc_page(args.root_dir)} in a browser")
    return status


if __name__ == "__main__":
    run(main)
