"""Read and write CSV tables keyed by sid. A sid is always text, so 007 stays 007."""

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

# A sid becomes part of a file name. Path separators, line breaks and leading dots are therefore not allowed.
_SAFE_SID = re.compile(r"[^\W_](?:[\w .+=@,-]*[\w+=@-])?")


# A cell of a column with decimal commas: a number with a comma, a whole number, or a missing value.
_DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?([eE][+-]?\d+)?|NA|N/A|nan|\.|-", re.IGNORECASE)
_NO_WIDTH = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
# Excel shows long numbers in scientific notation, for example 1.23457E+15.
_SHORTENED = re.compile(r"\d(\.\d+|,\d+)?E\+\d+")
SHOWN = 8  # maximum number of columns that a message lists


def summarize_columns(columns: Sequence[str]) -> str:
    return ", ".join(columns[:SHOWN]) + (f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else "")


def normalize_name(text: str) -> str:
    """Return a name without zero-width characters, in composed Unicode, because macOS writes decomposed Unicode."""
    return "".join(_NO_WIDTH.split(unicodedata.normalize("NFC", text))).strip()


def check_sid(sid: str) -> None:
    """Raise StoreError unless ``sid`` is safe as a part of a file name."""
    if not _SAFE_SID.fullmatch(sid) or ".." in sid or len(sid) > 128:
        raise StoreError(
            f"sid {sid!r} cannot be a file name; use at most 128 characters: letters, digits, spaces and ._+=@,- only. "
            "Begin with a letter or digit, do not end with a period or comma, and do not use two periods in a row"
        )


def read_table(
    path: str | os.PathLike, required: tuple[str, ...] = ("sid",), file_names: bool = True, one_row: bool = True
) -> pd.DataFrame:
    """Read a CSV with every cell as a string, and check its sid column.

    Args:
        path: a CSV with a header. Unnamed columns are dropped, and so are the empty cells that
            trailing commas create.
        required: columns that the table must have.
        file_names: whether each sid must be safe as part of a file name.
        one_row: whether each subject may have only one row.

    Raises:
        StoreError: the file cannot be read or has no rows; a required column is missing; or a row has more cells than
            the header. StoreError is also raised if a sid is repeated or is not safe in a file name.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path} does not exist or is not a file; give the path of a CSV table")
    try:
        table = _read_csv_as_text(path)
    except UnicodeDecodeError:
        raise StoreError(f"{path} is not UTF-8 text; save the table as CSV UTF-8") from None
    except (ValueError, OSError, csv.Error) as error:
        raise StoreError(f"{path} cannot be read as a CSV table: {error}") from error
    for name in required:
        if name not in table.columns:
            raise StoreError(
                f"{path} has no column {name!r}; its columns are {summarize_columns(table.columns)}"
                f"{suggest_fix_for_missing_column(name, table.columns)}"
            )
    if table.empty:
        raise StoreError(f"{path} has a header but no rows")
    if "sid" in table.columns:
        table["sid"] = [normalize_name(sid) for sid in table["sid"]]
    for line, sid in enumerate(table["sid"] if file_names else (), start=2):
        try:
            check_sid(sid)
        except StoreError as error:
            raise StoreError(f"{path}, line {line}: {error}") from None
    shortened = next((sid for sid in table["sid"] if _SHORTENED.fullmatch(sid)), None)
    if shortened is not None:
        raise StoreError(
            f"{path} has sid {shortened!r}, a long number that a spreadsheet has shortened; open the original table, "
            "format the column as text and save it again"
        )
    twice = table["sid"][table["sid"].duplicated()]
    if one_row and len(twice):
        raise StoreError(f"{path} has sid {twice.iloc[0]!r} more than once; keep one row per subject")
    return table


def suggest_column(name: str, columns: Sequence[str]) -> str:
    """Return the end of a message about a missing column: the most similar column name, or a list of columns."""
    near = difflib.get_close_matches(name.lower(), [column.lower() for column in columns], 1, 0.5)
    meant = next((column for column in columns if near and column.lower() == near[0]), None)
    return f"; did you mean {meant}?" if meant else f"; it has {summarize_columns(columns)}"


def suggest_fix_for_missing_column(missing_name: str, columns: Sequence[str]) -> str:
    """Return a hint on the usual reason for a missing column, or an empty string."""
    if len(columns) == 1 and any(sign in columns[0] for sign in ";\t"):
        return "; separate the cells with commas"
    other = next((column for column in columns if column.lower() == missing_name), None)
    return f"; write {missing_name} instead of {other}" if other else ""


def _read_csv_as_text(path: Path) -> pd.DataFrame:
    """Read a CSV's cells as stripped text. Blank lines are skipped; cells missing at the end of a line become empty."""
    import pandas as pd  # imported here, so that training without tables does not need pandas

    with open(path, newline="", encoding="utf-8-sig") as stream:
        delimiter = find_delimiter(stream)
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
                # If the file separates cells with semicolons or tabs, the CSV reader splits cells at decimal commas.
                other = len(header) == 1 and re.search("[;\t]", header[0])
                hint = "; separate the cells with commas" if other else ""
                raise ValueError(f"line {lines.line_num} has more cells than the header, which has {len(header)}{hint}")
            if any(cells):
                rows.append(cells[: len(header)] + [""] * (len(header) - len(cells)))
    if delimiter == ";":
        rows = replace_decimal_commas(rows)
    named = [index for index, name in enumerate(header) if name]  # pandas writes row numbers in a column without a name
    return pd.DataFrame(rows, columns=range(len(header)), dtype=str)[named].set_axis([header[n] for n in named], axis=1)


def find_delimiter(stream: TextIO) -> str:
    """Find the character that separates a table's cells, and leave the stream at the header.

    If only one of comma, semicolon and tab occurs in the header, that character is the separator; otherwise it is the
    comma. A first line of the form ``sep=;``, which Excel writes and reads, takes precedence.
    """
    first = stream.readline()
    if named := re.fullmatch(r"\"?sep=(.)\"?\s*", first, re.IGNORECASE):
        return named[1]
    stream.seek(0)
    others = [sign for sign in ";\t" if sign in first]
    return others[0] if len(others) == 1 and "," not in first else ","


def replace_decimal_commas(rows: list[list[str]]) -> list[list[str]]:
    """Replace decimal commas with points in the columns where every filled cell is a number or a missing value."""
    if not rows:
        return rows
    columns = list(zip(*rows))
    for index, column in enumerate(columns):
        if all(_DECIMAL_COMMA.fullmatch(cell) for cell in column if cell):
            columns[index] = [cell.replace(",", ".") for cell in column]
    return [list(row) for row in zip(*columns)]


# ============================================================ features


def name_feature_columns(count: int) -> list[str]:
    """Return the names of the feature columns in patient_features.csv: f000, f001, ..."""
    width = max(3, len(str(count - 1)))
    return [f"f{index:0{width}d}" for index in range(count)]


def format_features(features: Iterable[float]) -> list[str]:
    """Format features with nine significant digits, which is enough to restore the same float32."""
    return [f"{value:.9g}" for value in features]


def format_feature_table(sids: Sequence[str], features: np.ndarray) -> str:
    """Return the text of patient_features.csv, with columns sid, f000, ..., from features (N, rep_dim) float32."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["sid", *name_feature_columns(features.shape[1])])
    for sid, row in zip(sids, features):
        writer.writerow([sid, *format_features(row)])
    return stream.getvalue()
