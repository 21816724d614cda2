"""Recognise a file's format by its first bytes, and check that a gzip file is complete."""

import gzip
import re
import zlib
from pathlib import Path

from preprocess.reading import ScanError

GZIP = b"\x1f\x8b"
HEAD = 544  # bytes read from a file; enough for the longest header, NIfTI-2 with its 4-byte extension field

NIFTI_NAME = re.compile(r"\.(nii|hdr|img|nia)(\.gz)?$", re.IGNORECASE)
NAMES = {  # file names by which ITK selects its reader
    "NIfTI": NIFTI_NAME,
    "NRRD": re.compile(r"\.(nrrd|nhdr)$", re.IGNORECASE),
    "MetaImage": re.compile(r"\.((?i:mha)|mhd)$"),
}
SUFFIX = {"NIfTI": ".nii", "NRRD": ".nrrd", "MetaImage": ".mha"}
STRANGERS = {  # first bytes of files that are often mistaken for scans, and what the error message says about them
    b"\x1f\x8b": "is compressed with gzip twice; unpack it once with gunzip",
    b"PK\x03\x04": "is a ZIP archive; unpack it and use the scan inside",
    b"version https://git-lfs": "is a Git LFS pointer, not the scan itself; run git lfs pull",
    b"/annex/objects/": "is a git-annex pointer, not the scan itself; run git annex get",
    b"<": "is a web page or other text, not a scan; if you downloaded it, log in and download it again",
    b"%PDF": "is a PDF document, not a scan; use the CT itself",
    b"\x89PNG": "is a picture (PNG), not a scan; use the CT that it was made from",
    b"\xff\xd8\xff": "is a picture (JPEG), not a scan; use the CT that it was made from",
    b"\x93NUMPY": "is a NumPy array, which has no voxel sizes; use the scan that it was made from",
    b"\xfd7zXZ": "is compressed with xz; unpack it",
    b"BZh": "is compressed with bzip2; unpack it",
    b"7z\xbc\xaf": "is a 7z archive; unpack it and use the scan inside",
    b"Rar!": "is a RAR archive; unpack it and use the scan inside",
}


def read_head_and_detect_gzip(path: Path) -> tuple[bytes, bool]:
    """Return the first bytes of a file after unpacking (``b""`` if this fails), and whether the file is gzip."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD)
    if head[:2] != GZIP:
        return head, False
    try:
        with gzip.open(path) as stream:
            return stream.read(HEAD), True
    except (OSError, EOFError, zlib.error):
        return b"", True


def detect_format(head: bytes) -> str:
    """Return the format: ``DICOM``, ``NIfTI``, ``NRRD``, ``MetaImage``, or ``""`` for any other format."""
    if is_dicom(head):
        return "DICOM"
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if (348 in sizes and len(head) >= 348) or (540 in sizes and head[4:7] in (b"n+2", b"ni2")):
        return "NIfTI"  # ANALYZE 7.5 has no marker and counts as NIfTI
    if head[:4] == b"NRRD":
        return "NRRD"
    if re.match(rb"\s*(ObjectType|NDims|Comment|AcquisitionDate)\s*=", head):
        return "MetaImage"
    return ""


def is_dicom(head: bytes) -> bool:
    """Return whether a file's first bytes are DICOM: a preamble or, from older software, group 0002 or 0008."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x08\x00", b"\x02\x00") and head[3:4] == b"\x00")


def check_file_suffix(path: Path, kind: str, packed: bool) -> None:
    """Raise ScanError, with a suggested file name, if ITK cannot select a reader by the file's name."""
    if not kind or kind == "DICOM":
        return
    if packed and kind != "NIfTI":
        raise ScanError(f"{path} is a {kind} file compressed with gzip, which is not supported; unpack it with gunzip")
    suffix = SUFFIX[kind] + (".gz" if packed else "")
    if not NAMES[kind].search(path.name):
        stem = re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)
        raise ScanError(f"{path} is {kind}, but ITK cannot recognise this from its name; use a name that ends in "
                        f"{suffix}, for example {stem}{suffix}")  # fmt: skip
    if packed and not path.name.lower().endswith(".gz"):
        raise ScanError(
            f"{path} is compressed with gzip, but its name does not end in .gz; rename it to {path.name}.gz"
        )


def refuse_foreign_file(path: Path, head: bytes, packed: bool) -> None:
    """Raise ScanError with advice for a file that cannot be a scan.

    For all other files, ITK decides later whether they can be read.
    """
    if not head and not packed:
        raise ScanError(f"{path} is empty (0 bytes); copy it again")
    for start, words in STRANGERS.items():
        if head.lstrip().startswith(start):
            raise ScanError(f"{path} {words}")
    if packed and head[257:262] == b"ustar":
        raise ScanError(f"{path} is a tar archive; unpack it and use the scan inside")


def count_unpacked_bytes(path: Path) -> int:
    """Return the size of a file in bytes, for a gzip file after unpacking it and verifying its checksum.

    Unpacking takes about 5 ms/MB, once per stage.

    Raises:
        ScanError: the gzip stream is cut short or damaged.
    """
    with open(path, "rb") as stream:
        if stream.read(2) != GZIP:
            return path.stat().st_size
    found = 0
    try:
        with gzip.open(path) as stream:
            while block := len(stream.read(1 << 20)):
                found += block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ScanError(f"{path} is cut short or damaged ({error}); copy it again") from error
    return found
