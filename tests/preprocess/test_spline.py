"""Test that B-spline resampling by matrix products equals ITK's to within 1 HU."""

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess.geometry import orient, resample_isotropic
from preprocess.scan import AIR
from preprocess.spline import compute_spline_matrix_and_inside_mask, resample_spline


def by_itk(image, size, step=1.0):
    resample = sitk.ResampleImageFilter()
    resample.SetInterpolator(sitk.sitkBSpline)
    resample.SetDefaultPixelValue(AIR)
    resample.SetOutputSpacing([step] * 3)
    resample.SetOutputOrigin(image.GetOrigin())
    resample.SetOutputDirection(image.GetDirection())
    resample.SetSize([int(length) for length in size])
    return sitk.GetArrayFromImage(resample.Execute(image))


def volume(spacing, kind=np.int16, seed=0):
    values = np.random.default_rng(seed).uniform(-1024, 1500, (23, 31, 27))
    image = sitk.GetImageFromArray((np.rint(values) if kind == np.int16 else values).astype(kind))
    image.SetSpacing(spacing)
    image.SetOrigin((-90.5, 12.25, 300.0))
    return image


SPACINGS = [(0.7, 0.7, 1.25), (1.0, 1.0, 1.0), (0.98, 0.98, 3.0), (1.5, 1.5, 1.5), (2.0, 0.5, 0.625)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("more", [0, 9])
def test_equals_itk(spacing, more):
    """The result equals ITK's, even for white noise and outside the volume."""
    image = sitk.DICOMOrient(volume(spacing), "LAS")
    size = [int(n * s) + more for n, s in zip(image.GetSize(), image.GetSpacing())]
    found = sitk.GetArrayFromImage(resample_spline(image, tuple(size), 1.0, AIR)).astype(int)
    wanted = by_itk(image, size).astype(int)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1
    # At points that coincide with voxels, ITK truncates 499.9999 to 499. The tested code gives 500.
    assert (found == wanted).mean() > (0.99 if all(s in (0.7, 1.25, 0.98, 3.0) for s in spacing) else 0.7)
    assert (found[-1] == AIR).all() == (wanted[-1] == AIR).all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_fractions_stay_fractions(spacing):
    image = volume(spacing, np.float32)
    size = [int(n * s) for n, s in zip(image.GetSize(), image.GetSpacing())]
    found = sitk.GetArrayFromImage(resample_spline(image, tuple(size), 1.0, AIR))
    np.testing.assert_allclose(found, by_itk(image, size), atol=0.02)


def test_geometry_is_kept():
    """Origin, direction and size equal those of the published code. Voxels that are already 1 mm keep their values."""
    image = sitk.DICOMOrient(volume((1.0, 1.0, 1.0)), "RAS")
    found = resample_isotropic(image)
    assert found.GetSize() == (27, 31, 22) and found.GetSpacing() == (1.0, 1.0, 1.0)
    assert found.GetOrigin() == image.GetOrigin() and found.GetDirection() == image.GetDirection()
    assert np.array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(image)[:22])


def test_a_cubic_is_reproduced():
    """A cubic spline reproduces a cubic polynomial everywhere except near the ends."""
    weights, inside = compute_spline_matrix_and_inside_mask(40, 1.3, 52, 1.0)
    places = np.arange(52.0)
    cubic = lambda x: 0.01 * x**3 - 0.3 * x**2 + x  # noqa: E731
    middle = (places > 12) & (places < 40)
    np.testing.assert_allclose((weights @ cubic(np.arange(40) * 1.3))[middle], cubic(places)[middle], atol=2e-2)
    assert (
        inside.all() and compute_spline_matrix_and_inside_mask(4, 1.0, 6, 1.0)[1].tolist() == [True] * 4 + [False] * 2
    )


@pytest.mark.reference
def test_the_real_scan(reference):
    image = orient(sitk.ReadImage(str(reference.parent / "real" / "thorax_ct.nii.gz"), sitk.sitkInt16), "LAS")
    found = sitk.GetArrayFromImage(resample_isotropic(image)).astype(int)
    wanted = by_itk(image, resample_isotropic(image).GetSize()).astype(int)
    assert np.abs(found - wanted).max() <= 1 and (found == wanted).mean() > 0.97
