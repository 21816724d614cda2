"""Stage 3: compute an affine transform from the atlas to every scan.

    python preprocess/register.py --input-csv dataset.csv --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --num-workers 4

This command registers the lung masks of stage 2 to the atlas mask. First, ANTs (Avants et al., 2011) aligns both lungs
as one shape on a grid of 8 mm. Then refine.py maximises the overlap of the right lungs and of the left lungs on a grid
of 3 mm. Coarse grids are enough because masks carry no detail below a few millimetres: the Dice coefficient is within
0.001 of the best that an affine can reach.

Writes <root-dir>/transform/{sid}_Reg_Atlas_Affine_0GenericAffine.mat (ITK affine, atlas points to
scan points). The report lists the overlap (Dice) with the atlas at 1 mm.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreLayout
from misc.command import Parser, between, run
from misc.progress import add_progress_flag
from preprocess.atlas import atlas_fingerprint, load_atlas, read_affine
from preprocess.geometry import write_transform
from preprocess.outputs import Output
from preprocess.registration import check_overlap, measure_overlap, register_masks
from preprocess.scan import EarlierFailure, read_mask
from preprocess.subjects import Subject, add_atlas_flag, add_store_flag, add_subject_flags, parse_flags, read_subjects
from preprocess.workers import Step, run_steps

FIGURES = ("dice", "dice_right", "dice_left")


def register_subject(
    subject: Subject, previous: dict, *, root_dir: str, atlas_mask: str, atlas: str, min_dice: float, overwrite: bool
) -> dict[str, Any]:
    """Register one subject and return its report values; see Step.work. Raises ScanError, Skip."""
    layout = StoreLayout(root_dir)
    source, target = layout.lung_mask(subject.sid), layout.transform(subject.sid)
    output = Output(layout, "register", subject.sid, previous, [target], {"atlas": atlas}, [source])

    def check_existing_transform() -> dict[str, Any]:
        read_affine(target)
        return output.get_previous_report_columns(*FIGURES)

    output.skip_if_valid(check_existing_transform, overwrite)
    output.claim_and_remove_old_files()
    if not source.is_file():
        raise EarlierFailure(
            f"no lung mask at {source}; run preprocess/segment_lung.py and check its report for this subject"
        )
    fixed, moving = load_atlas(atlas_mask), read_mask(source)
    transform = register_masks(fixed, moving)
    figures = measure_overlap(fixed, moving, transform)
    check_overlap(figures, min_dice, source)
    write_transform(transform, target)
    return {**figures, "atlas": atlas}


# ============================================================ the stage


def add_registration_flags(parser: Parser) -> None:
    """Add the flags that only this stage has."""
    text = (
        "smallest accepted Dice overlap, for both lungs together and for each lung; a subject with less overlap fails. "
        "Look at the masks before you lower this limit"
    )
    parser.add_argument("--min-dice", type=between(float, 0, 1), default=0.5, help=text)


def make_registration_step(args: argparse.Namespace) -> Step:
    """Build the stage from its flags. Raises UserError."""
    atlas_mask = os.path.abspath(args.atlas_mask)
    where = dict(root_dir=os.path.abspath(args.root_dir), overwrite=args.overwrite)
    atlas = dict(atlas_mask=atlas_mask, atlas=atlas_fingerprint(load_atlas(atlas_mask)))
    return Step("register", register_subject, {**where, **atlas, "min_dice": args.min_dice})


def main() -> int:
    args = parse_flags(
        __doc__, add_subject_flags, add_store_flag, add_atlas_flag, add_registration_flags, add_progress_flag
    )
    subjects = read_subjects(args.input_csv)
    return run_steps([make_registration_step(args)], subjects, args)


if __name__ == "__main__":
    run(main)
