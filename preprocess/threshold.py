"""Lung masks without a network: thresholding, airway tracking, and a left-right split.

The classical recipe (Hu et al., IEEE TMI 2001; van Rikxoort et al., Medical Physics 2009) for
machines where lungmask's weights are not to be had. It takes air-filled lungs; dense consolidation
is left out of the mask, which a network would keep.
"""

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage.segmentation import watershed

from preprocess.geometry import block_means, on_slab, orient, slabs
from preprocess.scan import AIR, ScanError

RIGHT, LEFT = 1, 2
AIR_BELOW = -400  # HU; lung and air are below, soft tissue and vessels above
GAS_BELOW = -975  # HU; the median of bowel gas or of the air in a cushion, lungs have vessels
INSIDE = 0.05  # least share of a lung that the field of view cuts, in slices where it is not cut
AIRWAY_BELOW = -880  # HU; mean over a cross-section of the trachea
ADULT_WIDTH = 320.0  # mm, chest; lengths below are for it and shrink with the scan

WORKING_SPACING = 2.0  # mm
CLOSING_RADIUS = 8.0  # mm; fills vessels and hilum
TRACHEA_AREA = (40.0, 900.0)  # mm2, cross-section
TRACHEA_LENGTH = 20.0  # mm, at least
ROUNDING = 1e-3  # of a squared distance between voxels, which is a whole number
THIN, RIM = 2, 3  # working voxels: of a wall that is no body's, and how far around an air-filled space is looked
MERGED_LENGTH = 12.0  # mm along the airway over which its wall may be lost


def segment_lungs(scan: sitk.Image) -> sitk.Image:
    """Mask of both lungs: uint8, 1 right, 2 left (the patient's), on the scan's own grid.

    Args:
        scan: chest CT in HU, any orientation and spacing.

    Raises:
        ScanError: nothing in it looks like a pair of lungs.
    """
    working = orient(scan, "LPS")
    width = working.GetSize()[0] * working.GetSpacing()[0]
    scale = float(np.clip(width / ADULT_WIDTH, 0.2, 1.0))
    spacing = max(WORKING_SPACING * scale, min(working.GetSpacing()))
    working = _resample(working, spacing)
    volume = sitk.GetArrayFromImage(working)  # (z, y, x): z to the head, y to the back, x to the left
    air = _air_in_body(volume)
    airway = _find_airway(volume, air, spacing, scale)
    labels = _split_sides(air & ~airway)
    labels = _fill_vessels(labels, CLOSING_RADIUS * scale / spacing)
    labels[airway] = 0

    # Each side is interpolated on its own, so that the boundary is smooth on the scan's finer grid.
    sides = []
    for label in (RIGHT, LEFT):
        side = sitk.GetImageFromArray((labels == label).astype(np.float32))
        side.CopyInformation(working)
        sides.append(side)
    mask = np.zeros(scan.GetSize()[::-1], dtype=np.uint8)
    for first, last in slabs(scan):
        right, left = (on_slab(side, scan, first, last) for side in sides)
        mask[first:last][(right >= 0.5) & (right >= left)] = RIGHT
        mask[first:last][(left >= 0.5) & (left > right)] = LEFT
    image = sitk.GetImageFromArray(mask)
    image.CopyInformation(scan)
    return image


def _resample(image: sitk.Image, spacing: float) -> sitk.Image:
    """Isotropic working copy, averaged over the voxels that it drops."""
    factors = [max(1, int(spacing / own)) for own in image.GetSpacing()]
    image = block_means(image, factors)
    # Not past the last voxel: a slice of air above the trachea would join the lungs to the outside.
    size = [max(2, int((n - 1) * own / spacing) + 1) for n, own in zip(image.GetSize(), image.GetSpacing())]
    return sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [spacing] * 3, image.GetDirection(), AIR
    )


