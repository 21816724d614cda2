"""Write the files of a subject and make its table rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.geometry import write_image
from tools.cohort.patient import simulate_patient

HELD_OUT = 0.3  # fraction of subjects that are held out


def subject_name(index: int) -> str:
    """Return the sid of subject ``index``; the first index is 0."""
    return f"{index + 1:04d}"


def write_subject(
    seed: int,
    index: int,
    images: Sequence[sitk.Image | None],
    disease_strengths: dict[str, float],
    scanner_settings: dict[str, float],
    out_dir: Path,
) -> tuple[dict, dict]:
    """Write image/{sid}.nii.gz and class/{sid}.nii.gz. Return the rows of labels.csv and scans.csv.

    Args:
        seed: random seed of the cohort.
        index: index of the subject.
        images: the scan and the class map. A class map that is None is not written.
        disease_strengths: strengths of the simulated disease.
        scanner_settings: scanner settings of the scan.
    """
    sid, rng = subject_name(index), np.random.default_rng([seed, index, 1])
    for folder, image in zip(("image", "class"), images):
        if image is not None:
            write_image(image, out_dir / folder / f"{sid}.nii.gz")
    held_out = int(rng.random() < HELD_OUT)
    labels = {"sid": sid, "held_out": held_out, **disease_strengths, **simulate_patient(rng, disease_strengths)}
    return labels, {"sid": sid, **{name: round(float(value), 3) for name, value in scanner_settings.items()}}
