"""Simulate the effects of a scanner on an image of the thorax, and store the scan."""

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "LPI", "SPL")
ATLAS_ORIENTATION = "LAS"  # orientation of the published atlas


class Acquisition(NamedTuple):
    """Scanner settings of a scan, which affect density measurements."""

    noise_hu: float  # SD of the noise in HU, which depends on the dose
    kernel_mm: float  # SD of the Gaussian blur of the reconstruction kernel
    sharpness: float  # edge enhancement by the reconstruction kernel, 0 for none
    slice_mm: float  # slice thickness


# Settings for --scanners one: full dose and a standard kernel.
ONE_SCANNER = Acquisition(noise_hu=14.0, kernel_mm=0.5, sharpness=0.0, slice_mm=1.25)


def draw_acquisition(rng: np.random.Generator, full_dose: bool = False) -> Acquisition:
    """Draw scanner settings: low dose for half of the scans, soft to sharp kernels, slices of 0.8 to 3 mm."""
    low_dose = rng.random() < 0.5 and not full_dose
    return Acquisition(
        noise_hu=rng.uniform(22, 45) if low_dose else rng.uniform(8, 20),
        kernel_mm=rng.uniform(0.25, 0.75),
        sharpness=rng.choice([0.0, 0.6]),
        slice_mm=rng.uniform(0.8, 3.0),
    )


def simulate_scanner(hu: np.ndarray, spacing: np.ndarray, acquisition: Acquisition, rng: np.random.Generator) -> None:
    """Apply slice thickness, kernel and noise to ``hu`` in place: (z, y, x) float32. ``spacing`` is (x, y, z) in mm."""
    sampling = spacing[::-1]
    slices = acquisition.slice_mm / sampling[0]
    if slices > 1:  # blur by the slice thickness, minus the blur that the voxels already have
        hu[:] = ndimage.gaussian_filter1d(hu, np.sqrt((slices**2 - 1) / 12), axis=0)
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    for volume in (hu, noise):
        blurred = ndimage.gaussian_filter(volume, [0, *(acquisition.kernel_mm / sampling[1:])])
        if acquisition.sharpness:
            blurred += acquisition.sharpness * (blurred - ndimage.gaussian_filter(blurred, [0, *(1.0 / sampling[1:])]))
        volume[:] = blurred
    hu += noise * np.float32(acquisition.noise_hu / noise.std())


def to_image(array: np.ndarray, origin: np.ndarray, spacing: np.ndarray, orientation: str) -> sitk.Image:
    """Convert an array (z, y, x) in patient axes to an image stored in ``orientation``."""
    image = sitk.GetImageFromArray(array)
    image.SetOrigin([float(value) for value in origin])
    image.SetSpacing([float(value) for value in spacing])
    return sitk.DICOMOrient(image, orientation)


def round_hu(hu: np.ndarray) -> np.ndarray:
    """Round and clip HU to int16, as a scanner stores them."""
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
