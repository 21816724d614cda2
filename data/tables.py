"""CSV tables keyed by sid. A sid is text everywhere: 007 stays 007."""

import os
import re
from pathlib import Path

import pandas as pd

from data.layout import StoreError

# Names that are also file names: anything that could leave its folder, hide, or break a line is out.
_SAFE_SID = re.compile(r"[^\W_](?:[\w .+=@,-]*[\w+=@-])?")


def check_sid(sid: str) -> None:
    """Raise StoreError unless ``sid`` is safe as a part of a file name."""
    if not _SAFE_SID.fullmatch(sid) or ".." in sid or len(sid) > 128:
        raise StoreError(
            f"sid {sid!r} cannot be a file name; use letters, digits and . _ - (it starts with a letter or digit)"
        )


def read_table(path: str | os.PathLike, required: tuple[str, ...] = ("sid",)) -> pd.DataFrame:
    """Read a CSV as text, every cell a string, and check its sid column.

    Raises:
        StoreError: missing or unreadable file, missing column, no rows, a sid that is empty, twice,
            or unsafe as a file name.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"no table at {path}")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (ValueError, OSError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        raise StoreError(f"{path} cannot be read as a CSV table: {error}") from error
    table.columns = [str(name).strip() for name in table.columns]
    for name in required:
        if name not in table.columns:
            raise StoreError(f"{path} has no column {name!r}; its columns are {', '.join(table.columns)}")
    if table.empty:
        raise StoreError(f"{path} has a header and no rows")
    table["sid"] = table["sid"].str.strip()
    for line, sid in enumerate(table["sid"], start=2):
        try:
            check_sid(sid)
        except StoreError as error:
            raise StoreError(f"{path}, line {line}: {error}") from None
    twice = table["sid"][table["sid"].duplicated()]
    if len(twice):
        raise StoreError(f"{path} has sid {twice.iloc[0]!r} more than once; one row a subject")
    return table
