"""The lung mask of a scan: lungmask's network, or thresholding; and what a mask must hold."""

import urllib.error
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from misc.command import UserError
from preprocess import threshold
from preprocess.scan import ScanError, check_extent

MIN_LUNG_ML = 1.0  # millilitres a side; less is no lung, whatever made the mask


@lru_cache(maxsize=1)
def load_lungmask(weights: str | None):
    """lungmask's R231 network (Hofmanninger et al., 2020), once per process.

    Raises:
        UserError: the weights cannot be downloaded or read; says what else can be done.
    """
    from lungmask import LMInferer

    choices = (
        "copy unet_r231-d5d2fc3d.pth from lungmask's release page to this machine and give --lungmask-weights FILE, "
        "or use --method threshold, which needs no weights"
    )
    try:
        return LMInferer(modelname="R231", modelpath=weights, tqdm_disable=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"lungmask's weights could not be downloaded ({error}); {choices}") from error
    except Exception as error:  # torch raises many kinds for a wrong or broken file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"lungmask cannot use {weights or 'its downloaded weights'}: {reason}; {choices}") from error


def lung_mask(scan: sitk.Image, method: str, weights: str | None = None, name: Path | str = "the scan") -> sitk.Image:
    """Mask of both lungs on the scan's own grid: uint8, 1 right, 2 left (the patient's).

    Args:
        scan: chest CT in HU.
        method: ``lungmask`` or ``threshold``.
        weights: lungmask's state dict; None downloads it.
        name: the scan's, for errors.

    Raises:
        ScanError: the scan is no whole chest, or has no pair of lungs.
    """
    check_extent(scan, name)
    if method == "threshold":
        mask = threshold.segment_lungs(scan)
    else:
        mask = sitk.GetImageFromArray(load_lungmask(weights).apply(scan).astype(np.uint8))
        mask.CopyInformation(scan)
    lung_volumes(mask, name)
    return mask


def lung_volumes(mask: sitk.Image, name: Path | str) -> dict[str, float]:
    """Volumes of both lungs in ml. Raises ScanError where a side is missing or a label unknown."""
    labels = sitk.GetArrayViewFromImage(mask)
    counts = np.bincount(labels.ravel(), minlength=3)
    if counts[3:].any():
        raise ScanError(f"{name} has labels beyond 1 (right lung) and 2 (left lung)")
    millilitres = counts[1:3] * np.prod(mask.GetSpacing()) / 1000
    if millilitres.min() < MIN_LUNG_ML:
        side = ("right", "left")[int(millilitres.argmin())]
        raise ScanError(f"{name}: the {side} lung has {millilitres.min():.1f} ml; no pair of lungs was found")
    return {"right_ml": round(float(millilitres[0]), 1), "left_ml": round(float(millilitres[1]), 1)}
