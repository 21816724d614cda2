"""The lung mask of a scan: lungmask's network, or thresholding; and what a mask must hold."""

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
from misc.files import locked, try_lock
from preprocess import threshold
from preprocess.scan import ScanError, check_extent

MIN_LUNG_ML = 1.0  # millilitres a side; less is no lung, whatever made the mask
SIDES = ("right", "left")
DENSEST = -300  # HU, median of a lung; one that is half consolidated has still air
DENSE = -500  # worth a look
AIR_HU, AIRY = -500, 0.85  # share of the lungs below it that is worth a look
UNEVEN = 4.0  # times as much lung on one side as on the other
CUT = 0.05  # of a lung's largest cross-section, on an edge of the scan
SAMPLES = 500_000  # voxels of a scan that medians are taken of
ENDS = (("right", "left"), ("front", "back"), ("bottom", "top"))  # low and high end of LPS axes


@lru_cache(maxsize=1)
def load_lungmask(weights: str | None):
    """lungmask's R231 network (Hofmanninger et al., 2020), once per process.

    Raises:
        UserError: the weights cannot be downloaded or read; says what else can be done.
    """
    import torch
    from lungmask import LMInferer

    choices = (
        "copy unet_r231-d5d2fc3d.pth from lungmask's release page to this machine and give --lungmask-weights FILE, "
        "or use --method threshold, which needs no weights"
    )
    try:
        # With GPUs it waits on the CPU until one is free: every worker's would lie on the first.
        return LMInferer("R231", weights, force_cpu=torch.cuda.is_available(), tqdm_disable=True)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"lungmask's weights could not be downloaded ({error}); {choices}") from error
    except Exception as error:  # torch raises many kinds for a wrong or broken file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"lungmask cannot use {weights or 'its downloaded weights'}: {reason}; {choices}") from error


@contextlib.contextmanager
def one_gpu() -> Iterator[str | None]:
    """A GPU for this process alone, until the block ends; None where there is none.

    Workers that segment at one time would share the first one, and its memory. A further worker waits for its turn.
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
        with locked(_gpu_lock(number)):
            yield f"cuda:{number}"


def _gpu_lock(number: int) -> Path:
    """The file that a GPU's user locks: of this machine and user."""
    return Path(tempfile.gettempdir()) / f"drasclr-{os.getuid()}-gpu-{number}.lock"


def network_mask(scan: sitk.Image, weights: str | None) -> sitk.Image:
    """What lungmask's network says of a scan in HU, uint8 on its grid, on a GPU where one is. Raises UserError."""
    inferer = load_lungmask(weights)
    with one_gpu() as gpu:
        if gpu is not None:
            inferer.device = gpu
            inferer.model.to(gpu)
        mask = sitk.GetImageFromArray(inferer.apply(scan).astype(np.uint8))
    mask.CopyInformation(scan)
    return mask


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
    mask = threshold.segment_lungs(scan) if method == "threshold" else network_mask(scan, weights)
    lung_volumes(mask, name)
    return mask


def lung_volumes(mask: sitk.Image, name: Path | str) -> dict[str, float]:
    """Volumes of both lungs in ml. Raises ScanError where a side is missing or a label unknown."""
    labels = sitk.GetArrayViewFromImage(mask)
    if labels.max() > 2:
        raise ScanError(f"{name} has labels beyond 1 (right lung) and 2 (left lung)")
    counts = np.array([np.count_nonzero(labels == label) for label in (1, 2)])  # bincount takes 8 bytes a voxel
    millilitres = counts * np.prod(mask.GetSpacing()) / 1000
    if millilitres.min() < MIN_LUNG_ML:
        side = SIDES[int(millilitres.argmin())]
        raise ScanError(f"{name}: the {side} lung has {millilitres.min():.1f} ml; no pair of lungs was found")
    return {"right_ml": round(float(millilitres[0]), 1), "left_ml": round(float(millilitres[1]), 1)}


def check_lungs(mask: sitk.Image, scan: sitk.Image, name: Path | str) -> list[str]:
    """Whether a mask's labels are the lungs of a scan, whoever made it: what is worth a look, a sentence each.

    Args:
        mask: 1 right, 2 left, on the scan's grid.
        scan: in HU.
        name: the mask's, for errors.

    Raises:
        ScanError: right and left are exchanged, or a side holds no air.
    """
    labels, values = sitk.GetArrayViewFromImage(mask), sitk.GetArrayViewFromImage(scan)
    direction = np.array(mask.GetDirection()).reshape(3, 3)
    extents = [_places(labels == label) for label in (1, 2)]  # voxels a plane, along x, y, z
    centres = [[np.average(np.arange(len(count)), weights=count) for count in extent] for extent in extents]
    right, left = (direction @ (np.array(centre) * mask.GetSpacing()) for centre in centres)
    if right[0] >= left[0]:
        raise ScanError(
            f"{name} has right and left exchanged: label 1, the patient's right lung, lies to the left of label 2"
        )
    said = []
    sampled, hu = _samples(labels, values)
    for label, side, extent in zip((1, 2), SIDES, extents):
        inside = hu[sampled == label]
        median = float(np.median(inside)) if inside.size else DENSE
        if median > DENSEST:
            raise ScanError(
                f"{name}: what it calls the {side} lung has a median of {median:.0f} HU, which holds no air"
            )
        if median > DENSE:
            said.append(f"the {side} lung has a median of {median:.0f} HU, denser than lungs are")
        for axis, count in enumerate(extent):
            patient = int(np.argmax(np.abs(direction[:, axis])))
            ends = ENDS[patient] if direction[patient, axis] > 0 else ENDS[patient][::-1]
            for edge, end in zip((count[:2].max(), count[-2:].max()), ends):
                share = edge / count.max()
                if share > CUT:
                    said.append(
                        f"the {side} lung is cut by the scan's {end} edge ({share:.0%} of its largest section is there)"
                    )
    air = air_share(mask, scan)
    if air < AIRY and not any("denser" in text for text in said):
        said.append(f"{air:.0%} of the lungs lie below {AIR_HU} HU, lungs have over 90%: is it the mask of this scan?")
    small, large = sorted(sum(extent[0]) for extent in extents)
    if large > UNEVEN * small:
        said.append(f"one lung has {large / small:.0f} times the volume of the other")
    return said


def air_share(mask: sitk.Image, scan: sitk.Image) -> float:
    """Share of the lungs that is below AIR_HU: 0.97 of healthy ones, 0.77 of a mask that is reversed front to back."""
    labels, hu = _samples(sitk.GetArrayViewFromImage(mask), sitk.GetArrayViewFromImage(scan))
    inside = hu[labels > 0]
    return float(np.mean(inside < AIR_HU)) if inside.size else 0.0


def _samples(labels: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some SAMPLES voxels of both."""
    step = max(1, round((labels.size / SAMPLES) ** (1 / 3)))
    return labels[::step, ::step, ::step], values[::step, ::step, ::step]


def _places(lung: np.ndarray) -> list[np.ndarray]:
    """Voxels of a lung (z, y, x) in each plane across x, y and z."""
    by_row = np.count_nonzero(lung, axis=2)  # (z, y)
    return [np.count_nonzero(lung, axis=(0, 1)), by_row.sum(axis=0), by_row.sum(axis=1)]
