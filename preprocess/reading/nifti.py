"""Read and check NIfTI headers, which give the voxel positions twice and may contradict themselves.

Two header fields map voxel indices to RAS in mm (LPS with x and y negated). The sform is an affine; the qform is a
rotation with the voxel sizes. The sform and the qform each have a code, and code 0 means that the field is not set. ITK
silently chooses either the sform or the qform, and exposes only the result. This module therefore reads the header
itself, at the offsets that the NIfTI standard defines.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocess.reading import ScanError
from preprocess.reading.formats import NIFTI_NAME, count_unpacked_bytes, read_head_and_detect_gzip
from preprocess.reading.itk import PLACE, check_right_angles, measure_max_corner_distance_mm

# A qform is a float32 quaternion. At a rotation of half a turn, rounding moves a far corner by 0.3 mm.
CONTRADICTION = 1.0  # mm; largest accepted distance between the positions that sform and qform give to a voxel
LPS = np.diag([-1.0, -1.0, 1.0])  # converts RAS to LPS
SINGLE_OFFSET = 352  # 348 bytes of header, and 4 bytes that mark extensions
UNITS = {1: "metres", 3: "micrometres"}  # xyzt_units; 2 means millimetres, and 0 (unknown) is read as millimetres

FIELDS = {  # field name: offset in bytes, and type
    "dim": (40, "8i2"),
    "bitpix": (72, "i2"),
    "pixdim": (76, "8f4"),
    "vox_offset": (108, "f4"),
    "xyzt_units": (123, "u1"),
    "qform_code": (252, "i2"),
    "sform_code": (254, "i2"),
    "quaternion": (256, "3f4"),
    "qoffset": (268, "3f4"),
    "srow": (280, "12f4"),
}


class Header(NamedTuple):
    """The fields of a NIfTI header that this module checks."""

    size: tuple[int, ...]  # number of voxels along (x, y, z)
    sform: np.ndarray | None  # (3, 4) affine from voxel index to LPS in mm; None if the sform's code is 0
    qform: np.ndarray | None
    units: int
    bytes: float  # expected size of the data file
    analyze: bool  # whether the file is ANALYZE, which has neither sform nor qform
    voxel: tuple[float, ...]  # voxel sizes along (x, y, z), from pixdim
    offset: float  # offset of the voxels in the data file, from vox_offset
    single: bool  # whether header and voxels share one file


def read_header(path: Path) -> Header | None:
    """Read the header of a NIfTI-1 or ANALYZE file; return None for other files. Raises ScanError for NIfTI-2."""
    head, _ = read_head_and_detect_gzip(path)
    orders = [order for order in "<>" if len(head) >= 348 and np.frombuffer(head, f"{order}i4", 1)[0] in (348, 540)]
    if not orders:
        return None
    if np.frombuffer(head, f"{orders[0]}i4", 1)[0] == 540:
        raise ScanError(f"{path} is NIfTI-2, which ITK does not read; save it as NIfTI-1")

    def read_header_field(name: str) -> np.ndarray:
        offset, kind = FIELDS[name]
        return np.array(np.frombuffer(head, np.dtype(kind).newbyteorder(orders[0]), 1, offset)[0], dtype=float)

    dim = read_header_field("dim")
    counts = dim[1 : 1 + int(dim[0])] if 1 <= dim[0] <= 7 else np.zeros(0)
    analyze = head[344:347] not in (b"n+1", b"ni1")
    sform, qform = (not analyze and read_header_field(name) > 0 for name in ("sform_code", "qform_code"))
    return Header(
        size=tuple(int(count) for count in (*counts, 1, 1, 1)[:3]),
        sform=LPS @ read_header_field("srow").reshape(3, 4) if sform else None,
        qform=LPS
        @ compute_qform(read_header_field("quaternion"), read_header_field("qoffset"), read_header_field("pixdim"))
        if qform
        else None,
        units=int(read_header_field("xyzt_units")) & 7,
        bytes=float(read_header_field("vox_offset") + np.prod(counts) * read_header_field("bitpix") / 8),
        analyze=analyze,
        voxel=tuple(float(size) for size in read_header_field("pixdim")[1:4]),
        offset=float(read_header_field("vox_offset")),
        single=head[344:347] == b"n+1",
    )


def compute_qform(quaternion: np.ndarray, offset: np.ndarray, pixdim: np.ndarray) -> np.ndarray:
    """Return the qform's affine (3, 4) from voxel index to RAS, as nifti_quatern_to_mat44 of the standard does."""
    b, c, d = quaternion
    a = 1 - quaternion @ quaternion
    if a < 1e-7:
        a, (b, c, d) = 0.0, quaternion / np.linalg.norm(quaternion)
    a = np.sqrt(a)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    sizes = np.where(pixdim[1:4] > 0, pixdim[1:4], 1.0)
    return np.column_stack([rotation * sizes * [1, 1, -1 if pixdim[0] < 0 else 1], offset])