def _sizes(labels: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(labels.ravel(), minlength=count + 1)


def _air_in_body(volume: np.ndarray) -> np.ndarray:
    """Air inside the body: not joined to the image's sides within its axial slice; no pockets, no bowel gas.

    Slice by slice, because in three dimensions the trachea may lead outside: a scan that was
    rotated or tilt-corrected ends in slices of nothing but padding. Where the field of view cuts a lung, the lung
    reaches the image's side; it is as dense as lung, and in other slices lies inside.
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
    sizes = _sizes(labels, count)
    if cut.any():  # a cushion reaches the image's side wherever it is
        sizes[np.bincount(labels[inside], minlength=count + 1) < INSIDE * sizes] = 0
    sizes[0] = 0
    body = _body(volume)
    for label in np.flatnonzero(sizes >= 0.05 * sizes.max(initial=0)):
        if label and not _lies_in(labels, int(label), air, body):
            sizes[label] = 0
    if sizes.max(initial=0) < 0.002 * volume.size:
        raise ScanError(
            "no lungs found: no air-filled space inside the body; is the whole chest in the scan, with a margin?"
        )
    largest = int(sizes.argmax())
    kept = [largest]
    for label in np.flatnonzero(sizes >= 0.1 * sizes[largest]):
        if label != largest and np.median(volume[labels == label]) > GAS_BELOW:
            kept.append(int(label))
    return np.isin(labels, kept)


def _body(volume: np.ndarray) -> np.ndarray:
    """The body's tissue: the largest piece once what is thin is taken away, as the shell of a couch that touches it."""
    tissue = volume >= AIR_BELOW
    labels, count = ndimage.label(ndimage.binary_erosion(tissue, iterations=THIN))
    if not count:
        return tissue
    sizes = _sizes(labels, count)
    sizes[0] = 0
    return ndimage.binary_dilation(labels == sizes.argmax(), iterations=THIN + 1) & tissue


def _lies_in(labels: np.ndarray, label: int, air: np.ndarray, body: np.ndarray) -> bool:
    """Whether most of the tissue around an air-filled space is the body's: around a couch's foam it is the couch's."""
    box = tuple(
        slice(max(0, part.start - RIM), part.stop + RIM)
        for part in ndimage.find_objects((labels == label).astype(np.uint8))[0]
    )
    space = labels[box] == label
    rim = ndimage.binary_dilation(space, iterations=RIM) & ~space & ~air[box]
    return not rim.any() or float(body[box][rim].mean()) > 0.5


def _find_airway(volume: np.ndarray, air: np.ndarray, spacing: float, scale: float) -> np.ndarray:
    """Trachea and main bronchi with their wall, followed down slice by slice until they enter a lung."""
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
            airway = _track_down(air, top, seed, high, round(MERGED_LENGTH * scale / spacing))
            if np.flatnonzero(airway.any(axis=(1, 2))).size * spacing >= TRACHEA_LENGTH * scale:
                return ndimage.binary_dilation(airway, iterations=1)
    return np.zeros_like(air)


def _track_down(air: np.ndarray, top: int, seed: np.ndarray, largest_area: float, most_merged: int) -> np.ndarray:
    """Cross-sections below ``seed`` that overlap their upper neighbour and do not grow into a lung.

    The thin wall between trachea and lung is lost in a slice here and there: for up to
    ``most_merged`` slices the section is carried down as it was. Where it does not come free again,
    those slices are given back, for that is where a bronchus enters its lung.
    """
    airway = np.zeros_like(air)
    airway[top] = seed
    current, area = seed, float(seed.sum())
    merged: list[int] = []
    for level in range(top - 1, -1, -1):
        labels, count = ndimage.label(air[level])
        sizes = _sizes(labels, count)
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
    """Label right (1) and left (2) by the patient's side, also where the lungs touch."""
    markers = None
    depth = np.sqrt(_squared_distance(~lungs).astype(np.float64))
    for step in range(0, int(depth.max()) + 1):
        labels, count = ndimage.label(depth > step)
        sizes = _sizes(labels, count)
        sizes[0] = 0
        if count < 2:
            continue
        first, second = np.argsort(sizes)[::-1][:2]
        if sizes[second] < 0.15 * sizes[first]:
            continue
        centres = ndimage.center_of_mass(np.ones_like(labels), labels, [first, second])
        # Two lungs lie side by side; pieces of one lie above each other.
        if abs(centres[0][2] - centres[1][2]) < 0.25 * np.ptp(np.nonzero(lungs.any(axis=(0, 1)))[0]):
            continue
        right, left = (first, second) if centres[0][2] < centres[1][2] else (second, first)
        markers = np.zeros(lungs.shape, dtype=np.int8)
        markers[labels == right] = RIGHT
        markers[labels == left] = LEFT
        break
    if markers is None:
        raise ScanError("found one air-filled space, not two lungs side by side")
    split = watershed(-depth, markers, mask=lungs).astype(np.int8)

    # Pieces that no marker reached: to the nearer lung, unless they are small.
    rest, count = ndimage.label(lungs & (split == 0))
    sizes = _sizes(rest, count)
    sizes[0] = 0
    large = (sizes >= 0.01 * lungs.sum())[rest]
    if large.any():
        nearest = ndimage.distance_transform_edt(split == 0, return_distances=False, return_indices=True)
        split[large] = split[tuple(nearest[:, large])]
    return split


def _fill_vessels(labels: np.ndarray, radius: float) -> np.ndarray:
    """Close each lung with a ball and fill its holes; voxels of the other lung stay the other lung's."""
    filled = np.zeros(labels.shape, dtype=np.int8)
    margin = int(np.ceil(radius)) + 1
    for label, box in zip((RIGHT, LEFT), ndimage.find_objects(labels, LEFT)):
        own, part = labels[box], filled[box]  # nothing is closed outside a side's own box
        side = np.pad(own == label, margin)  # lets the ball pass the box's border; cut away again
        dilated = _squared_distance(side) <= radius**2 + ROUNDING
        closed = (_squared_distance(~dilated) > radius**2 + ROUNDING) | side
        closed = ndimage.binary_fill_holes(closed[margin:-margin, margin:-margin, margin:-margin])
        part[closed & (own != RIGHT + LEFT - label) & (part == 0)] = label
    return filled


def _squared_distance(mask: np.ndarray) -> np.ndarray:
    """Of every voxel outside ``mask`` to the nearest inside, in voxels, squared, float32; 0 inside.

    ITK's, which takes a fifteenth of scipy's time.
    """
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    distances = sitk.SignedMaurerDistanceMap(image, False, True, False)  # named: a view does not keep its image
    return np.maximum(sitk.GetArrayViewFromImage(distances), 0)
