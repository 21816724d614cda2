"""Stage 1: choose the patch locations and write them as a table of corners in the atlas.

    python preprocess/patchify_atlas.py --atlas-mask atlas_lung_mask.nii.gz --root-dir /data/patches

This command lays a grid over the lung mask of the atlas and keeps the patches that contain enough lung. The published
weights need the published table, which cannot be reproduced from the mask alone. To use these weights, pass this table:

    python preprocess/patchify_atlas.py --atlas-mask atlas_lung_mask.nii.gz --root-dir /data/patches \\
        --atlas-patch-loc atlas_patch_loc.npy

Writes <root-dir>/atlas_patch_loc.npy, an int64 array (L, 3): the lowest corner (x, y, z) of each patch in atlas voxels.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout, load_locations
from misc.command import Parser, at_least, run
from misc.files import save_array
from preprocess.atlas import load_atlas
from preprocess.geometry import ISO_SPACING
from preprocess.subjects import add_atlas_flag, add_patch_size_flag, add_store_flag, parse_flags

STEP_SIZE = 26  # distance between corners in voxels, the published value
MAX_PATCHES = 1000  # the lung threshold rises until fewer than this many patches remain


def find_grid_locations(lung: np.ndarray, patch_size: int, step_size: int) -> np.ndarray:
    """Return the corners of the grid patches that contain enough lung.

    A patch is kept if the fraction of lung voxels is strictly above a threshold. The threshold starts at 0.1 and rises
    in steps of 0.1 until fewer than 1000 patches are kept. Corners are ordered by x, then y, then z (z changes
    fastest). Each coordinate is less than size - patch_size, as in the published code.

    Args:
        lung: (x, y, z) bool lung mask.
        patch_size: edge length of a patch in voxels.
        step_size: distance between corners in voxels.

    Returns:
        (L, 3) int64 corners (x, y, z).

    Raises:
        StoreError: the atlas is smaller than a patch, or no patch has enough lung.
    """
    axes = [np.arange(0, size - patch_size, step_size) for size in lung.shape]
    if min(len(axis) for axis in axes) == 0:
        raise StoreError(
            f"the atlas of {lung.shape} voxels has no room for patches of {patch_size} voxels per axis; "
            "use a larger atlas mask"
        )
    # With cumulative sums over all three axes, eight look-ups count the lung voxels of a patch.
    total = np.zeros([size + 1 for size in lung.shape], dtype=np.int64)
    total[1:, 1:, 1:] = lung.astype(np.int64).cumsum(0).cumsum(1).cumsum(2)
    x, y, z = np.meshgrid(*axes, indexing="ij")
    count = np.zeros(x.shape, dtype=np.int64)
    for upper in np.ndindex(2, 2, 2):
        sign = (-1) ** (3 - sum(upper))
        count += sign * total[x + upper[0] * patch_size, y + upper[1] * patch_size, z + upper[2] * patch_size]
    corners = np.stack([x, y, z], axis=-1)
    for tenths in range(1, 10):
        # Compare integers, so that rounding has no effect on a patch exactly at the threshold.
        kept = count * 10 > tenths * patch_size**3
        if kept.sum() < MAX_PATCHES:
            break
    if not kept.any():
        raise StoreError(
            f"no patch of {patch_size} voxels per axis contains more than 10% lung; "
            "check that --atlas-mask is a lung mask with voxels of 1 mm"
        )
    return corners[kept].astype(np.int64)


def check_table_inside_atlas(table: np.ndarray, size: tuple[int, int, int], patch_size: int, source: str) -> None:
    """Raise StoreError unless every patch lies inside the atlas."""
    outside = ((table + patch_size) > np.array(size)).any(axis=1)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise StoreError(
            f"{source}: the patch in row {row}, corner {table[row].tolist()}, is outside the atlas of {size} voxels; "
            "pass the table that belongs to this atlas mask"
        )


def make_location_table(
    mask: sitk.Image, given_table_path: str | os.PathLike | None, patch_size: int, step_size: int
) -> np.ndarray:
    """Return the corners (L, 3) for an atlas: from the table ``given_table_path``, or from a new grid if it is None.

    Raises StoreError.
    """
    if given_table_path:
        table = load_locations(Path(given_table_path))
        check_table_inside_atlas(table, mask.GetSize(), patch_size, str(given_table_path))
        return table
    return find_grid_locations(_convert_mask_to_lung_array(mask), patch_size, step_size)


def _convert_mask_to_lung_array(mask: sitk.Image) -> np.ndarray:
    """Return the lungs of an atlas mask as a bool array (x, y, z)."""
    return sitk.GetArrayViewFromImage(mask).transpose(2, 1, 0) > 0  # (z, y, x) -> (x, y, z)


def write_locations(args: argparse.Namespace) -> int:
    """Run the stage with its flags and return the exit status."""
    mask = load_atlas(args.atlas_mask)
    if not np.allclose(mask.GetSpacing(), ISO_SPACING, atol=1e-3):
        spacing = " x ".join(f"{own:.3g}" for own in mask.GetSpacing())
        print(
            f"warning: --atlas-mask {args.atlas_mask} has voxels of {spacing} mm, but patches are cut from scans at "
            "1 mm, so patches that touch in the atlas do not touch in the scans. Resample the mask with "
            "preprocess/make_atlas_mask.py",
            file=sys.stderr,
        )
    table = make_location_table(mask, args.atlas_patch_loc, args.patch_size, args.step_size)

    layout = StoreLayout(args.root_dir)
    target = layout.atlas_patch_loc
    if target.exists() or layout.list_published_location_tables():
        target = layout.find_atlas_patch_loc()
        there = load_locations(target)
        if not np.array_equal(there, table):
            raise StoreError(
                f"{target} holds another table of {len(there)} locations (the new table has {len(table)}), and the "
                "files in the store depend on the existing table. Choose another --root-dir, or pass the matching "
                "table with --atlas-patch-loc"
            )
        print(f"patchify_atlas: {target} exists already, {len(table)} locations")
        return 0
    save_array(target, table)
    inside = _convert_mask_to_lung_array(mask)[tuple((table + args.patch_size // 2).T)].mean()
    print(f"patchify_atlas: {len(table)} locations, {inside:.2f} of the patch centres in the atlas lungs; {target}")
    return 0


def add_location_flags(parser: Parser) -> None:
    """Add the flags that only this stage has."""
    text = "distance between patch corners in voxels; a smaller step gives more patches"
    parser.add_argument("--step-size", type=at_least(int, 1), default=STEP_SIZE, help=text)
    text = "existing table of patch corners to use; required for the published weights (default: make a new table)"
    parser.add_argument("--atlas-patch-loc", help=text)


def main() -> int:
    return write_locations(
        parse_flags(__doc__, add_atlas_flag, add_store_flag, add_patch_size_flag, add_location_flags)
    )


if __name__ == "__main__":
    run(main)
