"""Check that the data of an NRRD or MetaImage file are complete.

ITK allocates as much memory as the header claims. ITK reads damaged compressed MetaImage data as zeros.
"""

import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocess.reading import ScanError

LONGEST_HEADER = 1 << 20  # bytes
MOST_PACKED = 1100  # largest ratio of unpacked to compressed size that deflate can reach
NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(
        ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t", "float"), 4
    ),
    **dict.fromkeys(("longlong", "long long", "int64", "int64_t", "ulonglong", "uint64", "uint64_t", "double"), 8),
}
META_HEADER = 1 << 14  # bytes at the start of a MetaImage file that are searched for header fields
_META_FIELD = re.compile(r"^([A-Za-z]+)\s*=([^\n]*)$", re.M)
META_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "FLOAT": 4, "DOUBLE": 8}


class DataSpec(NamedTuple):
    """Size, file and compression of the voxel data that a header describes."""

    bytes: int  # size of the unpacked data
    data: Path
    start: int  # offset of the data in the file, bytes
    packed: bool | None  # whether zlib or gzip compresses the data; None for text and for encodings that only ITK reads


def check_voxel_data_complete(path: Path, file_format: str) -> None:
    """Raise ScanError if the data of an NRRD or MetaImage file are missing, cut short or damaged."""
    with open(path, "rb") as stream:
        head = stream.read(LONGEST_HEADER)
    claim = (read_nrrd_spec if file_format == "NRRD" else read_meta_spec)(path, head)
    if claim is None:
        return
    if not claim.data.is_file():
        raise ScanError(f"{path}: its data file {claim.data} does not exist; put both files into the same folder")
    there = claim.data.stat().st_size - claim.start
    if claim.packed is False and there < claim.bytes:
        raise ScanError(f"{claim.data} is cut short: {there} of {claim.bytes} bytes of data; copy it again")
    if claim.bytes > MOST_PACKED * max(there, 1):
        raise ScanError(
            f"{path} declares {claim.bytes} bytes of data, but {claim.data} has only {there}; copy the scan again"
        )
    if claim.packed:
        verify_compressed_voxel_data(claim)


ANATOMICAL = ("posterior", "anterior", "superior", "inferior", "ras", "las", "lps")
UNPLACED = (
    "the header does not give the patient's orientation ({}), so LPS is assumed; check the picture, because right and "
    "left or front and back may be swapped"
)


def warn_missing_geometry(path: Path, file_format: str, warnings: list[str]) -> None:
    """Warn if an NRRD or MetaImage header lacks the patient's axes or the voxel sizes; ITK then uses defaults."""
    with open(path, "rb") as stream:
        head = stream.read(LONGEST_HEADER)
    if file_format == "NRRD":
        fields = read_nrrd_fields(head)[0]
        space = fields.get("space", "").lower()
        if not any(word in space for word in ANATOMICAL):
            given = f"space is {fields['space']}" if space else "it has no space"
            warnings.append(UNPLACED.format(given))
        sized = {"spacings", "space directions"} & set(fields)
        if not sized or ("space directions" not in fields and "nan" in fields.get("spacings", "").lower()):
            warnings.append("the header has no voxel sizes; 1 mm is assumed")
        return
    text = head[:META_HEADER].decode("latin-1")
    fields = {key.lower(): value.strip() for key, value in _META_FIELD.findall(text)}
    if not {"transformmatrix", "rotation", "orientation"} & set(fields):
        given = fields.get("anatomicalorientation", "")
        said = f"AnatomicalOrientation {given} without TransformMatrix" if given else "it has no TransformMatrix"
        warnings.append(UNPLACED.format(said))
    if not {"elementspacing", "elementsize"} & set(fields):
        warnings.append("the header has no voxel sizes (ElementSpacing); 1 mm is assumed")


