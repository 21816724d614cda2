"""Segment lungs without a network: thresholding, airway tracking, and a left-right split.

This is the classical method (Hu et al., IEEE TMI 2001; van Rikxoort et al., Medical Physics 2009) for machines without
the lungmask weights. Thresholding finds only air-filled lung. Unlike a
network, thresholding leaves dense consolidation out of the mask.
"""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage.segmentation import watershed

from preprocess.geometry import average_blocks, iterate_slabs, orient, resample_to_slab
from preprocess.scan import AIR, ScanError

RIGHT, LEFT = 1, 2
AIR_BELOW = -400  # HU; lung and air are below, soft tissue and vessels above
GAS_BELOW = -975  # HU; bowel gas and air in cushions have a lower median; lungs have a higher median because of vessels
INSIDE = (
    0.05  # minimum fraction of lung voxels not connected to the image's sides; air in cushions has a lower fraction
)
AIRWAY_BELOW = -880  # HU; an air space is rejected as trachea if its mean is more than 80 HU above this value
ADULT_WIDTH = 320.0  # mm; the lengths below are for scans of this width and are reduced for narrower scans

WORKING_SPACING = 2.0  # mm
CLOSING_RADIUS = 8.0  # mm; large enough to fill vessels and the hilum
TRACHEA_AREA = (40.0, 900.0)  # mm2; smallest and largest accepted cross-section of the trachea
TRACHEA_LENGTH = 20.0  # mm; shortest accepted trachea
ROUNDING = 1e-3  # accepted rounding error of squared distances between voxels; the exact squares are whole numbers
# In voxels of WORKING_SPACING: depth of the erosion that removes thin structures, and width of the rim around air.
THIN, RIM = 2, 3
MERGED_LENGTH = 12.0  # mm; longest stretch of the airway where its wall may be invisible


def segment_lungs(scan: sitk.Image) -> sitk.Image:
    """Segment both lungs on the scan's own grid, as uint8: 1 for the subject's right lung, 2 for the left lung.

    Args:
        scan: chest CT in HU, any orientation and spacing.

    Raises:
        ScanError: nothing in the scan looks like a pair of lungs.
    """
    working = orient(scan, "LPS")
    width = working.GetSize()[0] * working.GetSpacing()[0]
    scale = float(np.clip(width / ADULT_WIDTH, 0.2, 1.0))
    spacing = max(WORKING_SPACING * scale, min(working.GetSpacing()))
    working = _resample(working, spacing)
    volume = sitk.GetArrayFromImage(working)  # axes (z, y, x): z points to the head, y to the back, x to the left
    air = _find_air_in_body(volume)
    airway = _find_airway(volume, air, spacing, scale)
    labels = _split_sides(air & ~airway)
    labels = _fill_vessels(labels, CLOSING_RADIUS * scale / spacing)
    labels[airway] = 0

    # Interpolate each lung separately to get a smooth boundary on the scan's finer grid.
    sides = []
    for label in (RIGHT, LEFT):
        side = sitk.GetImageFromArray((labels == label).astype(np.float32))
        side.CopyInformation(working)
        sides.append(side)
    mask = np.zeros(scan.GetSize()[::-1], dtype=np.uint8)
    for first, last in iterate_slabs(scan):
        right, left = (resample_to_slab(side, scan, first, last) for side in sides)
        mask[first:last][(right >= 0.5) & (right >= left)] = RIGHT
        mask[first:last][(left >= 0.5) & (left > right)] = LEFT
    image = sitk.GetImageFromArray(mask)
    image.CopyInformation(scan)
    return image


def _resample(image: sitk.Image, spacing: float) -> sitk.Image:
    """Make an isotropic working copy; finer voxels are averaged, not dropped."""
    factors = [max(1, int(spacing / own)) for own in image.GetSpacing()]
    image = average_blocks(image, factors)
    # Do not extend the image: an added slice of air above the trachea would connect the lungs to the outside.
    size = [max(2, int((n - 1) * own / spacing) + 1) for n, own in zip(image.GetSize(), image.GetSpacing())]
    return sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [spacing] * 3, image.GetDirection(), AIR
    )


def _count_voxels(labels: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=count + 1)


