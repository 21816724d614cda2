"""CSV tables keyed by sid. A sid is text everywhere: 007 stays 007."""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from data.layout import StoreError

if TYPE_CHECKING:
    import pandas as pd

# Names that are also file names: anything that could leave its folder, hide, or break a line is out.
_SAFE_SID = re.compile(r"[^\W_](?:[\w .+=@,-]*[\w+=@-])?")


# A number with a decimal comma, or a whole one beside it.
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?([eE][+-]?\d+)?|NA|N/A|nan|\.|-", re.IGNORECASE)
_NO_WIDTH = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
# What Excel makes of a name of many digits.
_SHORTENED = re.compile(r"\d(\.\d+|,\d+)?E\+\d+")
SHOWN = 8  # columns named in a message


def _some(columns: Sequence[str]) -> str:
    return ", ".join(columns[:SHOWN]) + (f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else "")


def plain_name(text: str) -> str:
    """A name in composed Unicode, as Linux and Windows write it and macOS does not, without characters of no width."""
    return "".join(_NO_WIDTH.split(unicodedata.normalize("NFC", text))).strip()


def check_sid(sid: str) -> None:
    """Raise StoreError unless ``sid`` is safe as a part of a file name."""
    if not _SAFE_SID.fullmatch(sid) or ".." in sid or len(sid) > 128:
        raise StoreError(
            f"sid {sid!r} cannot be a file name; use letters, digits and . _ - (it starts with a letter or digit)"
        )


def read_table(
    path: str | os.PathLike, required: tuple[str, ...] = ("sid",), file_names: bool = True, one_row: bool = True
) -> pd.DataFrame:
    """Read a CSV as text, every cell a string, and check its sid column.

    Args:
        path: with a header. Empty cells beyond it, as a spreadsheet's trailing commas, are left out; so are columns
            without a name.
        required: columns that must be there.
        file_names: whether files will be named after the sids, so that each must be safe for that.
        one_row: whether a subject may have one row only.

    Raises:
        StoreError: missing or unreadable file, missing column, more cells than columns, no rows, a
            sid that is unsafe as a file name, or twice where it may not be.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"no table at {path}")
    try:
        table = _read_text(path)
    except UnicodeDecodeError:
        raise StoreError(f"{path} is no text in UTF-8; it must be a table saved as CSV UTF-8") from None
    except (ValueError, OSError, csv.Error) as error:
        raise StoreError(f"{path} cannot be read as a CSV table: {error}") from error
    for name in required:
        if name not in table.columns:
            raise StoreError(
                f"{path} has no column {name!r}; its columns are {_some(table.columns)}{_hint(name, table.columns)}"
            )
    if table.empty:
        raise StoreError(f"{path} has a header and no rows")
    if "sid" in table.columns:
        table["sid"] = [plain_name(sid) for sid in table["sid"]]
    for line, sid in enumerate(table["sid"] if file_names else (), start=2):
        try:
            check_sid(sid)
        except StoreError as error:
            raise StoreError(f"{path}, line {line}: {error}") from None
    shortened = next((sid for sid in table["sid"] if _SHORTENED.fullmatch(sid)), None)
    if shortened is not None:
        raise StoreError(
            f"{path} has sid {shortened!r}, a long number that a spreadsheet has shortened; format the column as text, "
            "and save the table again from its source"
        )
    twice = table["sid"][table["sid"].duplicated()]
    if one_row and len(twice):
        raise StoreError(f"{path} has sid {twice.iloc[0]!r} more than once; one row a subject")
    return table


def spelt(name: str, columns: Sequence[str]) -> str:
    """What a table has in place of a column that it lacks, to end a message: the nearest name, or some of its own."""
    near = difflib.get_close_matches(name.lower(), [column.lower() for column in columns], 1, 0.5)
    meant = next((column for column in columns if near and column.lower() == near[0]), None)
    return f"; did you mean {meant}?" if meant else f"; it has {_some(columns)}"


def _hint(name: str, columns: Sequence[str]) -> str:
    """The usual reason for a missing column."""
    if len(columns) == 1 and any(sign in columns[0] for sign in ";\t"):
        return "; cells must be separated by commas"
    other = next((column for column in columns if column.lower() == name), None)
    return f"; write {name} instead of {other}" if other else ""


def _read_text(path: Path) -> pd.DataFrame:
    """A CSV's cells as they are, stripped; blank lines are left out, cells missing at a line's end are empty."""
    import pandas as pd  # here: training on a machine without it reads no table

    with open(path, newline="", encoding="utf-8-sig") as stream:
        delimiter = _delimiter(stream)
        lines = csv.reader(stream, skipinitialspace=True, strict=True, delimiter=delimiter)
        header = [name.strip() for name in next(lines, [])]
        while header and not header[-1]:
            header.pop()
        if not header:
            raise ValueError("its first line is empty")
        twice = next((name for index, name in enumerate(header) if name and name in header[:index]), None)
        if twice is not None:
            raise ValueError(f"it has column {twice!r} twice")
        rows = []
        for line in lines:
            cells = [cell.strip() for cell in line]
            if any(cells[len(header) :]):
                other = len(header) == 1 and re.search("[;\t]", header[0])  # and decimal commas
                hint = "; cells must be separated by commas" if other else ""
                raise ValueError(f"line {lines.line_num} has more cells than the {len(header)} of the header{hint}")
            if any(cells):
                rows.append(cells[: len(header)] + [""] * (len(header) - len(cells)))
    if delimiter == ";":
        rows = _with_points(rows)
    named = [index for index, name in enumerate(header) if name]  # row numbers, which pandas writes, have no name
    return pd.DataFrame(rows, columns=range(len(header)), dtype=str)[named].set_axis([header[n] for n in named], axis=1)


def _delimiter(stream: TextIO) -> str:
    """What separates a table's cells, by its header; the stream is left at it.

    A comma; or the semicolon or tab of a spreadsheet, if the header has one of them and no comma; or what a first line
    ``sep=`` says, which Excel writes and reads.
    """
    first = stream.readline()
    if named := re.fullmatch(r"\"?sep=(.)\"?\s*", first, re.IGNORECASE):
        return named[1]
    stream.seek(0)
    others = [sign for sign in ";\t" if sign in first]
    return others[0] if len(others) == 1 and "," not in first else ","


def _with_points(rows: list[list[str]]) -> list[list[str]]:
    """Cells of a table with semicolons, decimal commas as points: in columns where every number that has one is so."""
    if not rows:
        return rows
    columns = list(zip(*rows))
    for index, column in enumerate(columns):
        if all(_DECIMAL_COMMA.fullmatch(cell) for cell in column if cell):
            columns[index] = [cell.replace(",", ".") for cell in column]
    return [list(row) for row in zip(*columns)]


# ============================================================ features


def feature_columns(count: int) -> list[str]:
    """Names of the features in patient_features.csv: f000 ..."""
    width = max(3, len(str(count - 1)))
    return [f"f{index:0{width}d}" for index in range(count)]


def feature_text(features: Iterable[float]) -> list[str]:
    """Features in nine digits, which give the same float32 back."""
    return [f"{value:.9g}" for value in features]


def feature_table(sids: Sequence[str], features: np.ndarray) -> str:
    """patient_features.csv: sid, f000 ...; (N, rep_dim) float32."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["sid", *feature_columns(features.shape[1])])
    for sid, row in zip(sids, features):
        writer.writerow([sid, *feature_text(row)])
    return stream.getvalue()
