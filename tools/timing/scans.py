"""Measure core-seconds and memory of preprocessing a scan, and return the rows for the benchmark table."""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from misc.sizes import HU_MAX, HU_MIN, PATCH_SIZE
from preprocess.atlas import load_atlas
from preprocess.geometry import PADDING, find_orientation, orient
from preprocess.lungs import check_lungs, load_lungmask_network, lung_mask, segment_with_network
from preprocess.patches import cut_scan, map_corners
from preprocess.patchify_atlas import STEP_SIZE, make_location_table
from preprocess.picture import render_patch_picture
from preprocess.registration import measure_overlap, register_masks
from preprocess.scan import AIR, limit_threads, load_scan
from tools.timing.measure import Row, make_comparison_row
from tools.timing.runs import read_peak_gb

LUNGMASK_CLASSES = 3  # number of classes of lungmask's R231 model


def measure_cpu_seconds(work: Callable[[], object]) -> float:
    """Return the core-seconds that ``work`` takes, summed over all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cut_literal_patches(
    scan: sitk.Image, transform: sitk.Transform, atlas: sitk.Image, table: np.ndarray
) -> np.ndarray:
    """Return patches (L, 32, 32, 32) cut as in the publication: with ITK's B-splines at every voxel of the new grid."""
    oriented = orient(scan, find_orientation(atlas))
    size, spacing = oriented.GetSize(), oriented.GetSpacing()
    wanted = [int(size[0] * spacing[0]), int(size[1] * spacing[1]), int((size[2] - 1) * spacing[2])]
    where = (oriented.GetOrigin(), [1.0] * 3, oriented.GetDirection(), AIR)
    volume = sitk.Resample(oriented, wanted, sitk.Transform(), sitk.sitkBSpline, *where)
    volume = sitk.ConstantPad(volume, [PADDING] * 3, [PADDING] * 3, AIR)
    values = np.clip(sitk.GetArrayFromImage(volume), HU_MIN, HU_MAX).astype(np.int16)
    cut = []
    for x, y, z in map_corners(table, atlas, transform, volume):
        cut.append(values[z : z + PATCH_SIZE, y : y + PATCH_SIZE, x : x + PATCH_SIZE])
    return np.stack(cut)


def save_random_lungmask_weights(folder: Path) -> str:
    """Save random weights for lungmask's network and return their path. The weights do not affect the run time."""
    from lungmask.resunet import UNet

    torch.manual_seed(0)
    options = dict(padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False)
    path = folder / "random.pth"
    torch.save(UNet(n_classes=LUNGMASK_CLASSES, **options).state_dict(), path)
    return str(path)


def _run_all_stages(image: str, atlas_mask: str, table: np.ndarray, pipe: Connection) -> None:
    """Run the five preprocessing stages once, and send the peak memory of this process in GB to ``pipe``."""
    limit_threads(1)
    scan, atlas = load_scan(image).image, load_atlas(atlas_mask)
    mask = lung_mask(scan, "threshold")
    check_lungs(mask, scan, image)
    transform = register_masks(atlas, mask)
    cut = cut_scan(scan, transform, atlas, table, PATCH_SIZE)
    render_patch_picture(cut.volume, cut.values, mask, cut.corners, PATCH_SIZE, image)
    pipe.send(read_peak_gb(os.getpid()))


def measure_scan_peak_memory(image: str, atlas_mask: str, table: np.ndarray) -> float:
    """Return the peak memory in GB that one preprocessing worker needs for a scan."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_all_stages, args=(image, atlas_mask, table, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def time_scan_preprocessing(args: argparse.Namespace) -> list[Row]:
    """Measure every part of preprocessing on ``args.scan`` with ``args.atlas_mask`` and ``args.atlas_patch_loc``."""
    limit_threads(1)
    import ants  # noqa: F401 - imported here, so that the measured registration time excludes the import

    image, atlas_mask = os.path.abspath(args.scan), os.path.abspath(args.atlas_mask)
    atlas = load_atlas(atlas_mask)
    table = make_location_table(atlas, args.atlas_patch_loc, PATCH_SIZE, STEP_SIZE)
    scan = load_scan(image).image
    mask = lung_mask(scan, "threshold")
    transform = register_masks(atlas, mask)
    cut = cut_scan(scan, transform, atlas, table, PATCH_SIZE)
    size = " x ".join(map(str, scan.GetSize()))
    unit = "core-seconds"
    parts = {
        f"reading and checking a scan of {size}": lambda: load_scan(image),
        "lung mask by threshold, checked": lambda: check_lungs(lung_mask(scan, "threshold"), scan, image),
        "registration, with the Dice of each side": lambda: measure_overlap(atlas, mask, register_masks(atlas, mask)),
        "picture": lambda: render_patch_picture(cut.volume, cut.values, mask, cut.corners, PATCH_SIZE, image),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    ours: list[float] = []
    literal: list[float] = []
    for _ in range(args.rounds):
        for name, work in parts.items():
            times[name].append(measure_cpu_seconds(work))
        ours.append(measure_cpu_seconds(lambda: cut_scan(scan, transform, atlas, table, PATCH_SIZE)))
        literal.append(measure_cpu_seconds(lambda: cut_literal_patches(scan, transform, atlas, table)))
    rows = [make_comparison_row(name, unit, found, None, 1.0) for name, found in times.items()]
    apart = int(np.abs(cut_literal_patches(scan, transform, atlas, table).astype(int) - cut.patches).max())
    what, note = (
        f"cutting {len(table)} patches",
        f"literal: ITK's B-splines, which give the same patches to {apart} HU",
    )
    rows.append(make_comparison_row(what, unit, ours, literal, 1.0, 1.0, note=note))
    together = sum(np.median(found) for found in (*times.values(), ours))
    rows.append(Row("all of these", unit, ours=float(together), goal="10 core-seconds"))
    with tempfile.TemporaryDirectory(prefix="drasclr-lungmask-") as folder:
        weights = save_random_lungmask_weights(Path(folder))
        where = "a GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
        slices = scan.GetSize()[2]
        few = min(slices, load_lungmask_network(weights).batch_size)
        # Time only one batch of slices, because a slice takes up to a second on a CPU.
        some = scan[:, :, (slices - few) // 2 : (slices + few) // 2]
        start = time.perf_counter()
        segment_with_network(some, weights)
        each = (time.perf_counter() - start) / few
        row = Row(f"lung mask by lungmask's network, random weights, {where}", "s per slice", ours=each)
        row.note = f"{each * slices:.0f} s for {slices} slices"
    memory = Row(
        "memory of a worker for all of these",
        "GB",
        ours=measure_scan_peak_memory(image, atlas_mask, table),
        goal="2 GB",
    )
    return [*rows, row, memory]
