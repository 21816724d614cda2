"""Check that voxel values are HU of a chest: find the peaks of air and soft tissue in a histogram without padding.

Padding is one exact value that fills the image outside the field of view, up to the outer faces of the volume. Padding
is found first, because padding would otherwise count as air or bone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage, signal

from preprocess.reading import ScanError

AIR = -1024  # HU; value of voxels outside the scan
MIN_EXTENT = 50.0  # mm; shortest accepted length of a scan along each axis
MAX_HU = 32767
AIR_BELOW = -850  # HU; air and much of a lung are below this value, unless the scan's values are halved or shifted
PADDING_BELOW = -1500  # HU; lower values are a scanner's padding; higher values, up to that of air, are noise
LOWEST_AIR = -1100  # HU; lowest accepted value of air, allowing for a scanner's offset; padding below it is not air
BRIGHT = 1500  # HU; a large uniform area above this value at a face of the image cannot be part of the body
SATURATED = 3071  # HU; highest 12-bit value; lower values can be bone or metal, higher values are padding or metal
SAMPLE = 3_000_000  # number of voxels sampled to locate the peaks


# ------------------------------------------------------------ padding


def keep_parts_touching_slice_edge(mask: np.ndarray) -> np.ndarray:
    """Return the connected parts of a mask (z, y, x) that touch an edge of their slice.

    A ring around the field of view touches the edge of the slice, but metal inside the body does not.
    """
    kept = np.zeros_like(mask)
    for plane, target in zip(mask, kept):
        if plane.all():
            target[:] = True
        elif plane.any():
            parts, count = ndimage.label(plane)
            at_edge = np.zeros(count + 1, dtype=bool)
            for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
                at_edge[edge] = True
            at_edge[0] = False
            target[:] = at_edge[parts]
    return kept


def fill_padding(
    values: np.ndarray,
    padding_ranges_hu: Sequence[tuple[float, float]],
    slice_indices: slice | list[int],
    warnings: list[str],
) -> np.ndarray:
    """Set voxels to air if their value is the padding value that the file declares.

    Args:
        values: (slices, rows, columns) in HU; changed in place if their type can hold -1024, otherwise copied.
        padding_ranges_hu: lowest and highest HU of the padding; several ranges if its encoding is ambiguous.
        slice_indices: indices of the slices to change.
        warnings: list to which a warning is appended if the padding value is higher than the HU of air.

    Returns:
        The values with air in place of padding.
    """
    if values.dtype.kind in "iu" and np.iinfo(values.dtype).min > AIR:
        values = values.astype(np.int32)
    for low, high in padding_ranges_hu:
        if low >= LOWEST_AIR and high <= AIR_BELOW:
            continue  # this padding already counts as air
        part = values[slice_indices]
        mask = (part >= low - 0.01) & (part <= high + 0.01)
        if not mask.any():
            continue
        # Tissue may have the padding value too, so fill only regions that touch the edge of a slice.
        if high >= LOWEST_AIR and low <= SATURATED:
            mask = keep_parts_touching_slice_edge(mask)
            if mask.mean() < 0.001:
                continue
        part[mask] = AIR
        values[slice_indices] = part
        if high >= LOWEST_AIR:
            warnings.append(
                f"padding of {low:g} HU (PixelPaddingValue, {mask.mean():.1%} of the voxels) is treated as air"
            )
    return values


def collect_face_values(values: np.ndarray) -> np.ndarray:
    """Return the values on the six faces of a volume, as one array."""
    return np.concatenate([face.ravel() for axis in range(3) for face in (values.take(0, axis), values.take(-1, axis))])


def find_frequent_values(values: np.ndarray, share: float) -> np.ndarray:
    """Return the exact values that occur in at least a fraction ``share`` of the voxels."""
    found, counts = np.unique(values, return_counts=True)
    return found[counts >= share * values.size]


def fill_undeclared_padding(values: np.ndarray, name: str | Path, warnings: list[str]) -> np.ndarray:
    """Replace undeclared padding with air: values above those of a body, or zeros around the field of view."""
    faces = collect_face_values(values)
    even = find_frequent_values(faces, 0.005)
    found = [value for value in even if value > BRIGHT]
    ends = values[:: values.shape[0] - 1, :: values.shape[1] - 1, :: values.shape[2] - 1]
    sides = (values.take(end, axis) for axis in range(3) for end in (0, -1))
    # Zeros outside a round field of view fill all corners; zeros that pad the scan to a fixed size fill a whole face.
    if values.min() < AIR_BELOW and ((ends == 0).all() or any((side == 0).all() for side in sides)):
        found.append(0)
    for value in found:
        mask = keep_parts_touching_slice_edge(values == value)
        if mask.mean() < 0.001:
            continue  # probably bone or metal at a face of the image
        rest = values[~mask]
        if not value and ((rest > -200) & (rest < 300)).mean() < 0.01:
            continue  # a water phantom that reaches the image's faces
        values = np.where(mask, np.array(AIR, dtype=np.result_type(values.dtype, np.int16)), values)
        warnings.append(
            f"{mask.mean():.1%} of the voxels, at the image's faces, are {value:g}: this padding is treated as air"
        )
    return values


# ------------------------------------------------------------ peaks


class Peaks(NamedTuple):
    """Peaks of a volume's histogram, excluding padding."""

    places: list[float]  # positions of the peaks, HU, ascending
    heights: list[float]  # heights of the peaks: smoothed fraction of voxels per 10 HU
    low: float  # fraction of voxels below -700 HU, which may be air in a lung
    sharp: bool  # whether the lowest peak is as narrow as noise around air; a peak of lung tissue is wider
    padding: list[float]  # values that were excluded


