"""The table of subjects, and the flags that steps 2 to 4 share."""

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
    image: str  # absolute path; empty where the table has none
    series: str = ""  # which of a folder's DICOM series

    def check_image(self) -> None:
        """Raise ScanError where the table names no image, or one that is not there."""
        if not self.image:
            raise ScanError("the input table has no image for this subject")
        if not os.path.exists(self.image):
            raise ScanError(f"{self.image} does not exist")


def read_subjects(path: str | os.PathLike) -> list[Subject]:
    """The input table. Raises StoreError for what concerns the table as a whole."""
    table = read_table(path, required=("sid", "image"))
    folder = Path(path).resolve().parent
    return [
        Subject(sid, str(folder / image.strip()) if image.strip() else "", series.strip())
        for sid, image, series in zip(table["sid"], table["image"], table.get("series", [""] * len(table)))
    ]


def parse_flags(description: str, *add: Callable[[Parser], None], argv: list[str] | None = None) -> argparse.Namespace:
    """A command line out of functions that each add some flags to a parser."""
    parser = Parser(description)
    for flags in add:
        flags(parser)
    return parser.parse_args(argv)


def add_store(parser: Parser) -> None:
    """The flag of the patch store."""
    parser.add_argument("--root-dir", required=True, help="the patch store, made where it is missing")


def add_atlas(parser: Parser) -> None:
    """The flag of the atlas."""
    text = "atlas lung mask at 1 mm: 50 right lung, 100 left lung"
    parser.add_argument("--atlas-mask", required=True, help=text)


def add_patch_size(parser: Parser) -> None:
    """The size of patches, which steps 1 and 4 share."""
    text = "voxels; the encoder takes 32 only, leave it"
    parser.add_argument("--patch-size", type=at_least(int, 1), default=PATCH_SIZE, help=text)


def add_subjects(parser: Parser) -> None:
    """The flags of a step that works through the subjects."""
    text = (
        "table with columns sid and image, and series where a folder has several DICOM series; paths are relative "
        "to the table"
    )
    parser.add_argument("--input-csv", required=True, help=text)
    text = (
        "subjects at a time, each in a process of its own; raise it to the number of cores, memory allowing "
        "(about 2 GB each)"
    )
    workers = at_least(int, 1, "a whole number, at least 1")
    parser.add_argument("--num-workers", type=workers, default=1, help=text)
    text = "send the subjects to this Dask scheduler instead; its workers must see the same files and packages"
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help=text)
    parser.add_argument("--overwrite", action="store_true", help="make again what is already done")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 when any subject failed")