def _find_air_in_body(volume: np.ndarray) -> np.ndarray:
    """Find the air inside the body, without small pockets and bowel gas.

    Air counts as inside the body if it is not connected to the image's sides within its axial slice. Each slice is
    checked separately, because in 3-D the trachea may connect the lungs to outside air: rotated or tilt-corrected scans
    end in slices of pure padding. A lung that is cut off by the field of view reaches a side of the image, but
    is kept because of its density and because the lung lies inside the body in other slices.
    """
    air = volume < AIR_BELOW
    within_slice = np.zeros((3, 3, 3), dtype=bool)
    within_slice[1] = ndimage.generate_binary_structure(2, 1)
    planes, count = ndimage.label(air, within_slice)
    outside = np.zeros(count + 1, dtype=bool)
    for face in (planes[:, 0], planes[:, -1], planes[:, :, 0], planes[:, :, -1]):
        outside[np.unique(face)] = True
    dense = np.bincount(planes[volume > GAS_BELOW], minlength=count + 1)
    cut = outside & (dense > 0.5 * np.bincount(planes.ravel(), minlength=count + 1))
    outside[0], cut[0] = True, False
    inside = ~outside[planes]
    labels, count = ndimage.label(inside | cut[planes])
    sizes = _count_voxels(labels, count)
    if cut.any():  # drop air in cushions, which reaches the image's sides in every slice
        sizes[np.bincount(labels[inside], minlength=count + 1) < INSIDE * sizes] = 0
    sizes[0] = 0
    body = _find_body(volume)
    for label in np.flatnonzero(sizes >= 0.05 * sizes.max(initial=0)):
        if label and not _is_in_body(labels, int(label), air, body):
            sizes[label] = 0
    if sizes.max(initial=0) < 0.002 * volume.size:
        raise ScanError(
            "no lungs found: the scan has no air-filled space inside the body; check that the scan shows the whole "
            "chest, not only the lungs"
        )
    largest = int(sizes.argmax())
    kept = [largest]
    for label in np.flatnonzero(sizes >= 0.1 * sizes[largest]):
        if label != largest and np.median(volume[labels == label]) > GAS_BELOW:
            kept.append(int(label))
    return np.isin(labels, kept)


def _find_body(volume: np.ndarray) -> np.ndarray:
    """Find the tissue of the body: the largest piece after thin parts, such as a couch that touches it, are removed."""
    tissue = volume >= AIR_BELOW
    labels, count = ndimage.label(ndimage.binary_erosion(tissue, iterations=THIN))
    if not count:
        return tissue
    sizes = _count_voxels(labels, count)
    sizes[0] = 0
    return ndimage.binary_dilation(labels == sizes.argmax(), iterations=THIN + 1) & tissue


def _is_in_body(labels: np.ndarray, label: int, air: np.ndarray, body: np.ndarray) -> bool:
    """Return whether the tissue around an air-filled space is mostly body, unlike the shell around a couch's foam."""
    box = tuple(
        slice(max(0, part.start - RIM), part.stop + RIM)
        for part in ndimage.find_objects((labels == label).astype(np.uint8))[0]
    )
    space = labels[box] == label
    rim = ndimage.binary_dilation(space, iterations=RIM) & ~space & ~air[box]
    return not rim.any() or float(body[box][rim].mean()) > 0.5


def _find_airway(volume: np.ndarray, air: np.ndarray, spacing: float, scale: float) -> np.ndarray:
    """Find the trachea and main bronchi with their walls, by following them downwards slice by slice into the lungs."""
    low, high = (area * scale**2 / spacing**2 for area in TRACHEA_AREA)  # voxels
    columns = np.flatnonzero(air.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1]) / 2
    reach = 0.2 * (columns[-1] - columns[0])
    slices = np.flatnonzero(air.any(axis=(1, 2)))
    bottom = slices[0] + 0.4 * (slices[-1] - slices[0])
    for top in range(slices[-1], int(bottom), -1):
        labels, count = ndimage.label(air[top])
        for label in range(1, count + 1):
            seed = labels == label
            if not low <= seed.sum() <= high or abs(np.nonzero(seed)[1].mean() - middle) > reach:
                continue
            if volume[top][seed].mean() > AIRWAY_BELOW + 80:
                continue
            airway = _track_airway_down(air, top, seed, high, round(MERGED_LENGTH * scale / spacing))
            if np.flatnonzero(airway.any(axis=(1, 2))).size * spacing >= TRACHEA_LENGTH * scale:
                return ndimage.binary_dilation(airway, iterations=1)
    return np.zeros_like(air)


