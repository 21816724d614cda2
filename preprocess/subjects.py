"""Read the table of subjects, and define the flags that the stages share."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.tables import read_table
from misc.command import Parser, at_least
from misc.sizes import PATCH_SIZE
from preprocess.scan import ScanError


class Subject(NamedTuple):
    """One row of the input table."""

    sid: str
    image: str  # absolute path; empty if the table has no path
    series: str = ""  # the DICOM series to read if the path is a folder

    def check_image_exists(self) -> None:
        """Raise ScanError if the table has no image for the subject or the image does not exist."""
        if not self.image:
            raise ScanError("the input table has no image for this subject; fill in its image column")
        if not os.path.exists(self.image):
            raise ScanError(f"the input table names {self.image}, but this path does not exist")


def read_subjects(path: str | os.PathLike) -> list[Subject]:
    """Read the input table. Raises StoreError if the table as a whole is invalid."""
    table = read_table(path, required=("sid", "image"))
    folder = Path(path).resolve().parent
    return [
        Subject(sid, str(folder / image.strip()) if image.strip() else "", series.strip())
        for sid, image, series in zip(table["sid"], table["image"], table.get("series", [""] * len(table)))
    ]


def parse_flags(description: str, *add: Callable[[Parser], None], argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line with the flags that the functions in ``add`` define."""
    parser = Parser(description)
    for flags in add:
        flags(parser)
    return parser.parse_args(argv)


def add_store_flag(parser: Parser) -> None:
    """Add the flag for the patch store."""
    parser.add_argument("--root-dir", required=True, help="folder of the patch store; created if it does not exist")


def add_atlas_flag(parser: Parser) -> None:
    """Add the flag for the atlas."""
    text = "lung mask of the atlas at 1 mm, with labels 50 (right lung) and 100 (left lung)"
    parser.add_argument("--atlas-mask", required=True, help=text)


def add_patch_size_flag(parser: Parser) -> None:
    """Add the flag --patch-size of patchify_atlas.py and patchify_images.py."""
    text = "patch edge in voxels; keep 32, because the encoder accepts no other size"
    parser.add_argument("--patch-size", type=at_least(int, 1), default=PATCH_SIZE, help=text)


def add_subject_flags(parser: Parser) -> None:
    """Add the flags of a stage that processes the subjects."""
    text = (
        "table with the columns sid and image, plus series if a folder has several DICOM series; image paths are "
        "relative to the table's folder"
    )
    parser.add_argument("--input-csv", required=True, help=text)
    text = (
        "number of subjects processed at the same time, each in a separate process of about 2 GB; raise it up to the "
        "number of cores if the memory suffices"
    )
    workers = at_least(int, 1, "a whole number, at least 1")
    parser.add_argument("--num-workers", type=workers, default=1, help=text)
    text = (
        "process the subjects on the workers of this Dask scheduler; the workers need the same files and packages as "
        "this machine"
    )
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs instead of skipping them")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if any subject failed")
