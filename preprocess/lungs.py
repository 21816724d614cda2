"""Make the lung mask of a scan with lungmask's network or by thresholding, and check lung masks."""

import contextlib
import os
import tempfile
import urllib.error
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from misc.command import UserError
from misc.files import try_lock, wait_for_lock
from preprocess import threshold
from preprocess.scan import ScanError, check_extent

MIN_LUNG_ML = 1.0  # smallest volume per lung in ml; a smaller labelled region is not a lung
SIDES = ("right", "left")
DENSEST = -300  # HU; highest accepted median of a lung; even a half-consolidated lung has a lower median
DENSE = -500  # HU; a lung with a higher median gets a warning
AIR_HU, AIRY = -500, 0.85  # HU below which a voxel is air; fraction of air below which a lung mask gets a warning
UNEVEN = 4.0  # ratio of the two lung volumes above which there is a warning
CUT = 0.05  # fraction of a lung's largest cross-section that may lie on an edge of the scan without a warning
SAMPLES = 500_000  # approximate number of voxels used for medians and fractions
ENDS = (("right", "left"), ("front", "back"), ("bottom", "top"))  # names of the low and high end of each LPS axis


@lru_cache(maxsize=1)
def load_lungmask_network(weights: str | None):
    """Load lungmask's R231 network (Hofmanninger et al., 2020) once per process.

    Raises:
        UserError: the weights cannot be downloaded or read; the message lists the alternatives.
    """
    import torch
    from lungmask import LMInferer

    choices = (
        "copy unet_r231-d5d2fc3d.pth from lungmask's release page to this machine and give --lungmask-weights FILE, "
        "or use --method threshold, which needs no weights"
    )
    try:
        # With GPUs, keep the network on the CPU until a GPU is free. Otherwise all workers would use the first GPU.
        return LMInferer("R231", weights, force_cpu=torch.cuda.is_available(), tqdm_disable=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"the lungmask weights could not be downloaded ({error}); {choices}") from error
    except Exception as error:  # torch raises many exception types for a wrong or damaged file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"lungmask cannot use {weights or 'its downloaded weights'}: {reason}; {choices}") from error


