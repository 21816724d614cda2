"""Read the lung mask of the atlas, and transforms from the atlas to scans."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.scan import EarlierFailure, ScanError, read_mask

SMALLEST = 1e-3  # smallest accepted volume scaling of a transform; an infant's lungs have 1/20 of an adult's volume


def read_atlas_mask(path: str | os.PathLike) -> sitk.Image:
    """Read the lung mask of the atlas: 0 outside, 50 right lung, 100 left lung.

    Raises:
        ScanError: the mask lacks a lung, or has labels other than 0, 50 and 100.
    """
    try:
        mask = read_mask(path)
    except ScanError as error:
        raise ScanError(f"--atlas-mask: {error}") from error
    labels = np.unique(sitk.GetArrayViewFromImage(mask)).tolist()
    if labels != [0, 50, 100]:
        raise ScanError(
            f"--atlas-mask {path} has labels {labels[:8]}, but needs 0 (outside), 50 (right lung), 100 (left lung); "
            "preprocess/make_atlas_mask.py makes an atlas mask from the lung mask of a scan"
        )
    return mask


def load_atlas(path: str | os.PathLike) -> sitk.Image:
    """Read the lung mask of the atlas once per process. Raises ScanError."""
    return _load_atlas(os.path.abspath(path))


@lru_cache(maxsize=1)
def _load_atlas(path: str) -> sitk.Image:
    return read_atlas_mask(path)


def atlas_fingerprint(mask: sitk.Image) -> str:
    """Return a hash of an atlas mask's voxels and grid; the file name has no effect."""
    digest = hashlib.sha256(np.ascontiguousarray(sitk.GetArrayViewFromImage(mask)).tobytes())
    digest.update(repr((mask.GetOrigin(), mask.GetSpacing(), mask.GetDirection())).encode())
    return digest.hexdigest()[:12]


def read_affine(path: Path) -> sitk.Transform:
    """Read an ITK affine transform that maps atlas points to scan points.

    Raises ScanError if the transform cannot be used, and EarlierFailure if the file is missing.
    """
    if not path.is_file():
        raise EarlierFailure(
            f"no transform at {path}; run preprocess/register.py and check its report for this subject"
        )
    try:
        transform = sitk.ReadTransform(str(path))
    except (RuntimeError, UnicodeDecodeError) as error:  # ITK's message may quote bytes that are not UTF-8
        raise ScanError(f"{path} cannot be read as an ITK transform; remove it and register the scan again") from error
    if transform.GetDimension() != 3 or not transform.IsLinear():
        raise ScanError(f"{path} is not a 3-D affine transform; remove it and register the scan again")
    axes = [transform.TransformVector(axis, [0.0, 0.0, 0.0]) for axis in np.eye(3).tolist()]
    volume = abs(float(np.linalg.det(axes)))
    if not SMALLEST < volume < 1 / SMALLEST:
        raise ScanError(
            f"{path} scales the volume of the atlas lungs by {volume:.3g}, which is impossible; remove it and register "
            "the scan again"
        )
    return transform
