"""Compare lung masks made by thresholding with the true lungs of the phantoms."""

import functools

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from preprocess import threshold
from preprocess.scan import ScanError, read_scan
from preprocess.threshold import segment_lungs
from tools.cohort.anatomy import draw_anatomy
from tools.cohort.disease import draw_disease, plant_disease
from tools.cohort.phantom import LUNG_HU, Phantom
from tools.cohort.scanner import Acquisition, round_hu, simulate_scanner, to_image


@functools.lru_cache(maxsize=4)
def make_phantom(index):
    """Return HU, lungs, origin and spacing of a phantom. Tests must not change these arrays."""
    rng = np.random.default_rng([7, index])
    anatomy = draw_anatomy(rng, "tiny")
    spacing = np.array([1.2, 1.2, 1.4])
    made = Phantom(anatomy, tuple(spacing), rng)
    plant_disease(made.hu, made.lung, spacing, draw_disease(rng), rng, base=made.hu - LUNG_HU)
    simulate_scanner(made.hu, spacing, Acquisition(noise_hu=15, kernel_mm=0.5, sharpness=0.0, slice_mm=1.0), rng)
    return round_hu(made.hu), made.lung, made.origin, spacing


def phantom(index, orientation="LPS"):
    """Return the scan of a phantom and its true lung mask."""
    hu, lung, origin, spacing = make_phantom(index)
    return to_image(hu, origin, spacing, orientation), to_image(lung, origin, spacing, orientation)


def dice(mask, truth, label):
    a, b = sitk.GetArrayFromImage(mask) == label, sitk.GetArrayFromImage(truth) == label
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize(("index", "orientation"), [(0, "LPS"), (1, "RAI"), (2, "SPL"), (3, "LAS")])
def test_phantoms(index, orientation):
    image, truth = phantom(index, orientation)
    mask = segment_lungs(image)
    assert mask.GetSize() == image.GetSize() and mask.GetDirection() == image.GetDirection()
    assert mask.GetPixelID() == sitk.sitkUInt8
    for label in (1, 2):
        assert dice(mask, truth, label) > 0.97


@pytest.mark.parametrize("index", [1, 3])
def test_touching_lungs_are_split_by_the_patients_side(index):
    image, truth = phantom(index)
    hu, labels = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(truth)
    gap = ndimage.binary_dilation(labels == 1, iterations=9) & ndimage.binary_dilation(labels == 2, iterations=9)
    middle = np.zeros_like(gap)
    level = np.flatnonzero((labels == 1).any((1, 2)) & (labels == 2).any((1, 2)))
    z = level[int(len(level) * 0.75)]
    middle[z : z + 5, : labels.shape[1] // 2 - 4] = True  # a bridge between the lungs, in front of the trachea
    bridge = gap & middle & (np.abs(hu) < 150)
    assert bridge.sum() > 50
    hu[bridge] = -850
    joined, _ = ndimage.label(hu < -400)
    assert set(np.unique(joined[labels == 2])) & set(np.unique(joined[labels == 1]))  # the lungs really touch
    touching = sitk.GetImageFromArray(hu)
    touching.CopyInformation(image)
    mask = segment_lungs(touching)
    for label in (1, 2):
        assert dice(mask, truth, label) > 0.98


def test_a_trachea_cut_at_the_top_does_not_leak():
    """The working grid must not extend beyond the scan, because outside air would then be joined to the lungs."""
    image, truth = phantom(1)
    for spacing in (1.41, 1.63, 1.75):
        size = [int(n * s / spacing) for n, s in zip(image.GetSize(), image.GetSpacing())]
        coarse = sitk.Resample(
            image,
            size,
            sitk.Transform(),
            sitk.sitkLinear,
            image.GetOrigin(),
            [spacing] * 3,
            image.GetDirection(),
            -1024,
        )
        mask = segment_lungs(coarse)
        back = sitk.Resample(mask, truth, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        assert min(dice(back, truth, 1), dice(back, truth, 2)) > 0.93


def test_padding_slices_above_the_trachea():
    """Rotated or tilt-corrected scans end in padding slices, through which the trachea connects to the outside."""
    image, truth = phantom(2)
    padded, truth = (sitk.ConstantPad(one, [0, 0, 3], [0, 0, 4], fill) for one, fill in ((image, -1024), (truth, 0)))
    mask = segment_lungs(padded)
    assert min(dice(mask, truth, 1), dice(mask, truth, 2)) > 0.97


def test_no_lungs():
    hu = np.full((40, 50, 60), -1000, dtype=np.int16)
    hu[:, 10:40, 10:50] = 40
    with pytest.raises(ScanError, match="no lungs found"):
        segment_lungs(sitk.GetImageFromArray(hu))
    hu[10:30, 15:35, 15:45] = -860
    with pytest.raises(ScanError, match="not two lungs side by side"):
        segment_lungs(sitk.GetImageFromArray(hu))


@pytest.mark.reference
def test_real_scan(reference):
    """The lungs have an adult's volume, the right lung is larger, and the trachea is not in the mask."""
    scan = read_scan(reference.parent / "real" / "thorax_ct.nii.gz")
    mask = segment_lungs(scan)
    labels = sitk.GetArrayFromImage(mask)
    litres = [(labels == label).sum() * 1.5**3 / 1e6 for label in (1, 2)]
    assert 2.2 < litres[0] < 2.6 and 1.6 < litres[1] < 1.9
    hu = sitk.GetArrayFromImage(scan)
    x = np.nonzero(labels == 1)[2].mean()
    assert x < np.nonzero(labels == 2)[2].mean()  # in LPS, the patient's right side has the lower x
    # The mask includes the vessels, so most voxels are dark and some are bright.
    assert -880 < np.median(hu[labels > 0]) < -780 and (hu[labels > 0] > -100).mean() > 0.01
    assert hu[160:164, 71:74, 117:121].mean() < -900 and not labels[160:164, 71:74, 117:121].any()  # trachea


def test_distances_equal_scipys():
    """Compute all distance maps first, because an array that uses the memory of a deleted ITK image could change."""
    rng = np.random.default_rng(0)
    masks = [rng.random((60, 90, 100)) < share for share in (0.001, 0.01, 0.1)]
    found = [threshold._compute_squared_distance_to_mask(mask) for mask in masks]
    for mask, squared in zip(masks, found):
        np.testing.assert_allclose(squared, np.square(ndimage.distance_transform_edt(~mask)), atol=1e-2)