def _track_airway_down(
    air: np.ndarray, top: int, seed: np.ndarray, largest_area: float, most_merged: int
) -> np.ndarray:
    """Track the airway down from ``seed`` through cross-sections that overlap and do not grow into a lung.

    If the thin wall between the airway and a lung is invisible in a slice, the previous cross-section is copied, for up
    to ``most_merged`` slices. If the airway stays merged with the lung, a bronchus has entered the lung, and the copied
    cross-sections at the end of the airway are removed.
    """
    airway = np.zeros_like(air)
    airway[top] = seed
    current, area = seed, float(seed.sum())
    merged: list[int] = []
    for level in range(top - 1, -1, -1):
        labels, count = ndimage.label(air[level])
        sizes = _count_voxels(labels, count)
        following = np.zeros_like(current)
        for label in np.unique(labels[current]):
            if label and sizes[label] <= min(2.0 * area + 4, largest_area):
                following |= labels == label
        if following.any():
            merged.clear()
            area = max(0.9 * area, float(following.sum()))
        else:
            following = air[level] & current
            merged.append(level)
            if not following.any() or len(merged) > most_merged:
                break
        airway[level] = current = following
    airway[merged] = False
    return airway


def _split_sides(lungs: np.ndarray) -> np.ndarray:
    """Label the subject's right (1) and left (2) lung, even if the lungs touch."""
    markers = None
    depth = np.sqrt(_compute_squared_distance_to_mask(~lungs).astype(np.float64))
    for step in range(0, int(depth.max()) + 1):
        labels, count = ndimage.label(depth > step)
        sizes = _count_voxels(labels, count)
        sizes[0] = 0
        if count < 2:
            continue
        first, second = np.argsort(sizes)[::-1][:2]
        if sizes[second] < 0.15 * sizes[first]:
            continue
        centres = ndimage.center_of_mass(np.ones_like(labels), labels, [first, second])
        # Two lungs lie side by side; two pieces of the same lung lie one above the other.
        if abs(centres[0][2] - centres[1][2]) < 0.25 * np.ptp(np.nonzero(lungs.any(axis=(0, 1)))[0]):
            continue
        right, left = (first, second) if centres[0][2] < centres[1][2] else (second, first)
        markers = np.zeros(lungs.shape, dtype=np.int8)
        markers[labels == right] = RIGHT
        markers[labels == left] = LEFT
        break
    if markers is None:
        raise ScanError("found one air-filled space, not two lungs side by side; check the scan, or use another method")
    split = watershed(-depth, markers, mask=lungs).astype(np.int8)

    # Each large region that no marker reached becomes part of the nearer lung.
    rest, count = ndimage.label(lungs & (split == 0))
    sizes = _count_voxels(rest, count)
    sizes[0] = 0
    large = (sizes >= 0.01 * lungs.sum())[rest]
    if large.any():
        nearest = ndimage.distance_transform_edt(split == 0, return_distances=False, return_indices=True)
        split[large] = split[tuple(nearest[:, large])]
    return split


def _fill_vessels(labels: np.ndarray, radius: float) -> np.ndarray:
    """Close each lung with a ball and fill its holes, without taking voxels from the other lung."""
    filled = np.zeros(labels.shape, dtype=np.int8)
    margin = int(np.ceil(radius)) + 1
    for label, box in zip((RIGHT, LEFT), ndimage.find_objects(labels, LEFT)):
        own, part = labels[box], filled[box]  # closing never extends beyond the lung's bounding box
        side = np.pad(own == label, margin)  # pad, because the ball extends beyond the box; the margin is cropped below
        dilated = _compute_squared_distance_to_mask(side) <= radius**2 + ROUNDING
        closed = (_compute_squared_distance_to_mask(~dilated) > radius**2 + ROUNDING) | side
        closed = ndimage.binary_fill_holes(closed[margin:-margin, margin:-margin, margin:-margin])
        part[closed & (own != RIGHT + LEFT - label) & (part == 0)] = label
    return filled


def _compute_squared_distance_to_mask(mask: np.ndarray) -> np.ndarray:
    """Compute the squared distance in voxels from each voxel to the nearest voxel of ``mask``; float32, 0 inside.

    ITK's distance transform is 15 times as fast as SciPy's.
    """
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    # Keep a reference to the image, because an array view does not keep the image alive.
    distances = sitk.SignedMaurerDistanceMap(image, False, True, False)
    return np.maximum(sitk.GetArrayViewFromImage(distances), 0)
