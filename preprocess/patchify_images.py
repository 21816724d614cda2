"""Stage 4: cut patches from every scan at the atlas locations.

    python preprocess/patchify_images.py --input-csv dataset.csv --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --num-workers 4

The script reorients each scan to the atlas, resamples it to 1 mm, pads it with 60 voxels of air and clips it to
[-1024, 240] HU. The subject's transform maps each corner in atlas_patch_loc.npy to a voxel of the resampled scan, where
a patch of 32 x 32 x 32 voxels is cut. Voxels outside the scan are set to -1024 HU.

Writes <root-dir>/patch/{sid}_patch.npy, patch_loc/{sid}_patch_loc.npy and qc/{sid}.png. The picture shows the patch
boxes over the scan and its mask. Look at a few pictures: they are the fastest way to spot a wrong mask or transform.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout, load_locations
from misc.command import Parser, run
from misc.files import load_array, save_array, write_atomically
from misc.progress import add_progress_flag
from misc.sizes import HU_MIN
from preprocess.atlas import atlas_fingerprint, load_atlas, read_affine
from preprocess.outputs import Output, make_file_stamp
from preprocess.patches import Patches, check_any_patch_inside_scan, cut_scan, measure_share_inside
from preprocess.picture import render_patch_picture
from preprocess.registration import measure_overlap
from preprocess.scan import ScanError, read_mask
from preprocess.subjects import (
    Subject,
    add_atlas_flag,
    add_patch_size_flag,
    add_store_flag,
    add_subject_flags,
    parse_flags,
    read_subjects,
)
from preprocess.workers import Step, load_scan_once, run_steps

LUNG_BELOW = -500  # HU; upper limit of lung voxels, because chest wall and heart are denser
FIGURES = (
    "patches",
    "patches_outside",
    "patches_partly_outside",
    "voxels_outside",
    "lung_hu",
    "centres_in_lungs",
    "centres_in_atlas_lungs",
)


def check_patch_array(path: Path, shape: tuple[int, ...]) -> None:
    """Raise ScanError unless a .npy file is complete and contains real numbers in an array of this shape."""
    advice = "remove it or pass --overwrite"
    try:
        array = load_array(path, mapped=True)
    except (OSError, ValueError) as error:
        raise ScanError(f"{path} cannot be read as an array ({error}); {advice}") from error
    if array.shape != shape or array.dtype.kind not in "iufb":
        raise ScanError(
            f"{path} has dtype {array.dtype} and shape {array.shape}, but must be numeric with shape {shape}; {advice}"
        )


def summarize_patches_for_report(cut: Patches, patch_size: int) -> dict[str, Any]:
    """Return the report values of the patches: their number, how much lies outside the scan, and the lung HU."""
    whole = patch_size**3
    return {
        "patches": len(cut.patches),
        "patches_outside": int((cut.outside == whole).sum()),
        "patches_partly_outside": int(((cut.outside > 0) & (cut.outside < whole)).sum()),
        "voxels_outside": int(cut.outside.sum()),
        "lung_hu": measure_lung_hu(cut.patches),
    }


def measure_lung_hu(patches: np.ndarray) -> float | str:
    """Return the median HU of voxels above -1024 (padding) and below -500 (denser tissue), a measure of lung air."""
    values = patches[(patches > HU_MIN) & (patches < LUNG_BELOW)]
    return round(float(np.median(values)), 1) if len(values) else ""


def format_title(sid: str, figures: dict[str, Any], sides: dict[str, float]) -> str:
    """Write the title of a subject's picture; ``sides`` comes from measure_overlap() and is empty without a mask."""
    inside, atlas = figures["centres_in_lungs"], figures["centres_in_atlas_lungs"]
    shares = "no mask" if inside == "" else f"{inside:.2f} of patch centres in the lungs (atlas: {atlas:.2f})"
    edge = f"outside the scan: {figures['patches_outside']}, partly outside: {figures['patches_partly_outside']}"
    dice = f"; Dice right {sides['dice_right']:.2f}, left {sides['dice_left']:.2f}" if sides else ""
    return f"{sid}: {figures['patches']} patches, {shares}{dice}; {edge}"


