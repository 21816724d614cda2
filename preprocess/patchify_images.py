"""Step 4: cut every scan at the atlas's locations.

    python preprocess/patchify_images.py --input-csv dataset.csv --root-dir /data/patches \\
        --atlas-mask atlas_lung_mask.nii.gz --num-workers 4

A scan is brought to the atlas's orientation, resampled to 1 mm, padded by 60 voxels of air and
clipped to [-1024, 240] HU. Each corner of atlas_patch_loc.npy goes through the subject's transform
to a voxel of that volume, where 32 x 32 x 32 voxels are cut. What lies outside the scan is -1024.

Writes <root-dir>/patch/{sid}_patch.npy, patch_loc/{sid}_patch_loc.npy, and qc/{sid}.png: the patch
boxes over scan and mask. Look at some; nothing else tells a wrong mask or transform as fast.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import HU_MAX, HU_MIN, StoreError, StoreLayout, load_locations, save_array, write_aside
from preprocess.atlas import atlas_fingerprint, load_atlas, read_affine
from preprocess.scan import PADDING, ScanError, orient, orientation_of, pad, read_mask, read_scan, resample_isotropic
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


def map_corners(table: np.ndarray, atlas: sitk.Image, transform: sitk.Transform, volume: sitk.Image) -> np.ndarray:
    """Corners (L, 3) in atlas voxels -> (L, 3) int64 in voxels of ``volume``, both (x, y, z).

    Index to point by the atlas, point to point by the transform, point to index by the volume, with
    SimpleITK's own rounding.
    """
    corners = np.empty_like(table)
    for row, corner in enumerate(table):
        point = transform.TransformPoint(atlas.TransformIndexToPhysicalPoint([int(value) for value in corner]))
        corners[row] = volume.TransformPhysicalPointToIndex(point)
    return corners


def cut_patches(volume: np.ndarray, corners: np.ndarray, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut cubes from a volume; voxels outside it are -1024.

    Args:
        volume: (z, y, x) int16.
        corners: (L, 3) lowest corners (x, y, z), possibly outside the volume.

    Returns:
        Patches (L, p, p, p), each (z, y, x); and the number of each patch's voxels outside, (L,).
    """
    patches = np.full((len(corners), *[patch_size] * 3), HU_MIN, dtype=np.int16)
    outside = np.zeros(len(corners), dtype=np.int64)
    size = np.array(volume.shape)
    for row, corner in enumerate(corners[:, ::-1]):  # (x, y, z) -> (z, y, x)
        low, high = np.clip(corner, 0, size), np.clip(corner + patch_size, 0, size)
        source = tuple(slice(a, b) for a, b in zip(low, high))
        target = tuple(slice(a, b) for a, b in zip(low - corner, high - corner))
        patches[row][target] = volume[source]
        outside[row] = patch_size**3 - np.prod(high - low)
    return patches, outside


