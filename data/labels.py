"""Label tables: numbers by subject."""

import os
from collections.abc import Callable

import numpy as np
import pandas as pd

from data.layout import StoreError
from data.tables import read_table, spelt

MISSING = {"", ".", "-", "na", "n/a", "nan", "null", "none", "#n/a", "<na>"}  # in lower case


def filled_and_numbers(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Of a column of text: which cells say something, and all of them as numbers, NaN where they are none."""
    text = column.str.strip()
    filled = ~text.fillna("").str.lower().isin(MISSING)
    return filled, pd.to_numeric(text.where(filled), errors="coerce")


def why_no_column(path: str | os.PathLike, column: str, names: list[str], flag: str = "") -> str:
    """Why a column is not among the numeric ones, ``names``, of a label CSV: it is not there, is empty, or has text."""
    table = read_table(path, file_names=False)
    start = f"{path} has no numeric column {column!r}{flag and f' for {flag}'}"
    if column not in table.columns:
        return start + spelt(column, names)
    filled, numbers = filled_and_numbers(table[column])
    if not filled.any():
        return f"{start}: it is empty"
    with np.errstate(over="ignore"):
        wrong = np.flatnonzero(filled & ~np.isfinite(numbers.astype(np.float32)))
    cell = f", as {table[column].iloc[wrong[0]]!r} of sid {table['sid'].iloc[wrong[0]]} is none" if len(wrong) else ""
    return f"{start}{cell}: write numbers only, 1 and 0 for yes and no, without units, with a point for decimals"


def read_labels(
    path: str | os.PathLike, sids: list[str], note: Callable[[str], None] = lambda _: None
) -> tuple[np.ndarray, list[str]]:
    """Numeric columns of a label CSV for the given subjects.

    Args:
        path: CSV with a column sid, each subject at most once; columns without a number in every
            filled cell are left out. NA, N/A, null and the like are missing values.
        sids: the wanted row order.
        note: told of each column that is left out, and why, and how many subjects the table lacks.

    Returns:
        (N, P) float32, NaN where the subject or the value is missing; the P column names.

    Raises:
        StoreError: no such file, no sid column, a sid twice, no numeric column, or no subject of
            the store in it.
    """
    table = read_table(path, file_names=False).set_index("sid")
    numeric = {}
    for name in table.columns:
        filled, values = filled_and_numbers(table[name])
        with np.errstate(over="ignore"):
            wrong = filled & ~np.isfinite(values.astype(np.float32))
        if wrong.any():
            cell, sid = table[name][wrong].str.strip().iloc[0], table.index[wrong][0]
            note(f"{path}: column {name!r} left out, {cell!r} of sid {sid} is no finite number of float32")
        elif filled.any():
            numeric[name] = values
    if not numeric:
        raise StoreError(f"{path} has no numeric column beside sid")
    lacking = [sid for sid in sids if sid not in table.index]
    if len(lacking) == len(sids):
        raise StoreError(
            f"{path} has none of the store's subjects (the store's first is {sids[0]!r}, "
            f"the table's {table.index[0]!r})"
        )
    if lacking:
        note(f"{path}: no row for {len(lacking)} of {len(sids)} subjects, the first {lacking[0]!r}")
    labels = pd.DataFrame(numeric, index=table.index).reindex(sids)
    return labels.to_numpy(dtype=np.float32), list(numeric)
