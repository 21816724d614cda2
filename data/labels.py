"""Label tables: numbers by subject."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.layout import StoreError
from data.tables import read_table, spelt

NO_AND_YES = (["no", "yes"], ["false", "true"], ["n", "y"], ["f", "t"])  # words of 0 and 1, in lower case
MOST_WORDS = 10  # different ones of a column that are classes; more are names
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


class Labels(NamedTuple):
    """Columns of a label table for some subjects."""

    values: np.ndarray  # (N, P) float32, NaN where missing; of a column of words the numbers of its classes
    names: list[str]
    classes: dict[str, list[str]]  # of columns of words: what 0, 1, ... stand for


def read_numbers_and_words(
    path: str | os.PathLike,
    sids: list[str],
    note: Callable[[str], None] = lambda _: None,
    order: Mapping[str, Sequence[str]] | None = None,
    missing: Sequence[float] = (),
) -> Labels:
    """:func:`read_labels`, and columns of a few words as classes.

    Args:
        path, sids, note: as there; ``note`` is told which number stands for which word.
        order: of a column the words in order, from 0 on; others are in alphabetical order.
        missing: numbers that stand for missing in columns of numbers, such as 999.

    Raises:
        StoreError: as there; or a column of ``order`` is missing, or has another word.
    """
    table, order = read_table(path, file_names=False).set_index("sid"), order or {}
    unknown = next((name for name in order if name not in table.columns), None)
    if unknown is not None:
        raise StoreError(f"--order {unknown}: {path} has no such column{spelt(unknown, list(table.columns))}")
    coded, classes = table.copy(), {}
    for name in table.columns:
        filled, numbers = filled_and_numbers(table[name])
        text = table[name].str.strip()
        words = text.where(filled | text.isin(order.get(name, ())), "")  # none may be a grade
        found = sorted(set(words) - {""}, key=str.lower)
        if name not in order and (numbers[filled].notna().any() or not 2 <= len(found) <= MOST_WORDS):
            continue
        if name in order:
            other = next((word for word in found if word not in order[name]), None)
            if other is not None:
                raise StoreError(f"--order {name}: {path} has {other!r} too; name every word of the column")
            found = list(order[name])
        classes[name] = found
        coded[name] = words.map({word: str(number) for number, word in enumerate(found)}).fillna("")
        told = ", ".join(f"{number} is {word}" for number, word in enumerate(found))
        none = (text.str.lower() == "none").sum() if name not in order else 0
        if none:
            told += f"; 'none' is missing, for {none} subjects: --order {name}=... makes it a grade of its own"
        note(f"column {name!r}: {told}")
    values, names = _numeric(path, coded, sids, note)
    numbers = [name not in classes for name in names]
    coded_missing = np.isin(values, np.asarray(missing, dtype=np.float32)) & numbers
    return Labels(
        np.where(coded_missing, np.float32(np.nan), values),
        names,
        {name: words for name, words in classes.items() if name in names},
    )


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
    return _numeric(path, read_table(path, file_names=False).set_index("sid"), sids, note)


def _numeric(
    path: str | os.PathLike, table: pd.DataFrame, sids: list[str], note: Callable[[str], None]
) -> tuple[np.ndarray, list[str]]:
    """As :func:`read_labels`, of a table by sid."""
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
