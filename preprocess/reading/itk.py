"""ITK's readers: errors in one sentence, warnings kept, and a check that axes are at right angles."""

import contextlib
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from preprocess.reading import ScanError

PLACE = 0.1  # mm; farther than this from where its file has it, a voxel is in the wrong place


class _Listener(sitk.LoggerBase):
    """Keeps what ITK would write to the console."""

    def __init__(self):
        super().__init__()
        self.warnings: list[str] = []

    def DisplayWarningText(self, text: str) -> None:
        self.warnings.append(text)

    def DisplayText(self, text: str) -> None:
        pass

    DisplayErrorText = DisplayGenericOutputText = DisplayDebugText = DisplayText


def _sentence(warning: str) -> str:
    """ITK's warning without the source file, the line and the address of an object that it begins with."""
    text = " ".join(warning.split())
    text = re.sub(r"^WARNING: In \S+, line \d+ ", "", text)
    return "ITK: " + re.sub(r"^\S+ \(0x[0-9a-f]+\): ", "", text)


@contextlib.contextmanager
def itk_reading(path: Path, what: str, warnings: list[str]) -> Iterator[None]:
    """Read with ITK: its many-line exceptions become one that names the file, its warnings join ``warnings``.

    The logger and the switch of the warnings are the process's; both are put back.
    """
    listener, shown = _Listener(), sitk.ProcessObject.GetGlobalWarningDisplay()
    before = listener.SetAsGlobalITKLogger()
    sitk.ProcessObject.SetGlobalWarningDisplay(True)
    try:
        yield
    except (RuntimeError, UnicodeDecodeError) as error:  # of its message, where that quotes the file
        reason = _itk_reason(str(error)).replace(f"{path} ", "it ")
        raise ScanError(f"{path} cannot be read as {what}: {reason}") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
        before.SetAsGlobalITKLogger()
        found = [_sentence(text) for text in listener.warnings]
        warnings += [text for text in dict.fromkeys(found) if text not in warnings]


def _itk_reason(text: str) -> str:
    if "Unable to determine ImageIO reader" in text:
        return "its content is none of NIfTI, NRRD and MetaImage; damaged, or another kind of file"
    if "MetaImageIO" in text and "File cannot be read" in text:  # ITK's own last line is that of errno, unrelated
        return "its data are cut short, or the data file that its header names is missing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "Error" not in line[:9]), lines[-1] if lines else "")
    return re.sub(r"^ITK ERROR: (\S+\(0x[0-9a-f]+\): )?", "", told)[:200]


# ------------------------------------------------------------ where voxels are


def affine_of(image: sitk.Image) -> np.ndarray:
    """(3, 4) index (x, y, z) to LPS in mm."""
    directions = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return np.column_stack([directions, image.GetOrigin()])


def corners(size: tuple[int, ...]) -> np.ndarray:
    """(8, 4) homogeneous indices (x, y, z, 1) of a volume's corner voxels."""
    return np.array([(*index, 1.0) for index in product(*((0, count - 1) for count in size))])


def apart(first: np.ndarray, second: np.ndarray, size: tuple[int, ...]) -> float:
    """The farthest, in mm, that two (3, 4) affines put a voxel of a volume apart; it is one of the corners."""
    return float(np.linalg.norm(corners(size) @ (first - second).T, axis=1).max())


def right_angled(affine: np.ndarray) -> np.ndarray:
    """The (3, 4) affine with axes at right angles, and the same voxel sizes, that is nearest to ``affine``."""
    sizes = np.linalg.norm(affine[:, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:, :3] / sizes)
    return np.column_stack([left @ right * sizes, affine[:, 3]])


def check_right_angles(affine: np.ndarray, size: tuple[int, ...], name: str) -> None:
    """Raise ScanError unless axes are at right angles, to 0.1 mm at the volume's corners.

    Args:
        affine: (3, 4) index to mm.
        size: voxels along (x, y, z).
        name: the header that has it, for the error.
    """
    axes = affine[:, :3]
    if not np.isfinite(affine).all() or (np.linalg.norm(axes, axis=0) == 0).any():
        raise ScanError(f"{name} has no numbers, or an axis without length, where the voxels' places should be")
    off = apart(affine, right_angled(affine), size)
    if off <= PLACE:
        return
    unit = axes / np.linalg.norm(axes, axis=0)
    pair, cosine = max(
        (((i, j), abs(unit[:, i] @ unit[:, j])) for i, j in ((0, 1), (0, 2), (1, 2))), key=lambda p: p[1]
    )
    angle = np.rad2deg(np.arcsin(min(1.0, cosine)))
    raise ScanError(
        f"{name} has sheared axes, {'xyz'[pair[0]]} and {'xyz'[pair[1]]} are {angle:.1f} degrees off a right angle (a "
        f"tilted gantry?), which would displace voxels by up to {off:.1f} mm; give a copy resampled to a "
        "rectangular grid (dcm2niix writes one, its name ends in _Tilt)"
    )
