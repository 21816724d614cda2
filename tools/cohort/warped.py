"""Make a cohort from one real scan: deformed copies with simulated disease."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from misc.command import UserError
from preprocess.geometry import orient, write_image
from preprocess.lungs import lung_mask
from preprocess.scan import ScanError, read_mask, read_scan
from tools.cohort.disease import draw_disease, plant_disease
from tools.cohort.phantom import rotation_matrix
from tools.cohort.scanner import (
    ATLAS_ORIENTATION,
    ONE_SCANNER,
    ORIENTATIONS,
    draw_acquisition,
    round_hu,
    simulate_scanner,
    to_image,
)
from tools.cohort.subject import write_subject

NORMAL_HU = -893.0  # median HU of the texture of normal lung


def draw_diffeomorphism(shape: tuple[int, ...], voxel_spacing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a smooth, invertible displacement in mm, (3, z, y, x): the exponential of a random velocity field.

    The displacement is computed by scaling and squaring (Arsigny et al., 2006) on a coarse grid of about 8 mm.
    """
    step = np.maximum(1, np.round(8 / voxel_spacing)).astype(int)
    coarse = [int(np.ceil(n / k)) + 1 for n, k in zip(shape, step)]
    spacing = voxel_spacing * step
    velocity = np.stack([ndimage.gaussian_filter(rng.normal(size=coarse), 40 / spacing) for _ in range(3)])
    velocity *= rng.uniform(4, 8) / np.sqrt((velocity**2).sum(0)).max()
    flow = velocity / 2**5
    base = np.meshgrid(*[np.arange(n) for n in coarse], indexing="ij")
    for _ in range(5):
        moved = [b + f / s for b, f, s in zip(base, flow, spacing)]
        flow = flow + np.stack([ndimage.map_coordinates(f, moved, order=1, mode="nearest") for f in flow])
    fine = np.meshgrid(*[np.arange(n, dtype=np.float32) / k for n, k in zip(shape, step)], indexing="ij", sparse=True)
    fine = np.broadcast_arrays(*fine)
    return np.stack([ndimage.map_coordinates(f.astype(np.float32), fine, order=1, mode="nearest") for f in flow])


def load_template(scan: str, mask: str | None) -> tuple[sitk.Image, sitk.Image]:
    """Return the scan and its lung mask (1 right, 2 left), both in LPS. By default, thresholding makes the mask.

    Raises:
        UserError: the scan or mask cannot be used; the message names the flag.
    """
    try:
        image = read_scan(scan)
    except ScanError as error:
        raise UserError(f"--template: {error}") from error
    try:
        labels = read_mask(mask) if mask else lung_mask(image, "threshold", name=scan)
    except ScanError as error:
        where = "--template-mask: " if mask else "cannot segment the lungs of --template: "
        raise UserError(f"{where}{error}{'' if mask else '; give --template-mask'}") from error
    labels = sitk.Resample(labels, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return orient(image, "LPS"), orient(labels, "LPS")


def make_warped_subject(
    seed: int, index: int, template: Path, one_scanner: bool, class_maps: bool, out_dir: Path
) -> tuple[dict, dict]:
    """Deform the template, add disease and write subject ``index``. Return rows of labels.csv and scans.csv."""
    rng = np.random.default_rng([seed, index])
    image = sitk.ReadImage(str(template / "scan.nii.gz"))
    hu = sitk.GetArrayFromImage(image).astype(np.float32)
    lung = sitk.GetArrayFromImage(sitk.ReadImage(str(template / "mask.nii.gz")))
    spacing = np.array(image.GetSpacing())
    sampling = spacing[::-1]

    displacement = draw_diffeomorphism(hu.shape, sampling, rng)
    stretch = rng.uniform(0.94, 1.07, 3)
    turn = rotation_matrix(tuple(np.deg2rad(rng.uniform(-3, 3, 3)))) @ np.diag(stretch)
    centre = np.array(hu.shape) * sampling / 2
    grid = np.meshgrid(
        *[np.arange(n, dtype=np.float32) * d for n, d in zip(hu.shape, sampling)], indexing="ij", sparse=True
    )
    shifted = [g - c for g, c in zip(grid, centre)]
    where = [
        (turn[i, 0] * shifted[0] + turn[i, 1] * shifted[1] + turn[i, 2] * shifted[2] + centre[i] + displacement[i])
        / sampling[i]
        for i in range(3)
    ]
    warped = ndimage.map_coordinates(hu, where, order=1, mode="constant", cval=-1024.0)
    labels = ndimage.map_coordinates(lung, where, order=0, mode="constant", cval=0)
    # Shift the HU of the textures so that normal lung has the same median HU in the textures and in this scan.
    parenchyma = warped[(labels > 0) & (warped < -800)]
    base = float(np.clip(np.median(parenchyma) - NORMAL_HU, -60, 60)) if parenchyma.size else 0.0
    planted, classes = plant_disease(warped, labels, spacing, draw_disease(rng), rng, keep_normal=True, base=base)
    drawn = draw_acquisition(rng)  # drawn even with --scanners one, so that --scanners does not change the subjects
    # A real scan already has the blur of a reconstruction kernel.
    acquisition = (ONE_SCANNER if one_scanner else drawn)._replace(kernel_mm=0.0, sharpness=0.0)
    simulate_scanner(warped, spacing, acquisition, rng)
    position = np.array(image.GetOrigin()) + rng.uniform(-50, 50, 3)
    stored = (position, spacing, ORIENTATIONS[index % len(ORIENTATIONS)])
    images = [to_image(round_hu(warped), *stored), to_image(classes, *stored) if class_maps else None]
    return write_subject(seed, index, images, planted, acquisition._asdict(), out_dir)


def make_template_atlas(image: sitk.Image, labels: sitk.Image, out_dir: Path) -> None:
    """Resample the template and its lung mask to 1 mm, and write them as the atlas."""
    size = [round(n * s) for n, s in zip(image.GetSize(), image.GetSpacing())]
    for source, interpolator, fill, name in (
        (image, sitk.sitkLinear, -1024, "atlas.nii.gz"),
        (sitk.Cast(labels, sitk.sitkInt16) * 50, sitk.sitkNearestNeighbor, 0, "atlas_lung_mask.nii.gz"),
    ):
        resampled = sitk.Resample(
            source, size, sitk.Transform(), interpolator, image.GetOrigin(), [1.0] * 3, image.GetDirection(), fill
        )
        write_image(sitk.DICOMOrient(resampled, ATLAS_ORIENTATION), out_dir / name)