def find_histogram_peaks(values: np.ndarray) -> Peaks:
    """Find the peaks of a volume's histogram, excluding possible padding (uniform low values at the faces)."""
    step = max(1, int((values.size / SAMPLE) ** (1 / 3)))
    sample = values[::step, ::step, ::step]
    aside = [value for value in find_frequent_values(collect_face_values(values), 0.05) if value < AIR_BELOW]
    kept = np.ones(sample.shape, dtype=bool)
    for value in aside:
        kept &= ~keep_parts_touching_slice_edge(sample == value)
    low = sample < PADDING_BELOW  # a scanner's padding may also lie inside the image
    if low.any():
        constant = list(find_frequent_values(sample[low], 0.05))
        aside += [value for value in constant if value not in aside]
        kept &= ~np.isin(sample, constant)
    if (most := sample == sample.max()).mean() > 0.001:
        kept &= ~most  # exclude values that are clipped at the maximum
    rest = sample[kept]
    if rest.size < 0.01 * sample.size:
        return Peaks([], [], 0.0, False, aside)
    width = 10  # HU
    counts = np.histogram(np.clip(rest, -4000, 3999), np.arange(-4000, 4000 + width, width))[0] / rest.size
    smooth = ndimage.gaussian_filter1d(counts, 2.0)
    middle = np.arange(-4000, 4000, width) + width / 2
    found: dict[float, float] = {}
    # The prominence of a true peak is more than a fifth of its height. Noise peaks have a lower prominence.
    # The width of a peak does not matter, because fat and muscle form one peak 250 HU wide in a noisy scan.
    for at in signal.find_peaks(smooth, distance=10)[0]:
        near = counts[max(0, at - 6) : at + 7].sum()
        prominence = signal.peak_prominences(smooth, [at])[0][0]
        if near >= 0.02 and prominence > 0.2 * smooth[at]:
            found[float(middle[at])] = float(smooth[at])
    places = sorted(found)
    sharp = bool(places) and is_peak_as_narrow_as_noise(rest, places[0])
    return Peaks(places, [found[place] for place in places], float((rest < -700).mean()), sharp, aside)


def is_peak_as_narrow_as_noise(hu_values: np.ndarray, peak_hu: float) -> bool:
    """Return whether a histogram peak is as narrow as noise around a single value.

    Noise around one value spreads over less than 28 HU, and lung tissue over at least 35 HU. If most values of
    a peak are exactly equal, the peak comes from a phantom and does not count as narrow.
    """
    near = hu_values[np.abs(hu_values - peak_hu) < 25]
    wide = (np.abs(hu_values - peak_hu) < 75).sum()
    if near.size < 0.1 * hu_values.size or near.size < 0.65 * wide:
        return False
    return np.unique(near, return_counts=True)[1].max() < 0.5 * near.size