def verify_compressed_voxel_data(data_spec: DataSpec) -> None:
    """Unpack the data in blocks and verify their checksum. Raise ScanError if the data are incomplete."""
    found, unpacker = 0, zlib.decompressobj(zlib.MAX_WBITS | 32)  # accepts zlib and gzip
    try:
        with open(data_spec.data, "rb") as stream:
            stream.seek(data_spec.start)
            while not unpacker.eof and (block := stream.read(1 << 18)):
                found += len(unpacker.decompress(block))
    except zlib.error as error:
        raise ScanError(f"{data_spec.data} is damaged ({error}); copy it again") from error
    if found < data_spec.bytes or not unpacker.eof:
        raise ScanError(
            f"{data_spec.data} is cut short: {found} of {data_spec.bytes} bytes after unpacking; copy it again"
        )


def count_volume_bytes(size_text: str, bytes_per_voxel: int) -> int | None:
    """Return the size in bytes of a volume with sizes like ``512 512 300``, or None for invalid text."""
    sizes = size_text.split()
    if not sizes or not all(re.fullmatch(r"\d{1,12}", size) for size in sizes):
        return None
    return int(np.prod([int(size) for size in sizes], dtype=object)) * bytes_per_voxel


def find_data_file(path: Path, name: str) -> Path | None:
    """Return the data file that a header names, or None if the header names a list or pattern of several files."""
    name = name.strip()
    return None if not name or name.startswith("LIST") or "%" in name or " " in name else path.parent / name


def read_nrrd_fields(head: bytes) -> tuple[dict[str, str], int]:
    """Return the fields of an NRRD header, and the offset of the data that follow the header."""
    end = re.search(rb"\r?\n\r?\n", head)
    text = head[: end.start() if end else len(head)].decode("latin-1")
    fields = {key.strip().lower(): value.strip() for key, value in re.findall(r"^([^:#\n]+): ?([^\n]*)$", text, re.M)}
    return fields, end.end() if end else len(head)


def read_nrrd_spec(path: Path, head: bytes) -> DataSpec | None:
    """Find the data that an NRRD header describes; return None if this module cannot check the data."""
    fields, end = read_nrrd_fields(head)
    each, encoding = NRRD_BYTES.get(fields.get("type", "")), fields.get("encoding", "").lower()
    needed = count_volume_bytes(fields.get("sizes", ""), each) if each else None
    if needed is None or {"byte skip", "line skip", "byteskip", "lineskip"} & set(fields):
        return None
    named = fields.get("data file", fields.get("datafile", ""))
    data, start = (find_data_file(path, named), 0) if named else (path, end)
    packed = {"raw": False, "gzip": True, "gz": True}.get(encoding)
    return None if data is None else DataSpec(needed, data, start, packed)


def read_meta_spec(path: Path, head: bytes) -> DataSpec | None:
    """Return the size, file and compression of a MetaImage's data, or None if only ITK can check the data."""
    end = re.search(rb"^\s*ElementDataFile\s*=[^\n]*\n?", head, re.M)
    if end is None:
        return None
    text = head[: end.end()].decode("latin-1")
    fields = {key.strip(): value.strip() for key, value in re.findall(r"^([^=\n]+)=([^\n]*)$", text, re.M)}
    each = META_BYTES.get(fields.get("ElementType", "").removeprefix("MET_"))
    needed = count_volume_bytes(fields.get("DimSize", ""), each * int(read_channel_count(fields))) if each else None
    if needed is None or fields.get("HeaderSize", "0") not in ("0", ""):
        return None
    name = fields["ElementDataFile"]
    data, start = (path, end.end()) if name.upper() == "LOCAL" else (find_data_file(path, name), 0)
    packed = fields.get("CompressedData", "False").lower().startswith("t")
    text_data = fields.get("BinaryData", "True").lower().startswith("f")
    return None if data is None else DataSpec(needed, data, start, None if text_data else packed)


def read_channel_count(header_fields: dict[str, str]) -> str:
    count = header_fields.get("ElementNumberOfChannels", "1")
    return count if re.fullmatch(r"\d{1,4}", count) else "1"
