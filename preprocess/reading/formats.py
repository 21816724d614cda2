"""What a file is by its first bytes, and whether all of it is there."""

import gzip
import re
import zlib
from pathlib import Path

from preprocess.reading import ScanError

GZIP = b"\x1f\x8b"
HEAD = 544  # bytes; the longest header that is looked at, NIfTI-2's, with its end mark

NIFTI_NAME = re.compile(r"\.(nii|hdr|img|nia)(\.gz)?$", re.IGNORECASE)
NAMES = {  # the names by which ITK finds the reader
    "NIfTI": NIFTI_NAME,
    "NRRD": re.compile(r"\.(nrrd|nhdr)$", re.IGNORECASE),
    "MetaImage": re.compile(r"\.((?i:mha)|mhd)$"),
}
SUFFIX = {"NIfTI": ".nii", "NRRD": ".nrrd", "MetaImage": ".mha"}
STRANGERS = {  # first bytes of files that are taken for scans, and what to do
    b"\x1f\x8b": "is packed with gzip twice; unpack it once with gunzip",
    b"PK\x03\x04": "is a ZIP archive; unpack it and give the scan inside",
    b"version https://git-lfs": "is a pointer of Git LFS, the scan itself was not fetched; run git lfs pull",
    b"/annex/objects/": "is a pointer of git-annex, the scan itself was not fetched; run git annex get",
    b"<": "is a web page or another text, no scan; the download gave a page instead of the file, repeat it logged in",
    b"%PDF": "is a PDF document, no scan",
    b"\x89PNG": "is a picture (PNG), no scan; give the CT that it was made from",
    b"\xff\xd8\xff": "is a picture (JPEG), no scan; give the CT that it was made from",
    b"\x93NUMPY": "is a NumPy array, which has no voxel sizes; give the scan that it was made from",
    b"\xfd7zXZ": "is packed with xz; unpack it",
    b"BZh": "is packed with bzip2; unpack it",
    b"7z\xbc\xaf": "is a 7z archive; unpack it and give the scan inside",
    b"Rar!": "is a RAR archive; unpack it and give the scan inside",
}


def head_of(path: Path) -> tuple[bytes, bool]:
    """The first bytes of a file, unpacked, and whether it is gzip; ``b""`` where unpacking fails."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD)
    if head[:2] != GZIP:
        return head, False
    try:
        with gzip.open(path) as stream:
            return stream.read(HEAD), True
    except (OSError, EOFError, zlib.error):
        return b"", True


def kind_of(head: bytes) -> str:
    """``DICOM``, ``NIfTI``, ``NRRD``, ``MetaImage``, or ``""`` for what is none of them."""
    if is_dicom(head):
        return "DICOM"
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if (348 in sizes and len(head) >= 348) or (540 in sizes and head[4:7] in (b"n+2", b"ni2")):
        return "NIfTI"  # ANALYZE 7.5 too, which has no mark of its own
    if head[:4] == b"NRRD":
        return "NRRD"
    if re.match(rb"\s*(ObjectType|NDims|Comment|AcquisitionDate)\s*=", head):
        return "MetaImage"
    return ""


def is_dicom(head: bytes) -> bool:
    """DICOM with its preamble, or, as older software writes it, beginning with group 0002 or 0008."""
    return head[128:132] == b"DICM" or (head[:2] in (b"\x08\x00", b"\x02\x00") and head[3:4] == b"\x00")


def check_name(path: Path, kind: str, packed: bool) -> None:
    """Raise ScanError where ITK would not find the reader by the file's name, with the name that it needs."""
    if not kind or kind == "DICOM":
        return
    suffix = SUFFIX[kind] + (".gz" if packed else "")
    if not NAMES[kind].search(path.name):
        stem = re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)
        raise ScanError(f"{path} is {kind}, but its name does not say so; give it a name that ends in {suffix}: "
                        f"{stem}{suffix}")  # fmt: skip
    if packed and not path.name.lower().endswith(".gz"):
        if kind == "NIfTI":
            raise ScanError(f"{path} is gzip, but its name does not say so; it is gzip: rename it to {path.name}.gz")
        raise ScanError(f"{path} is {kind} packed with gzip as a whole, which is not read; unpack it with gunzip")


def check_stranger(path: Path, head: bytes, packed: bool) -> None:
    """Raise ScanError for files that are no scan at all, with what to do; others may still be a format of ITK's."""
    if not head and not packed:
        raise ScanError(f"{path} is empty (0 bytes); copy it again")
    for start, words in STRANGERS.items():
        if head.lstrip().startswith(start):
            raise ScanError(f"{path} {words}")
    if packed and head[257:262] == b"ustar":
        raise ScanError(f"{path} is a tar archive; unpack it and give the scan inside")


def unpacked_bytes(path: Path) -> int:
    """Bytes in a file, unpacked where it is gzip, whose checksum is compared (about 5 ms/MB, once a step).

    Raises:
        ScanError: the gzip stream is cut or damaged.
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
