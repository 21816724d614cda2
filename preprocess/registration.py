"""Compute the affine transform between two lung masks with ANTs (Avants et al., 2011)."""

import os
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.atlas import read_affine
from preprocess.geometry import average_blocks
from preprocess.refine import refine_affine
from preprocess.scan import ScanError

REGISTRATION_SPACING = 8.0  # mm; voxel spacing of the masks that ANTs compares
REFINED_SPACING = 3.0  # mm; grid spacing of the refinement, which maximises the overlap of the lungs
SMALL_ATLAS = 200.0  # mm; a smaller atlas (a phantom) is registered on proportionally finer grids
ATLAS_LABELS, SCAN_LABELS = (50, 100), (1, 2)  # labels of the right lung and the left lung


def make_coarse_lung_image(mask: sitk.Image, spacing: float):
    """Average the union of both lungs (value 1) onto a coarse grid with a margin of zeros, as an ANTs image."""
    import ants

    image = average_blocks(mask, [max(1, round(spacing / own)) for own in mask.GetSpacing()], lambda slab: slab > 0)
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


def measure_overlap(atlas: sitk.Image, mask: sitk.Image, transform: sitk.Transform) -> dict[str, float]:
    """Compute the Dice coefficient of both lungs together, the right lung and the left lung on the atlas grid."""
    warped = sitk.GetArrayFromImage(sitk.Resample(mask, atlas, transform, sitk.sitkNearestNeighbor, 0))
    fixed = sitk.GetArrayViewFromImage(atlas)

    def compute_dice(first: np.ndarray, second: np.ndarray) -> float:
        both = np.count_nonzero(first) + np.count_nonzero(second)
        return round(2 * np.count_nonzero(first & second) / both, 4) if both else 0.0

    return {
        "dice": compute_dice(warped > 0, fixed > 0),
        "dice_right": compute_dice(warped == SCAN_LABELS[0], fixed == ATLAS_LABELS[0]),
        "dice_left": compute_dice(warped == SCAN_LABELS[1], fixed == ATLAS_LABELS[1]),
    }


def check_overlap(dice_scores: dict[str, float], min_dice: float, source: Path | str) -> None:
    """Raise ScanError if the Dice of both lungs together, or of one lung, is less than ``min_dice``.

    The Dice coefficient of both lungs together does not reveal swapped lungs, or one lung stretched over both lungs.
    """
    low = [name for name in ("dice", "dice_right", "dice_left") if dice_scores[name] < min_dice]
    if not low:
        return
    sides = f"right {dice_scores['dice_right']:.2f}, left {dice_scores['dice_left']:.2f}"
    if dice_scores["dice"] >= min_dice and len(low) == 2:
        raise ScanError(
            f"the lungs overlap the atlas with a Dice of {dice_scores['dice']:.2f}, but each lung alone overlaps "
            f"less ({sides}): labels 1 (right) and 2 (left) are swapped in {source}, or the scan is mirrored"
        )
    raise ScanError(
        f"the registered lungs overlap the atlas with a Dice of {dice_scores['dice']:.2f} ({sides}); each of the "
        f"three values must be at least --min-dice {min_dice}; check {source}"
    )


def register_masks(atlas: sitk.Image, mask: sitk.Image) -> sitk.Transform:
    """Compute the affine from atlas points to scan points.

    First, ANTs aligns both lungs as one shape. Then refine.py maximises the overlap of each lung. The same masks always
    give a bit-identical transform.

    Args:
        atlas: lung mask of the atlas (50 right, 100 left).
        mask: lung mask of the scan (1 right, 2 left).

    Raises:
        ScanError: ANTs wrote no transform.
    """
    extent = max(n * own for n, own in zip(atlas.GetSize(), atlas.GetSpacing()))
    scale = min(1.0, extent / SMALL_ATLAS)
    fixed, moving = (make_coarse_lung_image(one, REGISTRATION_SPACING * scale) for one in (atlas, mask))

    # ANTs compares randomly drawn voxels and reads the random seed from this environment variable.
    # The argument random_seed has no effect in antspyx 0.6.
    os.environ["ANTS_RANDOM_SEED"] = "1"
    import ants

    with tempfile.TemporaryDirectory() as folder:
        ants.registration(
            fixed,
            moving,
            type_of_transform="Affine",
            outprefix=os.path.join(folder, "x_"),
            aff_metric="meansquares",
            aff_iterations=(40, 0),
            aff_shrink_factors=(2, 1),
            aff_smoothing_sigmas=(1, 0),
            aff_random_sampling_rate=0.5,
            singleprecision=False,
        )
        written = Path(folder) / "x_0GenericAffine.mat"
        if not written.is_file():
            raise ScanError("ANTs wrote no transform; check whether the disk of the temporary folder is full")
        found = refine_affine(atlas, ATLAS_LABELS, mask, SCAN_LABELS, read_affine(written), REFINED_SPACING * scale)
    return found
