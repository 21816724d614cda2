"""What a scanner adds to a thorax, and how its scans are stored."""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

ORIENTATIONS = ("LPS", "RAS", "LAS", "RPI", "LPI", "SPL")
ATLAS_ORIENTATION = "LAS"  # as the published atlas


def add_texture(
    hu: np.ndarray, lung: np.ndarray, spacing: np.ndarray, rng: np.random.Generator, noise: float, blur: float
) -> None:
    """Parenchymal texture, the scanner's blur and its noise, in place. ``blur`` in mm, ``noise`` in HU."""
    sampling = spacing[::-1]
    texture = ndimage.gaussian_filter(rng.normal(size=hu.shape).astype(np.float32), 1.5 / sampling)
    texture *= 22 / texture.std()
    hu[lung > 0] += texture[lung > 0]
    hu[:] = ndimage.gaussian_filter(hu, blur / sampling)
    grain = ndimage.gaussian_filter(rng.normal(size=hu.shape).astype(np.float32), 0.45 / sampling)
    hu += grain * (noise / grain.std())


def to_image(array: np.ndarray, origin: np.ndarray, spacing: np.ndarray, orientation: str) -> sitk.Image:
    """(z, y, x) in patient axes -> an image stored in ``orientation``."""
    image = sitk.GetImageFromArray(array)
    image.SetOrigin([float(value) for value in origin])
    image.SetSpacing([float(value) for value in spacing])
    return sitk.DICOMOrient(image, orientation)


def finish(hu: np.ndarray) -> np.ndarray:
    """HU as a scanner stores them."""
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def subject_name(index: int) -> str:
    """The sid of subject ``index``, 0 the first."""
    return f"{index + 1:04d}"
