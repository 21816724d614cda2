"""The atlas: its lung mask, and transforms from it."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.scan import EarlierFailure, ScanError, read_mask

SMALLEST = 1e-3  # of the atlas's volume; a child's lungs are a twentieth of an adult's


def read_atlas_mask(path: str | os.PathLike) -> sitk.Image:
    """The atlas's lung mask: 0 outside, 50 right lung, 100 left lung.

    Raises:
        ScanError: it has other labels or lacks one of the two.
    """
    try:
        mask = read_mask(path)
    except ScanError as error:
        raise ScanError(f"--atlas-mask: {error}") from error
    labels = np.unique(sitk.GetArrayViewFromImage(mask)).tolist()
    if labels != [0, 50, 100]:
        raise ScanError(
            f"--atlas-mask {path} has labels {labels[:8]}; it must have 0 (outside), 50 (right lung), 100 (left); "
            "preprocess/make_atlas_mask.py makes one of a scan's lung mask"
        )
    return mask


def load_atlas(path: str | os.PathLike) -> sitk.Image:
    """The atlas's lung mask, once per process. Raises ScanError."""
    return _load_atlas(os.path.abspath(path))


@lru_cache(maxsize=1)
def _load_atlas(path: str) -> sitk.Image:
    return read_atlas_mask(path)


def atlas_fingerprint(mask: sitk.Image) -> str:
    """Tells one atlas from another, whatever the file is called."""
    digest = hashlib.sha256(np.ascontiguousarray(sitk.GetArrayViewFromImage(mask)).tobytes())
    digest.update(repr((mask.GetOrigin(), mask.GetSpacing(), mask.GetDirection())).encode())
    return digest.hexdigest()[:12]


def read_affine(path: Path) -> sitk.Transform:
    """An ITK affine from atlas points to scan points. Raises ScanError, EarlierFailure where it is missing."""
    if not path.is_file():
        raise EarlierFailure(f"no transform at {path}; run preprocess/register.py, and see its report for this subject")
    try:
        transform = sitk.ReadTransform(str(path))
    except (RuntimeError, UnicodeDecodeError) as error:  # of its message, where that quotes the file
        raise ScanError(f"{path} cannot be read as an ITK transform; remove it and register again") from error
    if transform.GetDimension() != 3 or not transform.IsLinear():
        raise ScanError(f"{path} is not a 3-D affine transform")
    axes = [transform.TransformVector(axis, [0.0, 0.0, 0.0]) for axis in np.eye(3).tolist()]
    volume = abs(float(np.linalg.det(axes)))
    if not SMALLEST < volume < 1 / SMALLEST:
        raise ScanError(
            f"{path} makes the atlas's lungs {volume:.3g} times as large, which none are; remove it and register again"
        )
    return transform