@contextlib.contextmanager
def reserve_gpu() -> Iterator[str | None]:
    """Reserve one GPU for this process until the ``with`` block ends; yield the GPU's name, or None without a GPU.

    Without a reservation, all workers that segment at the same time would share the first GPU and its memory. If every
    GPU is in use, the worker waits for its turn.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        yield None
        return
    with contextlib.ExitStack() as stack:
        for number in range(count):
            stream = stack.enter_context(open(_gpu_lock(number), "a"))
            if try_lock(stream):
                yield f"cuda:{number}"
                return
        number = os.getpid() % count
        with wait_for_lock(_gpu_lock(number)):
            yield f"cuda:{number}"


def _gpu_lock(number: int) -> Path:
    """Return the lock file of a GPU, one per machine, user and GPU."""
    return Path(tempfile.gettempdir()) / f"drasclr-{os.getuid()}-gpu-{number}.lock"


def segment_with_network(scan: sitk.Image, weights: str | None) -> sitk.Image:
    """Segment a scan in HU with lungmask's network, on a GPU if there is one.

    Returns:
        The lung mask on the scan's grid, uint8: 1 right lung, 2 left lung.

    Raises:
        UserError: the weights cannot be loaded.
    """
    inferer = load_lungmask_network(weights)
    with reserve_gpu() as gpu:
        if gpu is not None:
            inferer.device = gpu
            inferer.model.to(gpu)
        mask = sitk.GetImageFromArray(inferer.apply(scan).astype(np.uint8))
    mask.CopyInformation(scan)
    return mask


def lung_mask(scan: sitk.Image, method: str, weights: str | None = None, name: Path | str = "the scan") -> sitk.Image:
    """Segment both lungs on the scan's own grid, as uint8: 1 the subject's right lung, 2 the left lung.

    Args:
        scan: chest CT in HU.
        method: ``lungmask`` or ``threshold``.
        weights: file with lungmask's state dict; None downloads the file.
        name: name of the scan in error messages.

    Raises:
        ScanError: the scan does not show a whole chest, or no pair of lungs was found.
    """
    check_extent(scan, name)
    mask = threshold.segment_lungs(scan) if method == "threshold" else segment_with_network(scan, weights)
    lung_volumes(mask, name)
    return mask


def lung_volumes(mask: sitk.Image, name: Path | str) -> dict[str, float]:
    """Return the volumes of both lungs in ml. Raises ScanError if a lung is missing or a label is unknown."""
    labels = sitk.GetArrayViewFromImage(mask)
    if labels.max() > 2:
        raise ScanError(f"{name} has labels above 2; use 1 for the right lung and 2 for the left lung")
    counts = np.array([np.count_nonzero(labels == label) for label in (1, 2)])  # np.bincount needs 8 bytes/voxel
    millilitres = counts * np.prod(mask.GetSpacing()) / 1000
    if millilitres.min() < MIN_LUNG_ML:
        side = SIDES[int(millilitres.argmin())]
        raise ScanError(f"{name}: the {side} lung has only {millilitres.min():.1f} ml, so no pair of lungs was found")
    return {"right_ml": round(float(millilitres[0]), 1), "left_ml": round(float(millilitres[1]), 1)}


def check_lungs(mask: sitk.Image, scan: sitk.Image, name: Path | str) -> list[str]:
    """Check that the labels of a mask match the lungs of a scan, no matter how the mask was made.

    Args:
        mask: lung mask on the scan's grid, 1 right lung, 2 left lung.
        scan: chest CT in HU.
        name: name of the mask in error messages.

    Returns:
        Warnings, one sentence each.

    Raises:
        ScanError: the right and left labels are swapped, or a lung contains no air.
    """
    labels, values = sitk.GetArrayViewFromImage(mask), sitk.GetArrayViewFromImage(scan)
    direction = np.array(mask.GetDirection()).reshape(3, 3)
    extents = [_count_voxels_per_plane(labels == label) for label in (1, 2)]  # lung voxels per plane along x, y, z
    centres = [[np.average(np.arange(len(count)), weights=count) for count in extent] for extent in extents]
    right, left = (direction @ (np.array(centre) * mask.GetSpacing()) for centre in centres)
    if right[0] >= left[0]:
        raise ScanError(
            f"{name} has right and left swapped: label 1 must be the right lung, but is on the subject's left side; "
            "correct the mask"
        )
    said = []
    sampled, hu = _subsample_voxels_on_regular_grid(labels, values)
    for label, side, extent in zip((1, 2), SIDES, extents):
        inside = hu[sampled == label]
        median = float(np.median(inside)) if inside.size else DENSE
        if median > DENSEST:
            raise ScanError(
                f"{name}: the {side} lung has a median of {median:.0f} HU, so it contains no air; correct the mask"
            )
        if median > DENSE:
            said.append(f"the {side} lung has a median of {median:.0f} HU, denser than a normal lung")
        for axis, count in enumerate(extent):
            patient = int(np.argmax(np.abs(direction[:, axis])))
            ends = ENDS[patient] if direction[patient, axis] > 0 else ENDS[patient][::-1]
            for edge, end in zip((count[:2].max(), count[-2:].max()), ends):
                share = edge / count.max()
                if share > CUT:
                    said.append(
                        f"the {side} lung is cut by the scan's {end} edge ({share:.0%} of its largest section is there)"
                    )
    air = measure_air_share(mask, scan)
    if air < AIRY and not any("denser" in text for text in said):
        said.append(
            f"only {air:.0%} of the lung voxels are below {AIR_HU} HU (normal: over 90%), so the mask may belong to "
            "another scan"
        )
    small, large = sorted(sum(extent[0]) for extent in extents)
    if large > UNEVEN * small:
        said.append(f"one lung is {large / small:.0f} times as large as the other")
    return said


def measure_air_share(mask: sitk.Image, scan: sitk.Image) -> float:
    """Return the fraction of lung voxels below AIR_HU: 0.97 in healthy lungs, 0.77 for a mask flipped front to back."""
    labels, hu = _subsample_voxels_on_regular_grid(sitk.GetArrayViewFromImage(mask), sitk.GetArrayViewFromImage(scan))
    inside = hu[labels > 0]
    return float(np.mean(inside < AIR_HU)) if inside.size else 0.0


def _subsample_voxels_on_regular_grid(labels: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return about SAMPLES voxels of each array, from the same regular grid."""
    step = max(1, round((labels.size / SAMPLES) ** (1 / 3)))
    return labels[::step, ::step, ::step], values[::step, ::step, ::step]


def _count_voxels_per_plane(lung: np.ndarray) -> list[np.ndarray]:
    """Count the voxels of a lung (z, y, x) in each plane perpendicular to x, y and z."""
    by_row = np.count_nonzero(lung, axis=2)  # (z, y)
    return [np.count_nonzero(lung, axis=(0, 1)), by_row.sum(axis=0), by_row.sum(axis=1)]
