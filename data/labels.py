"""Read label tables: one row per subject, with columns of numbers or words."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.layout import StoreError
from data.tables import read_table, suggest_column

NO_AND_YES = (  # pairs of words for 0 and 1, in lower case
    *(["no", "yes"], ["false", "true"], ["n", "y"], ["f", "t"], ["nein", "ja"], ["nee", "ja"], ["nej", "ja"]),
    *(["non", "oui"], ["no", "si"], ["no", "sí"], ["não", "sim"]),
)
MOST_WORDS = 10  # a column with more distinct words than this is assumed to contain names, not classes
MISSING = {"", ".", "-", "na", "n/a", "nan", "null", "none", "#n/a", "<na>"}  # in lower case


def find_filled_cells_and_numbers(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Find the filled cells of a text column and convert all cells to numbers; NaN if a cell is not a number."""
    text = column.str.strip()
    filled = ~text.fillna("").str.lower().isin(MISSING)
    return filled, pd.to_numeric(text.where(filled), errors="coerce")


def explain_missing_column(path: str | os.PathLike, column: str, names: list[str], flag: str = "") -> str:
    """Explain why a column is not among a label CSV's numeric columns ``names``: it is missing, empty or text."""
    table = read_table(path, file_names=False)
    start = f"{path} has no numeric column {column!r}{flag and f' for {flag}'}"
    if column not in table.columns:
        return start + suggest_column(column, names)
    filled, numbers = find_filled_cells_and_numbers(table[column])
    if not filled.any():
        return f"{start}: it is empty"
    with np.errstate(over="ignore"):
        wrong = np.flatnonzero(filled & ~np.isfinite(numbers.astype(np.float32)))
    cell = f": sid {table['sid'].iloc[wrong[0]]} has {table[column].iloc[wrong[0]]!r}" if len(wrong) else ""
    return f"{start}{cell}; write plain numbers with a decimal point and no units, and 1 and 0 for yes and no"


def are_no_and_yes(words: Sequence[str]) -> bool:
    """Return whether ``words`` are a known word for no and a known word for yes, in this order."""
    return [word.lower() for word in words] in NO_AND_YES


class Labels(NamedTuple):
    """Columns of a label table for a list of subjects."""

    values: np.ndarray  # (N, P) float32, NaN where missing; text columns hold class numbers
    names: list[str]
    classes: dict[str, list[str]]  # for each text column, the words that 0, 1, ... stand for


def read_numbers_and_words(
    path: str | os.PathLike,
    sids: list[str],
    note: Callable[[str], None] = lambda _: None,
    order: Mapping[str, Sequence[str]] | None = None,
    missing: Sequence[float] = (),
) -> Labels:
    """Read labels like :func:`read_labels`, and also convert columns with a few distinct words to classes.

    Args:
        path, sids, note: as in :func:`read_labels`; ``note`` also receives the meaning of each class number.
        order: for each column, its words in the order of their class numbers, from 0. In columns that are
            not in ``order``, words are numbered alphabetically. The words "no" and "yes", in several languages, are
            always numbered 0 and 1.
        missing: numbers that stand for missing values in numeric columns, for example 999.

    Raises:
        StoreError: as in :func:`read_labels`; or a column of ``order`` is missing or contains an unlisted word.
    """
    table, order = read_table(path, file_names=False).set_index("sid"), order or {}
    unknown = next((name for name in order if name not in table.columns), None)
    if unknown is not None:
        raise StoreError(
            f"--order {unknown}: {path} does not have this column{suggest_column(unknown, list(table.columns))}"
        )
    coded, classes = table.copy(), {}
    for name in table.columns:
        filled, numbers = find_filled_cells_and_numbers(table[name])
        text = table[name].str.strip()
        # The text 'none' counts as a missing value unless ``order`` lists this text.
        words = text.where(filled | text.isin(order.get(name, ())), "")
        found = sorted(set(words) - {""}, key=str.lower)
        if name not in order and (numbers[filled].notna().any() or not 2 <= len(found) <= MOST_WORDS):
            continue
        if name in order:
            other = next((word for word in found if word not in order[name]), None)
            if other is not None:
                raise StoreError(f"--order {name}: {path} also has {other!r}; list every word of the column")
            found = list(order[name])
        elif are_no_and_yes(found[::-1]):  # code "no" as 0 even if it sorts after "yes", as "nein" does after "ja"
            found.reverse()
        classes[name] = found
        coded[name] = words.map({word: str(number) for number, word in enumerate(found)}).fillna("")
        told = ", ".join(f"{number} is {word}" for number, word in enumerate(found))
        none = (text.str.lower() == "none").sum() if name not in order else 0
        if none:
            told += f"; 'none' counts as missing for {none} subjects (use --order {name}=... to make it a grade)"
        note(f"column {name!r}: {told}")
    values, names = select_numeric_columns(path, coded, sids, note)
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
    """Read the numeric columns of a label CSV for the given subjects.

    Args:
        path: CSV with a column sid and at most one row per subject. A column is skipped if a filled
            cell is not a number. NA, N/A, null and similar words are missing values.
        sids: subjects in the order of the returned rows.
        note: function that receives a message for each skipped column and for subjects without a row.

    Returns:
        (N, P) float32, NaN where the subject or the value is missing; and the P column names.

    Raises:
        StoreError: the file or its sid column is missing, a sid is repeated, there is no numeric
            column, or the table has none of the store's subjects.
    """
    return select_numeric_columns(path, read_table(path, file_names=False).set_index("sid"), sids, note)


def select_numeric_columns(
    path: str | os.PathLike, table: pd.DataFrame, sids: list[str], note: Callable[[str], None]
) -> tuple[np.ndarray, list[str]]:
    """Select the numeric columns as :func:`read_labels` does, from a table indexed by sid."""
    numeric = {}
    for name in table.columns:
        filled, values = find_filled_cells_and_numbers(table[name])
        with np.errstate(over="ignore"):
            wrong = filled & ~np.isfinite(values.astype(np.float32))
        if wrong.any():
            cell, sid = table[name][wrong].str.strip().iloc[0], table.index[wrong][0]
            note(f"{path}: column {name!r} left out: {cell!r} of sid {sid} is not a finite float32 number")
        elif filled.any():
            numeric[name] = values
    if not numeric:
        raise StoreError(f"{path} has no numeric column except sid")
    lacking = [sid for sid in sids if sid not in table.index]
    if len(lacking) == len(sids):
        raise StoreError(
            f"{path} has none of the store's subjects; the first sid is {sids[0]!r} in the store and "
            f"{table.index[0]!r} in the table"
        )
    if lacking:
        note(f"{path}: no row for {len(lacking)} of {len(sids)} subjects, for example {lacking[0]!r}")
    labels = pd.DataFrame(numeric, index=table.index).reindex(sids)
    return labels.to_numpy(dtype=np.float32), list(numeric)