def find_header_file(path: Path) -> Path:
    """Return the file with the header: the .hdr file next to an .img file, else ``path`` itself."""
    pair = re.sub(r"\.img(\.gz)?$", ".hdr", path.name)
    return next((file for file in (path.with_name(pair), path.with_name(f"{pair}.gz")) if file.is_file()), path)


ONE_PIECE = re.compile(r"\.(nrrd|mha)$", re.IGNORECASE)


@contextlib.contextmanager
def link_if_itk_would_read_another_file(path: Path) -> Iterator[Path]:
    """Yield a path that makes ITK read this file, and not a file with a similar name.

    If ct.nii exists, ITK silently reads it in place of ct.nii.gz. If another NIfTI file has the same name apart from
    the suffix, or if the suffix has capitals, the path is a link in a temporary folder.
    """
    ending = NIFTI_NAME.search(path.name) or ONE_PIECE.search(path.name)
    if not ending:
        yield path
        return
    stem, own = path.name[: ending.start()], {path.name}
    if NIFTI_NAME.search(path.name):
        own |= {find_header_file(path).name, find_data_file(path).name}
    twins = [name for name in os.listdir(path.parent) if NIFTI_NAME.search(name) and NIFTI_NAME.sub("", name) == stem]
    if set(twins) <= own and ending[0] == ending[0].lower():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="drasclr-scan-") as folder:
        for name in own:
            os.symlink(path.parent.resolve() / name, Path(folder) / f"{stem}{name[len(stem) :].lower()}")
        yield Path(folder) / f"{stem}{ending[0].lower()}"


def find_data_file(path: Path) -> Path:
    """Return the file with the voxels: the .img file next to a .hdr file, else ``path`` itself."""
    pair = re.sub(r"\.hdr(\.gz)?$", ".img", path.name)
    return next((file for file in (path.with_name(pair), path.with_name(f"{pair}.gz")) if file.is_file()), path)


def check_voxel_size_and_offset(path: Path, header: Header) -> None:
    """Raise ScanError if the header has no voxel size (ITK assumes 1 mm) or if the voxel data overlap the header."""
    if header.sform is None and not all(np.isfinite(size) and size > 0 for size in header.voxel):
        sizes = " x ".join(f"{size:g}" for size in header.voxel)
        raise ScanError(
            f"{path}: its header has no voxel size (pixdim {sizes}), so the size of the scan is unknown; export it "
            "again from the original scan"
        )
    if header.single and header.offset < SINGLE_OFFSET:
        begins = count_unpacked_bytes(path) - (header.bytes - header.offset)
        if begins != 348:  # with a vox_offset within the header, ITK reads the voxels from byte 348
            raise ScanError(
                f"{path}: voxels begin at byte {header.offset:g} (vox_offset), within the header, but must begin at "
                f"byte {SINGLE_OFFSET} or later; export the scan again"
            )


def check_data_size(path: Path, header: Header) -> None:
    """Raise ScanError if a NIfTI's data are cut short; ITK silently fills missing voxels with a constant."""
    data = find_data_file(path)
    found = count_unpacked_bytes(data)
    if found < header.bytes:
        raise ScanError(f"{data} is cut short: {found} of {header.bytes:.0f} bytes; copy it again")


def check_sform_and_qform(path: Path, header: Header, warnings: list[str]) -> None:
    """Check that the voxel positions in a header are consistent. Appends to ``warnings``.

    Raises:
        ScanError: the sform or the qform is sheared, or the two contradict each other.
    """
    if header.sform is None and header.qform is None:
        kind = "ANALYZE" if header.analyze else "codes of sform and qform are 0"
        warnings.append(f"the header does not give the patient's orientation ({kind}), so LPS is assumed; check the "
                        "picture, because right and left or front and back may be swapped")  # fmt: skip
        return
    for name, form in (("sform", header.sform), ("qform", header.qform)):
        if form is not None:
            check_right_angles(form, header.size, f"{path}: its {name}")
    if header.sform is not None and header.qform is not None:
        off = measure_max_corner_distance_mm(header.sform, header.qform, header.size)
        if off > CONTRADICTION:
            raise ScanError(
                f"{path}: its sform and its qform contradict each other by up to {off:.1f} mm; "
                "export it again from the original scan with only one of them"
            )
        if off > CONTRADICTION / 2:
            warnings.append(f"sform and qform place the same voxel up to {off:.2f} mm apart")


def check_affine(path: Path, header: Header, affine: np.ndarray) -> None:
    """Raise ScanError if ITK's affine (3, 4) matches neither the header's sform nor its qform within 0.1 mm."""
    if header.units in UNITS:
        raise ScanError(
            f"{path}: its header gives lengths in {UNITS[header.units]} (xyzt_units {header.units}), which no scanner "
            "writes; export it again in millimetres (xyzt_units 2)"
        )
    forms = [form for form in (header.sform, header.qform) if form is not None]
    off = min((measure_max_corner_distance_mm(form, affine, header.size) for form in forms), default=0.0)
    if off > PLACE:
        raise ScanError(
            f"{path}: its voxel sizes (pixdim) contradict its sform, by up to {off:.1f} mm at the volume's corners; "
            "export it again from the original scan with consistent values"
        )
