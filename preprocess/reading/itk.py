"""Reading with ITK: one-line errors, recorded warnings, and a check that the axes are at right angles."""

import contextlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.reading import ScanError

PLACE = 0.1  # mm; largest accepted error of a voxel position, for example due to sheared axes or uneven slice spacing


class _Listener(sitk.LoggerBase):
    """Collects the warnings that ITK would print to the console."""

    def __init__(self):
        super().__init__()
        self.warnings: list[str] = []

    def DisplayWarningText(self, text: str) -> None:
        self.warnings.append(text)

    def DisplayText(self, text: str) -> None:
        pass

    DisplayErrorText = DisplayGenericOutputText = DisplayDebugText = DisplayText


def shorten_warning(warning: str) -> str:
    """Return an ITK warning without its prefix (source file, line and object address)."""
    text = " ".join(warning.split())
    text = re.sub(r"^WARNING: In \S+, line \d+ ", "", text)
    return "ITK: " + re.sub(r"^\S+ \(0x[0-9a-f]+\): ", "", text)


@contextlib.contextmanager
def catch_itk_errors(path: Path, file_kind: str, warnings: list[str]) -> Iterator[None]:
    """Shorten ITK's errors in a ``with`` block to one line with the file name; add ITK's warnings to ``warnings``.

    ITK's logger and warning switch are global to the process, so both are restored when the ``with`` block ends.

    Raises:
        ScanError: ITK cannot read the file.
    """
    listener, shown = _Listener(), sitk.ProcessObject.GetGlobalWarningDisplay()
    before = listener.SetAsGlobalITKLogger()
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    try:
        yield
    except (RuntimeError, UnicodeDecodeError) as error:  # ITK's message may quote bytes that are not UTF-8
        reason = shorten_error(str(error)).replace(f"{path} ", "it ")
        raise ScanError(f"{path} cannot be read as {file_kind}: {reason}") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
        before.SetAsGlobalITKLogger()
        found = [shorten_warning(text) for text in listener.warnings]
        warnings += [text for text in dict.fromkeys(found) if text not in warnings]


def shorten_error(text: str) -> str:
    """Return the reason in an error message of ITK, as one line."""
    if "Unable to determine ImageIO reader" in text:
        return "its content is not NIfTI, NRRD or MetaImage; it is damaged or another kind of file"
    # The last line of this ITK message comes from errno and is unrelated to the cause.
    if "MetaImageIO" in text and "File cannot be read" in text:
        return "its data are cut short, or the data file named in its header is missing; copy header and data again"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "Error" not in line[:9]), lines[-1] if lines else "")
    return re.sub(r"^ITK ERROR: (\S+\(0x[0-9a-f]+\): )?", "", told)[:200]


# ------------------------------------------------------------ voxel positions


def compute_affine(image: sitk.Image) -> np.ndarray:
    """Return the affine (3, 4) from voxel indices (x, y, z) to LPS in mm."""
    directions = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return np.column_stack([directions, image.GetOrigin()])


def list_corner_indices(size: tuple[int, ...]) -> np.ndarray:
    """Return the homogeneous indices (8, 4), each (x, y, z, 1), of a volume's corner voxels."""
    return np.array([(*index, 1.0) for index in product(*((0, count - 1) for count in size))])


def measure_max_corner_distance_mm(
    first_affine: np.ndarray, second_affine: np.ndarray, volume_size: tuple[int, ...]
) -> float:
    """Return the largest distance in mm between the positions that two affines (3, 4) give to a corner voxel."""
    return float(np.linalg.norm(list_corner_indices(volume_size) @ (first_affine - second_affine).T, axis=1).max())


def straighten_axes(affine: np.ndarray) -> np.ndarray:
    """Return the nearest affine (3, 4) with axes at right angles and the same voxel sizes."""
    sizes = np.linalg.norm(affine[:, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:, :3] / sizes)
    return np.column_stack([left @ right * sizes, affine[:, 3]])


def check_right_angles(affine: np.ndarray, size: tuple[int, ...], name: str) -> None:
    """Raise ScanError unless the axes are at right angles, within 0.1 mm at the volume's corners.

    Args:
        affine: (3, 4), from voxel indices to mm.
        size: number of voxels along (x, y, z).
        name: file and header field that contain the affine, for the error message.
    """
    axes = affine[:, :3]
    if not np.isfinite(affine).all() or (np.linalg.norm(axes, axis=0) == 0).any():
        raise ScanError(
            f"{name} gives voxel positions that are not finite, or an axis of length 0; export the scan again"
        )
    off = measure_max_corner_distance_mm(affine, straighten_axes(affine), size)
    if off <= PLACE:
        return
    unit = axes / np.linalg.norm(axes, axis=0)
    pair, cosine = max(
        (((i, j), abs(unit[:, i] @ unit[:, j])) for i, j in ((0, 1), (0, 2), (1, 2))), key=lambda p: p[1]
    )
    angle = np.rad2deg(np.arcsin(min(1.0, cosine)))
    raise ScanError(
        f"{name} has sheared axes ({'xyz'[pair[0]]} and {'xyz'[pair[1]]}, {angle:.1f} degrees off a right angle; "
        f"tilted gantry?), so voxels would be displaced by up to {off:.1f} mm. Use a copy resampled to a rectangular "
        "grid (dcm2niix writes one whose name ends in _Tilt)"
    )