def describe_misplaced_air_tissue_peaks(peaks: Peaks) -> str:
    """Return what is wrong with the positions of air and tissue in the histogram; ``""`` if both are normal."""
    if not peaks.places:
        return ""
    lowest = peaks.places[0]
    tissue = [place for place in peaks.places if place >= lowest + 350]
    beside = f" next to padding of {', '.join(f'{value:g}' for value in peaks.padding)}" if peaks.padding else ""
    air = f"air is at about {lowest:.0f}{beside} instead of -1000"
    body = f"and the body at {', '.join(f'{place:.0f}' for place in tissue)} instead of -100 and 45" if tissue else ""
    # In a normal scan, the tallest tissue peak of the histogram is fat (-100 HU) or muscle (45 HU).
    # Ignore peaks up to -450 HU, which may be dense lungs, and small peaks, which may be bone.
    tall = {place: height for place, height in zip(*peaks[:2]) if place in tissue and place > -450}
    tall = tall or dict(zip(*peaks[:2]))
    main = max(place for place, height in tall.items() if height >= 0.4 * max(tall.values()))
    if tissue and (lowest > -350 or (lowest > -600 and peaks.low < 0.001)):
        cause = "the rescale intercept (often -1024) was not applied: " if lowest > -100 else ""
        return f"{cause}{air}, {body}"
    if tissue and not -150 <= main <= 150:
        cause = "the rescale intercept (often -1024) was applied twice: " if lowest < PADDING_BELOW else ""
        return f"{cause}{air}, {body}"
    if peaks.sharp and not LOWEST_AIR <= lowest <= -930 and lowest > PADDING_BELOW:
        return f"values are shifted or scaled: {air}" + (f", {body}" if body else "")
    return ""


# ------------------------------------------------------------ the checks


def check_hounsfield(image: sitk.Image, path: str | Path, warnings: list[str] | None = None) -> sitk.Image:
    """Check that values can be HU of a chest, and return them as int16, or as float32 if they have fractions.

    Padding becomes -1024, so that interpolation does not ring at the edge of the padding. Padding means values below
    -1500 HU, NaN, and uniform areas at the image's faces that cannot be part of the body. Noise in air is kept, even
    below -1024 HU, because patches are clipped at -1024 HU after resampling.

    Args:
        image: a volume.
        path: the file, for error messages.
        warnings: list to which a warning is appended for each value treated as padding.

    Raises:
        ScanError: the values cannot be HU. The message gives the positions of the peaks and the usual cause.
    """
    warnings = [] if warnings is None else warnings
    given = values = sitk.GetArrayViewFromImage(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=AIR, posinf=MAX_HU, neginf=AIR)
    low, high = float(values.min()), float(values.max())
    seen = f"{path} has values from {low:g} to {high:g}"
    if low == high:
        raise ScanError(f"{seen}: the image is empty; copy or export it again")
    if high <= 5:
        raise ScanError(f"{seen}; these values are not HU but look rescaled; use the original CT")
    if low >= 0:
        raise ScanError(
            f"{seen}; these values are not HU, because air should be about -1000; the rescale intercept (often "
            "-1024) was not applied"
        )
    if high > BRIGHT or low < AIR_BELOW:
        values = fill_undeclared_padding(values, path, warnings)
    air = float((values < AIR_BELOW).mean())
    tissue = float(((values > -200) & (values < 300)).mean())
    if air < 0.01 or tissue < 0.01:
        raise ScanError(
            f"{seen}; these values are not HU of a chest: {air:.1%} of the voxels are air (below {AIR_BELOW}) and "
            f"{tissue:.1%} are soft tissue (-200 to 300), but at least 1% of each is expected"
        )
    if wrong := describe_misplaced_air_tissue_peaks(find_histogram_peaks(values)):
        raise ScanError(f"{seen}; these values are not HU: {wrong}; use the original CT")
    if low >= PADDING_BELOW and high <= MAX_HU and values is given and given.dtype == np.int16:
        return image  # most scans need no change, and a copy would double the memory
    whole = values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
    result = np.empty(values.shape, np.int16 if whole else np.float32)
    for plane, target in zip(values, result):
        target[:] = np.where(plane < PADDING_BELOW, AIR, np.minimum(plane, MAX_HU))
    checked = sitk.GetImageFromArray(result)
    checked.CopyInformation(image)
    return checked


def check_extent(image: sitk.Image, path: str | Path) -> None:
    """Raise ScanError if a volume is too thin for a chest, for example a localizer or a few slices of a scan."""
    extent = [count * spacing for count, spacing in zip(image.GetSize(), image.GetSpacing())]
    if min(extent) < MIN_EXTENT:
        size = " x ".join(f"{length:.0f}" for length in extent)
        raise ScanError(
            f"{path} spans {size} mm in {image.GetSize()[2]} slices, which is not a whole chest; use the complete scan"
        )