def patchify_subject(
    subject: Subject,
    previous: dict,
    *,
    root_dir: str,
    atlas_mask: str,
    atlas: str,
    patch_size: int,
    qc: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Cut the patches of one subject and return its report values; see Step.work. Raises ScanError, Skip."""
    layout = StoreLayout(root_dir)
    table = load_locations(layout.find_atlas_patch_loc())
    transform_path, mask_path = layout.transform(subject.sid), layout.lung_mask(subject.sid)
    patch_path, corner_path, picture_path = (
        path(subject.sid) for path in (layout.patch, layout.patch_loc, layout.qc_picture)
    )
    if not patch_path.is_file():
        read_affine(transform_path)  # raises if there is no transform, before any file changes
    subject.check_image_exists()
    stamps = {"atlas": atlas, "image_stamp": make_file_stamp(subject.image, subject.series)}
    inputs = [transform_path, *([mask_path] if mask_path.is_file() else [])]
    files, pictures = [patch_path, corner_path], [picture_path] if qc else []
    output = Output(layout, "patchify_images", subject.sid, previous, files, stamps, inputs, pictures)

    def verify_patches_and_get_report_columns() -> dict[str, Any]:
        check_patch_array(patch_path, (len(table), *[patch_size] * 3))
        check_patch_array(corner_path, table.shape)
        return output.get_previous_report_columns(*FIGURES)

    output.skip_if_valid(verify_patches_and_get_report_columns, overwrite)
    output.claim_and_remove_old_files()
    atlas_image = load_atlas(atlas_mask)
    transform = read_affine(transform_path)
    cut = cut_scan(load_scan_once(subject).image, transform, atlas_image, table, patch_size)
    check_any_patch_inside_scan(cut, subject.image)
    mask = read_mask(mask_path) if mask_path.is_file() else None
    figures = {
        **summarize_patches_for_report(cut, patch_size),
        "centres_in_lungs": ""
        if mask is None
        else round(measure_share_inside(cut.corners, patch_size, cut.volume, mask), 4),
        "centres_in_atlas_lungs": round(measure_share_inside(table, patch_size, atlas_image, atlas_image), 4),
    }
    if qc:
        sides = measure_overlap(atlas_image, mask, transform) if mask is not None else {}
        title = format_title(subject.sid, figures, sides)
        picture = render_patch_picture(cut.volume, cut.values, mask, cut.corners, patch_size, title)
        write_atomically(picture_path, lambda stream: stream.write(picture))
    save_array(corner_path, cut.corners)
    save_array(patch_path, cut.patches)
    return {**figures, **stamps}


# ============================================================ the stage


def check_disk_space(root_dir: Path, subjects: list[Subject], num_locations: int, patch_size: int) -> None:
    """Raise StoreError unless the disk has room for the missing patches and their grouped copy."""
    layout = StoreLayout(root_dir)
    missing = sum(not layout.patch(subject.sid).is_file() for subject in subjects)
    each = num_locations * patch_size**3 * 2
    needed = missing * each * 2
    root_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root_dir).free
    if needed > free:
        raise StoreError(
            f"{missing} subjects of {each / 1e6:.0f} MB each, stored in both patch/ and grouped_patch/, need "
            f"{needed / 1e9:.1f} GB, but {root_dir} has {free / 1e9:.1f} GB free; "
            f"choose another --root-dir or fewer subjects"
        )


def add_cutting_flags(parser: Parser) -> None:
    """Add the flags that only this stage has."""
    text = "do not draw the pictures in qc/; this saves about one second per subject"
    parser.add_argument("--no-qc", action="store_true", help=text)


def make_cutting_step(args: argparse.Namespace, subjects: list[Subject]) -> Step:
    """Build the stage from its flags. Raises UserError, for example if the patches will not fit on the disk."""
    layout = StoreLayout(args.root_dir)
    table = load_locations(layout.find_atlas_patch_loc())
    atlas_mask = os.path.abspath(args.atlas_mask)
    atlas_image = load_atlas(atlas_mask)
    if ((table + args.patch_size) > np.array(atlas_image.GetSize())).any():
        raise StoreError(
            f"{layout.atlas_patch_loc} has patches outside the atlas {args.atlas_mask}; pass the atlas mask that this "
            "table was made for"
        )
    check_disk_space(layout.root, subjects, len(table), args.patch_size)
    where = dict(root_dir=os.path.abspath(args.root_dir), overwrite=args.overwrite)
    atlas = dict(atlas_mask=atlas_mask, atlas=atlas_fingerprint(atlas_image))
    settings = {**where, **atlas, "patch_size": args.patch_size, "qc": not args.no_qc}
    return Step("patchify_images", patchify_subject, settings)


def main() -> int:
    args = parse_flags(
        __doc__,
        add_subject_flags,
        add_store_flag,
        add_atlas_flag,
        add_patch_size_flag,
        add_cutting_flags,
        add_progress_flag,
    )
    subjects = read_subjects(args.input_csv)
    return run_steps([make_cutting_step(args, subjects)], subjects, args)


if __name__ == "__main__":
    run(main)