def share_inside(corners: np.ndarray, patch_size: int, volume: sitk.Image, mask: sitk.Image) -> float:
    """Share of patch centres that lie in the mask. corners: voxels (x, y, z) of ``volume``."""
    labels = sitk.GetArrayViewFromImage(mask)
    size = np.array(mask.GetSize())
    inside = 0
    for corner in corners:
        point = volume.TransformContinuousIndexToPhysicalPoint([float(value) + patch_size // 2 for value in corner])
        index = np.array(mask.TransformPhysicalPointToIndex(point))
        if (index >= 0).all() and (index < size).all():
            inside += bool(labels[tuple(index[::-1])])
    return inside / len(corners)


def draw_boxes(
    path: Path,
    volume: sitk.Image,
    values: np.ndarray,
    mask: sitk.Image | None,
    corners: np.ndarray,
    patch_size: int,
    title: str,
) -> None:
    """Coronal, sagittal and axial slices with the lung mask's outline and the patches that they cross."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    labels = None
    if mask is not None:
        labels = sitk.GetArrayFromImage(sitk.Resample(mask, volume, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    low = np.clip(corners.min(0) - 20, 0, None)
    high = np.minimum(corners.max(0) + patch_size + 20, volume.GetSize())
    middle = corners + patch_size // 2
    # A plane through the middle of the mask, or of the patches; for x, through one lung.
    centre = np.median(middle, axis=0)
    figure = Figure(figsize=(15, 5.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    names = ("sagittal", "coronal", "axial")
    letters = ("x", "y", "z")
    for panel, (axis, across, up) in enumerate(((1, 0, 2), (0, 1, 2), (2, 0, 1))):
        candidates = middle[:, axis]
        position = int(
            candidates[np.argmin(np.abs(candidates - (np.quantile(candidates, 0.25) if axis == 0 else centre[axis])))]
        )
        position = int(np.clip(position, 0, volume.GetSize()[axis] - 1))
        plane = np.take(values, position, axis=2 - axis)  # rows: the later of the two axes
        extent_x, extent_y = (low[across], high[across]), (low[up], high[up])
        panel_axes = axes[panel]
        panel_axes.imshow(plane, cmap="gray", vmin=HU_MIN, vmax=HU_MAX, origin="lower", interpolation="nearest")
        if labels is not None:
            outline = np.take(labels, position, axis=2 - axis)
            if outline.any():
                panel_axes.contour(outline > 0, levels=[0.5], colors=["#ffd000"], linewidths=1.0)
        crossed = (corners[:, axis] <= position) & (position < corners[:, axis] + patch_size)
        for corner in corners[crossed]:
            panel_axes.add_patch(
                Rectangle(
                    (corner[across], corner[up]), patch_size, patch_size, fill=False, edgecolor="#35c8ff", linewidth=0.8
                )
            )
        panel_axes.set_xlim(*extent_x)
        panel_axes.set_ylim(*extent_y)
        panel_axes.set_title(f"{names[axis]}, {letters[axis]} = {position}: {int(crossed.sum())} patches")
        panel_axes.set_axis_off()
        # Heads up and faces up, whichever way the index axes run.
        direction = np.array(volume.GetDirection()).reshape(3, 3)
        if (up == 2 and direction[2, 2] < 0) or (up == 1 and direction[1, 1] > 0):
            panel_axes.invert_yaxis()
        if across == 0 and direction[0, 0] < 0:
            panel_axes.invert_xaxis()
    figure.suptitle(title)
    figure.tight_layout()
    write_aside(path, lambda stream: figure.savefig(stream, dpi=70, format="png"))


FIGURES = (
    "patches",
    "patches_outside",
    "patches_partly_outside",
    "voxels_outside",
    "centres_in_lungs",
    "centres_in_atlas_lungs",
)


def atlas_share(table: np.ndarray, atlas: sitk.Image, patch_size: int) -> float:
    """Share of the table's patch centres inside the atlas's own lungs."""
    return share_inside(table, patch_size, atlas, atlas)


def patchify(
    subject: Subject,
    previous: dict,
    *,
    root_dir: str,
    atlas_mask: str,
    atlas: str,
    patch_size: int,
    qc: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Step 4 for one subject; see run_subjects."""
    layout = StoreLayout(root_dir)
    table = load_locations(layout.find_atlas_patch_loc())
    transform_path, mask_path = layout.transform(subject.sid), layout.lung_mask(subject.sid)
    targets = (layout.patch(subject.sid), layout.patch_loc(subject.sid))
    if not targets[0].is_file():
        read_affine(transform_path)  # raises before anything is touched
    if not subject.image:
        raise ScanError("the input table has no image for this subject")
    if not os.path.exists(subject.image):
        raise ScanError(f"{subject.image} does not exist")
    stamp = {"atlas": atlas, "image_stamp": file_stamp(subject.image)}
    if not overwrite and all(target.is_file() for target in targets) and (layout.qc(subject.sid).is_file() or not qc):
        # Without a report's row they were made elsewhere, with the published code perhaps.
        current = not previous.get("atlas") or all(previous.get(name) == value for name, value in stamp.items())
        oldest = min(target.stat().st_mtime_ns for target in targets)
        inputs = [path for path in (transform_path, mask_path) if path.is_file()]
        fresh = all(path.stat().st_mtime_ns <= oldest for path in inputs)
        if current and fresh and _intact(targets, len(table), patch_size):
            raise Skip({name: previous[name] for name in (*FIGURES, *stamp) if name in previous})

    claim(layout, "patchify_images", subject.sid)
    if previous.get("atlas"):  # made here, of other inputs: should this fail, they must not be grouped
        for path in (*targets, layout.qc(subject.sid)):
            path.unlink(missing_ok=True)
    atlas_image = load_atlas(atlas_mask)
    transform = read_affine(transform_path)
    volume = pad(resample_isotropic(orient(read_scan(subject.image), orientation_of(atlas_image))))
    values = sitk.GetArrayFromImage(volume)  # (z, y, x)
    if values.dtype.kind == "f":
        values = np.rint(values)
    values = np.clip(values, HU_MIN, HU_MAX).astype(np.int16)
    corners = map_corners(table, atlas_image, transform, volume)
    patches, _ = cut_patches(values, corners, patch_size)
    # The padding is outside the scan too.
    scan_corners = corners - PADDING
    _, outside = cut_patches(values[PADDING:-PADDING, PADDING:-PADDING, PADDING:-PADDING], scan_corners, patch_size)
    if (outside == patch_size**3).all():
        raise ScanError(
            f"every patch lies outside {subject.image}; the transform {transform_path} belongs to another scan"
        )

    figures: dict[str, Any] = {
        "patches": len(table),
        "patches_outside": int((outside == patch_size**3).sum()),
        "patches_partly_outside": int(((outside > 0) & (outside < patch_size**3)).sum()),
        "voxels_outside": int(outside.sum()),
        "centres_in_lungs": "",
        "centres_in_atlas_lungs": round(atlas_share(table, atlas_image, patch_size), 4),
    }
    mask = read_mask(mask_path) if mask_path.is_file() else None
    if mask is not None:
        figures["centres_in_lungs"] = round(share_inside(corners, patch_size, volume, mask), 4)
    if qc:
        shares = (
            f"{figures['centres_in_lungs']:.2f} of centres in the lungs (atlas {figures['centres_in_atlas_lungs']:.2f})"
            if mask is not None
            else "no mask"
        )
        edge = f"{figures['patches_outside']} outside, {figures['patches_partly_outside']} partly"
        title = f"{subject.sid}: {len(table)} patches, {shares}; {edge}"
        draw_boxes(layout.qc(subject.sid), volume, values, mask, corners, patch_size, title)
    save_array(targets[1], corners)
    save_array(targets[0], patches)
    return {**figures, **stamp}


def _intact(targets: tuple[Path, Path], count: int, patch_size: int) -> bool:
    try:
        patches = np.load(targets[0], mmap_mode="r", allow_pickle=False)
        corners = np.load(targets[1], allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return patches.shape == (count, *[patch_size] * 3) and patches.dtype == np.int16 and corners.shape == (count, 3)


def check_disk(root_dir: Path, subjects: list[Subject], count: int, patch_size: int) -> None:
    """Raise StoreError unless the patches still to be cut, and their grouped copy, fit on the disk."""
    import shutil

    layout = StoreLayout(root_dir)
    missing = sum(not layout.patch(subject.sid).is_file() for subject in subjects)
    each = count * patch_size**3 * 2
    needed = missing * each * 2
    root_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root_dir).free
    if needed > free:
        raise StoreError(
            f"{missing} subjects at {each / 1e6:.0f} MB, cut and grouped, need {needed / 1e9:.1f} GB, but "
            f"{root_dir} has "
            f"{free / 1e9:.1f} GB free; choose another --root-dir or fewer subjects"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--atlas-mask", required=True, help="atlas lung mask at 1 mm: 50 right lung, 100 left lung")
    parser.add_argument(
        "--patch-size", type=int, default=32, help="voxels; the encoder takes 32 only, leave it (default: %(default)s)"
    )
    parser.add_argument("--no-qc", action="store_true", help="draw no pictures, which saves about a second a subject")
    args = parser.parse_args()
    if args.patch_size < 1:
        raise StoreError(f"--patch-size {args.patch_size}: at least 1 voxel")
    subjects = read_subjects(args.input_csv)
    layout = StoreLayout(args.root_dir)
    table = load_locations(layout.find_atlas_patch_loc())
    atlas_mask = os.path.abspath(args.atlas_mask)
    atlas_image = load_atlas(atlas_mask)
    if ((table + args.patch_size) > np.array(atlas_image.GetSize())).any():
        raise StoreError(
            f"{layout.atlas_patch_loc} leaves the atlas {args.atlas_mask}: it belongs to another atlas mask"
        )
    check_disk(layout.root, subjects, len(table), args.patch_size)
    return run_subjects(
        "patchify_images",
        patchify,
        subjects,
        args,
        dict(
            root_dir=os.path.abspath(args.root_dir),
            atlas_mask=atlas_mask,
            atlas=atlas_fingerprint(atlas_image),
            patch_size=args.patch_size,
            qc=not args.no_qc,
            overwrite=args.overwrite,
        ),
    )


if __name__ == "__main__":
    script_main(main)
