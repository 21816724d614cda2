"""Step 2: a lung mask for every scan.

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches

uses lungmask (Hofmanninger et al., 2020), which downloads its R231 weights on first use. On a
machine without that download, copy the weights there once and name them:

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches \\
        --lungmask-weights unet_r231-d5d2fc3d.pth --num-workers 4

or use the classical method, which needs no weights (see preprocess/threshold.py for its limits):

    python preprocess/segment_lung.py --input-csv dataset.csv --root-dir /data/patches --method threshold

Writes <root-dir>/lung_mask/{sid}.nii.gz, uint8 on the scan's own grid: 1 right lung, 2 left lung
(the patient's). A mask of your own under that name is checked and kept.
"""

import argparse
import hashlib
import os
import sys
import urllib.error
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout
from preprocess import threshold
from preprocess.scan import ScanError, check_extent, read_mask, read_scan, write_image
from preprocess.subjects import (
    Skip,
    Subject,
    add_common_arguments,
    claim,
    file_stamp,
    read_subjects,
    run_subjects,
    script_main,
)

MIN_LUNG_ML = 1.0  # millilitres a side; less is no lung, whatever made the mask


@lru_cache(maxsize=1)
def load_lungmask(weights: str | None):
    """lungmask's R231 network, once per process.

    Raises:
        StoreError: the weights cannot be downloaded or read; says what else can be done.
    """
    from lungmask import LMInferer

    choices = (
        "copy unet_r231-d5d2fc3d.pth from lungmask's release page to this machine and give --lungmask-weights FILE, "
        "or use --method threshold, which needs no weights"
    )
    try:
        return LMInferer(modelname="R231", modelpath=weights, tqdm_disable=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise StoreError(f"lungmask's weights could not be downloaded ({error}); {choices}") from error
    except Exception as error:  # torch raises many kinds for a wrong or broken file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise StoreError(f"lungmask cannot use {weights or 'its downloaded weights'}: {reason}; {choices}") from error


def lung_figures(mask: sitk.Image, path: Path | str) -> dict[str, Any]:
    """Volumes of both lungs in ml. Raises ScanError where a side is missing or a label unknown."""
    labels = sitk.GetArrayViewFromImage(mask)
    counts = np.bincount(labels.ravel(), minlength=3)
    if counts[3:].any():
        raise ScanError(f"{path} has labels beyond 1 (right lung) and 2 (left lung)")
    millilitres = counts[1:3] * np.prod(mask.GetSpacing()) / 1000
    if millilitres.min() < MIN_LUNG_ML:
        side = ("right", "left")[int(millilitres.argmin())]
        raise ScanError(f"{path}: the {side} lung has {millilitres.min():.1f} ml; no pair of lungs was found")
    return {"right_ml": round(float(millilitres[0]), 1), "left_ml": round(float(millilitres[1]), 1)}


def same_grid(mask: sitk.Image, scan: sitk.Image) -> bool:
    """Whether two images have the same voxels in the same places."""
    return (
        mask.GetSize() == scan.GetSize()
        and np.allclose(mask.GetOrigin(), scan.GetOrigin(), atol=1e-2)
        and np.allclose(mask.GetSpacing(), scan.GetSpacing(), atol=1e-4)
        and np.allclose(mask.GetDirection(), scan.GetDirection(), atol=1e-4)
    )


def segment(
    subject: Subject, previous: dict, *, root_dir: str, method: str, weights: str | None, settings: str, overwrite: bool
) -> dict[str, Any]:
    """Step 2 for one subject; see run_subjects."""
    if not subject.image:
        raise ScanError("the input table has no image for this subject")
    if not os.path.exists(subject.image):
        raise ScanError(f"{subject.image} does not exist")
    layout = StoreLayout(root_dir)
    target = layout.lung_mask(subject.sid)
    stamp = {"method": settings, "image_stamp": file_stamp(subject.image)}
    ours = bool(previous.get("method"))
    current = all(previous.get(name) == value for name, value in stamp.items())
    if target.exists() and not overwrite and (current or not ours):
        # Made here from this image with these settings, or the user's own: look before trusting it.
        try:
            mask = read_mask(target)
            figures = lung_figures(mask, target)
        except ScanError:
            if not ours:
                raise
        else:
            if not ours and not same_grid(mask, read_scan(subject.image)):
                raise ScanError(
                    f"{target}, which was not made here, is not on the grid of {subject.image}; "
                    "remove it or resample it"
                )
            raise Skip({**figures, **(stamp if ours else {})})

    claim(layout, "segment_lung", subject.sid)
    if ours:  # of another image or with other settings: should this fail, the subject must not go on with it
        target.unlink(missing_ok=True)
    scan = read_scan(subject.image)
    check_extent(scan, subject.image)
    if method == "threshold":
        mask = threshold.segment_lungs(scan)
    else:
        mask = sitk.GetImageFromArray(load_lungmask(weights).apply(scan).astype(np.uint8))
        mask.CopyInformation(scan)
    figures = lung_figures(mask, subject.image)
    write_image(mask, target)
    return {**figures, **stamp}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument(
        "--method",
        choices=("lungmask", "threshold"),
        default="lungmask",
        help="lungmask is a network and handles consolidated lungs; threshold needs no weights and suits "
        "air-filled lungs, emphysema included (default: %(default)s)",
    )
    parser.add_argument(
        "--lungmask-weights",
        metavar="FILE",
        help="R231 state dict, for machines that cannot download it (default: download)",
    )
    args = parser.parse_args()

    subjects = read_subjects(args.input_csv)
    settings, weights = args.method, None
    if args.method == "lungmask":
        if args.lungmask_weights:
            weights = os.path.abspath(args.lungmask_weights)
            if not os.path.isfile(weights):
                raise StoreError(f"--lungmask-weights {args.lungmask_weights} does not exist")
            with open(weights, "rb") as stream:
                settings += "-" + hashlib.sha256(stream.read()).hexdigest()[:12]
        if not args.scheduler:
            load_lungmask(weights)  # a download that fails is one error, not one for every subject
    elif args.lungmask_weights:
        raise StoreError("--lungmask-weights goes with --method lungmask")
    return run_subjects(
        "segment_lung",
        segment,
        subjects,
        args,
        dict(
            root_dir=os.path.abspath(args.root_dir),
            method=args.method,
            weights=weights,
            settings=settings,
            overwrite=args.overwrite,
        ),
    )


if __name__ == "__main__":
    script_main(main)
