"""Step 3: an affine transform from the atlas to every scan.

    python preprocess/register.py --input-csv dataset.csv --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --num-workers 4

registers the lung masks of step 2, as labels 50 (right) and 100 (left), to the atlas's, with ANTs
(Avants et al., 2011). Masks carry no detail below a few millimetres, so 4 mm are enough: measured
on a real scan, the squared difference of the labels at 4 mm overlaps the atlas as well as the
published recipe's mutual information at 1 mm, in a thirtieth of the time.

Writes <root-dir>/transform/{sid}_Reg_Atlas_Affine_0GenericAffine.mat (ITK affine, atlas points to
scan points); the report has the overlap (Dice) with the atlas at 1 mm.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout
from preprocess.atlas import atlas_fingerprint, load_atlas, read_affine
from preprocess.scan import EarlierFailure, ScanError, read_mask
from preprocess.subjects import (
    Skip,
    Subject,
    add_common_arguments,
    claim,
    read_subjects,
    run_subjects,
    script_main,
)

REGISTRATION_SPACING = 4.0  # mm
SMALL_ATLAS = 200.0  # mm; a smaller atlas (a phantom) is registered on a proportionally finer grid
LABELS = {1: 50.0, 2: 100.0}  # patient's mask -> the atlas's labels


def coarse_labels(mask: sitk.Image, values: dict[int, float], spacing: float):
    """The mask as an ANTs image of label values, averaged onto a coarse grid with a margin of zeros."""
    import ants

    labels = sitk.GetArrayViewFromImage(mask)
    floats = np.zeros(labels.shape, dtype=np.float32)
    for label, value in values.items():
        floats[labels == label] = value
    image = sitk.GetImageFromArray(floats)
    image.CopyInformation(mask)
    image = sitk.BinShrink(image, [max(1, round(spacing / own)) for own in image.GetSpacing()])
    size = [int(np.ceil(n * own / spacing)) for n, own in zip(image.GetSize(), image.GetSpacing())]
    image = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [spacing] * 3, image.GetDirection(), 0.0
    )
    image = sitk.ConstantPad(image, [4] * 3, [4] * 3, 0.0)
    return ants.from_numpy(
        np.ascontiguousarray(sitk.GetArrayViewFromImage(image).transpose(2, 1, 0)),  # (z, y, x) -> (x, y, z)
        origin=image.GetOrigin(),
        spacing=image.GetSpacing(),
        direction=np.array(image.GetDirection()).reshape(3, 3),
    )


def overlap(atlas: sitk.Image, mask: sitk.Image, transform: sitk.Transform) -> dict[str, float]:
    """Dice of both lungs together, of the right and of the left, on the atlas's own grid."""
    warped = sitk.GetArrayFromImage(sitk.Resample(mask, atlas, transform, sitk.sitkNearestNeighbor, 0))
    fixed = sitk.GetArrayViewFromImage(atlas)

    def dice(first: np.ndarray, second: np.ndarray) -> float:
        both = np.count_nonzero(first) + np.count_nonzero(second)
        return round(2 * np.count_nonzero(first & second) / both, 4) if both else 0.0

    return {
        "dice": dice(warped > 0, fixed > 0),
        "dice_right": dice(warped == 1, fixed == 50),
        "dice_left": dice(warped == 2, fixed == 100),
    }


def register(
    subject: Subject, previous: dict, *, root_dir: str, atlas_mask: str, atlas: str, min_dice: float, overwrite: bool
) -> dict[str, Any]:
    """Step 3 for one subject; see run_subjects."""
    layout = StoreLayout(root_dir)
    source, target = layout.lung_mask(subject.sid), layout.transform(subject.sid)
    made_here = bool(previous.get("atlas"))
    if target.exists() and not overwrite:
        fresh = source.is_file() and source.stat().st_mtime_ns <= target.stat().st_mtime_ns
        if not made_here or (previous["atlas"] == atlas and fresh):
            read_affine(target)
            raise Skip(
                {name: previous[name] for name in ("dice", "dice_right", "dice_left", "atlas") if name in previous}
            )
    claim(layout, "register", subject.sid)
    if made_here:  # of another mask or atlas: should this fail, the subject must not go on with it
        target.unlink(missing_ok=True)
    if not source.is_file():
        raise EarlierFailure(
            f"no lung mask at {source}; run preprocess/segment_lung.py, and see its report for this subject"
        )
    fixed_mask, moving_mask = load_atlas(atlas_mask), read_mask(source)

    extent = max(n * own for n, own in zip(fixed_mask.GetSize(), fixed_mask.GetSpacing()))
    spacing = REGISTRATION_SPACING * min(1.0, extent / SMALL_ATLAS)
    fixed = coarse_labels(fixed_mask, {50: 50.0, 100: 100.0}, spacing)
    moving = coarse_labels(moving_mask, LABELS, spacing)

    # ANTs draws the voxels that it compares; antspyx 0.6 takes a random_seed and ignores it, ANTs reads this.
    os.environ["ANTS_RANDOM_SEED"] = "1"
    import ants

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as aside:
        ants.registration(
            fixed,
            moving,
            type_of_transform="Affine",
            outprefix=os.path.join(aside, "x_"),
            aff_metric="meansquares",
            aff_iterations=(200, 100),
            aff_shrink_factors=(2, 1),
            aff_smoothing_sigmas=(1, 0),
            aff_random_sampling_rate=0.5,
            singleprecision=False,
        )
        made = Path(aside) / "x_0GenericAffine.mat"
        if not made.is_file():
            raise ScanError("ANTs wrote no transform; see whether the temporary folder's disk is full")
        figures = overlap(fixed_mask, moving_mask, read_affine(made))
        if figures["dice"] < min_dice:
            raise ScanError(
                f"registered lungs overlap the atlas with a Dice of {figures['dice']:.2f}, less than --min-dice "
                f"{min_dice}; look at {source}"
            )
        os.replace(made, target)
    return {**figures, "atlas": atlas}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--atlas-mask", required=True, help="atlas lung mask at 1 mm: 50 right lung, 100 left lung")
    parser.add_argument(
        "--min-dice",
        type=float,
        default=0.5,
        help="overlap with the atlas below which a subject counts as failed; lower it only after a look at the masks "
        "(default: %(default)s)",
    )
    args = parser.parse_args()
    if not 0 <= args.min_dice <= 1:
        raise StoreError(f"--min-dice {args.min_dice}: between 0 and 1")
    subjects = read_subjects(args.input_csv)
    atlas_mask = os.path.abspath(args.atlas_mask)
    return run_subjects(
        "register",
        register,
        subjects,
        args,
        dict(
            root_dir=os.path.abspath(args.root_dir),
            atlas_mask=atlas_mask,
            atlas=atlas_fingerprint(load_atlas(atlas_mask)),
            min_dice=args.min_dice,
            overwrite=args.overwrite,
        ),
    )


if __name__ == "__main__":
    script_main(main)
