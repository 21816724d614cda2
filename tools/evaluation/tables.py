"""Feature and label tables of a command line, matched by subject."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.labels import NO_AND_YES, read_numbers_and_words, why_no_column
from data.layout import StoreError
from data.store import PatchStore
from data.tables import read_table, spelt
from misc.command import OneOf, Parser
from misc.files import load_array
from tools.evaluation.vectors import FILES, VECTORS, PatientVectors, Table


def read_features(path: str) -> pd.DataFrame:
    """patient_features.csv by sid. Raises StoreError."""
    table = read_table(path).set_index("sid")
    try:
        table = table.astype(np.float64)
    except ValueError:
        numbers = table.apply(pd.to_numeric, errors="coerce")
        row, column = np.argwhere(numbers.isna().to_numpy())[0]
        where = f"{table.iat[row, column]!r} in column {table.columns[column]} of sid {table.index[row]}"
        raise StoreError(
            f"{path} has {where}; features are numbers, with a point for decimals, and none is missing"
        ) from None
    if table.columns.empty:
        raise StoreError(f"{path} has no column beside sid")
    numbers = next((name for name in table.columns if name.startswith("Unnamed:")), None)
    if numbers is not None:
        raise StoreError(f"{path} has column {numbers!r}, row numbers that were saved as a column; delete it")
    wrong = ~np.isfinite(table.to_numpy())
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise StoreError(
            f"{path} has {table.iat[row, column]} in column {table.columns[column]} of sid {table.index[row]}; "
            "features are finite: extract them again, from another checkpoint if this one's training diverged"
        )
    return table


def read_patch_features(path: str | os.PathLike, sids: list[str] | None = None) -> np.ndarray:
    """Features of patches (N, L, D) float32, mapped from the disk where they lie in the wanted order.

    Args:
        path: of pred_arr_patch_full.npy; sid_arr_full.npy lies beside it.
        sids: the wanted rows (default: as they lie; see :func:`patch_sids`).

    Raises:
        StoreError: a file is missing, has another shape, lacks a subject, or has a value that is not finite.
    """
    path = Path(path)
    there = patch_sids(path)
    try:
        features = load_array(path, mapped=True)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as an array: {error}") from error
    if features.ndim != 3 or len(there) != len(features) or features.dtype.kind != "f":
        raise StoreError(
            f"{path} is {features.dtype} {features.shape} for {len(there)} subjects; it must be (subjects, patches, "
            "features)"
        )
    for row in range(len(features)):
        if not np.isfinite(features[row]).all():
            raise StoreError(f"{path} has features of sid {there[row]} that are not finite; extract them again")
    if sids is None or sids == there:
        return features
    rows = {sid: row for row, sid in enumerate(there)}
    lacking = next((sid for sid in sids if sid not in rows), None)
    if lacking is not None:
        raise StoreError(f"{path} lacks subject {lacking!r} of the patient features; give both of one extraction")
    return features[[rows[sid] for sid in sids]]


class Chosen(NamedTuple):
    """Which patient vector a tool takes, and from where."""

    kind: str  # of VECTORS
    patches: Path | None  # its patch features; None for the mean


def choose_vector(kind: str | None, features: str, patches: str | None, note: Callable[[str], None]) -> Chosen:
    """The patient vector that the flags ask for; by default the best that lies beside the features.

    Args:
        kind: --patient-vector, or None.
        features: patient_features.csv.
        patches: --patch-features, or None for the file beside it.
        note: prints a line if the default is not ``layers``.

    Raises:
        StoreError: its patch features are not there.
    """
    if kind == "mean":
        return Chosen(kind, None)
    if kind is not None:
        path = Path(patches) if patches else Path(features).with_name(FILES[kind])
        if not path.is_file():
            how = "extract_feature.py --layers writes it" if kind == "layers" else "extract_feature.py writes it"
            raise StoreError(f"--patient-vector {kind} needs {path}, which is not there; {how}")
        return Chosen(kind, path)
    for best in ("layers", "moments"):
        path = Path(features).with_name(FILES[best])
        if path.is_file() and path.with_name("sid_arr_full.npy").is_file():
            if best == "moments":
                note(f"{path.parent} has no {FILES['layers']} (extract_feature.py --layers): --patient-vector moments")
            return Chosen(best, path)
    note(f"no patch features beside {features}: --patient-vector mean, the table as it is")
    return Chosen("mean", None)


def read_vectors(chosen: Chosen, features: pd.DataFrame, sids: Sequence[str]) -> Table:
    """The patient vectors of some subjects, (N, ...).

    Args:
        chosen: of :func:`choose_vector`.
        features: patient_features.csv, of :func:`read_features`.
        sids: of the rows.

    Raises:
        StoreError: a subject has no patch features.
    """
    if chosen.patches is None:
        return features.loc[list(sids)].to_numpy()
    rows = {sid: row for row, sid in enumerate(patch_sids(chosen.patches))}
    lacking = next((sid for sid in sids if sid not in rows), None)
    if lacking is not None:
        raise StoreError(
            f"{chosen.patches} lacks subject {lacking!r} of the patient features; give both of one extraction, or "
            "--patient-vector mean"
        )
    return PatientVectors(chosen.kind, read_patch_features(chosen.patches), np.array([rows[sid] for sid in sids]))


def add_vector_flags(parser: Parser, patches: bool = True) -> None:
    """--patient-vector, and --patch-features where the tool has no such flag of its own."""
    text = (
        "features of a patient: mean of the patches', moments (mean and SD, standardised per location), or layers (the "
    )
    text += "same of every layer) (default: layers, or else moments, if their file lies beside --features)"
    parser.add_argument("--patient-vector", type=OneOf(*VECTORS), help=text)
    if patches:
        text = "its patch features (default: pred_arr_patch_full.npy or layer_arr_patch_full.npy beside --features)"
        parser.add_argument("--patch-features", metavar="NPY", help=text)


def add_label_flags(parser: Parser) -> None:
    """--order and --missing, of the labels: pairs of a column and its words, and numbers."""
    text = "words of a column in order, as grades: Overall.Stage=I,II,IIIa; other columns of words are classes"
    parser.add_argument("--order", action="append", default=[], metavar="COLUMN=A,B,C", type=_ordered_words, help=text)
    text = "numbers that stand for missing in every column of the labels, such as 999"
    parser.add_argument("--missing", nargs="+", type=float, default=[], metavar="NUMBER", help=text)


def _ordered_words(text: str) -> tuple[str, list[str]]:
    """COLUMN=A,B,C -> the column and its words."""
    name, _, words = text.partition("=")
    found = words.split(",")
    if not name or len(found) < 2 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: name two words or more, each once, as COLUMN=A,B,C")
    return name, found


def patch_sids(path: Path) -> list[str]:
    """Subjects of the rows of pred_arr_patch_full.npy, from the file beside it. Raises StoreError."""
    beside = path.with_name("sid_arr_full.npy")
    for file in (path, beside):
        if not file.is_file():
            raise StoreError(f"{file.parent} has no {file.name}; extract_feature.py writes it")
    try:
        return [str(sid) for sid in load_array(beside)]
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{beside} cannot be read as an array: {error}") from error


def healthy_and_known(labels: str, sids: list[str], column: str, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool each: who is healthy (1 in the column), and of whom it is known (1 or 0).

    Raises StoreError: no such column, other values, or fewer healthy ones than ``fewest``.
    """
    values, names, words = read_numbers_and_words(
        labels, sids, lambda text: print(f"note: {text}", file=sys.stderr) if repr(column) in text else None
    )
    if column not in names:
        raise StoreError(why_no_column(labels, column, names, "--healthy"))
    found = values[:, names.index(column)]
    known, healthy = ~np.isnan(found), found == 1
    strange = column in words and [word.lower() for word in words[column]] not in NO_AND_YES
    if strange or not np.isin(found[known], (0, 1)).all():
        raise StoreError(f"column {column!r} of {labels} must be 1 (healthy), 0 (not) or missing")
    if healthy.sum() < fewest:
        raise StoreError(f"column {column!r} of {labels} has {healthy.sum()} healthy patients; {fewest} needed")
    return healthy, known


def held_out_rows(values: np.ndarray, names: list[str], column: str, labels: str, fewest: int = 5) -> np.ndarray:
    """(N,) bool from a column of 0 and 1. Raises StoreError."""
    if column not in names:
        raise StoreError(why_no_column(labels, column, names, "--held-out"))
    held = values[:, names.index(column)]
    counts = (held == 0).sum(), (held == 1).sum()
    if sum(counts) < len(held):
        raise StoreError(f"--held-out {column} must be 0 or 1 for every subject; {labels} has another value, or none")
    if min(counts) < fewest:
        raise StoreError(
            f"--held-out {column}: {counts[0]} subjects to fit and {counts[1]} to report on; at least {fewest} of each"
        )
    return held == 1


def group_numbers(table: pd.DataFrame, column: str, sids: list[str], path: str) -> np.ndarray:
    """(N,) numbers of the patients that a column of a label table names. Raises StoreError."""
    if column not in table.columns:
        raise StoreError(f"{path} has no column {column!r} for --group-column{spelt(column, list(table.columns))}")
    if column == "sid":
        raise StoreError("--group-column sid: a sid names a scan; give the column that names its patient, or none")
    names = table.set_index("sid")[column].reindex(sids)
    unnamed = names.isna() | (names == "")
    if unnamed.any():
        raise StoreError(f"{path}: sid {unnamed.idxmax()} has no {column}; every scan needs its patient")
    numbers = pd.factorize(names)[0]
    if numbers.max() == 0:
        raise StoreError(f"{path}: column {column!r} is {names.iloc[0]!r} for everybody; --group-column names patients")
    return numbers


def is_constant(features: np.ndarray) -> bool:
    """Whether (N, D) tell no row from another."""
    return bool((features == features[:1]).all())


def other_store(features: str | os.PathLike, store: PatchStore, flag: str) -> str:
    """A sentence where a table of extract_feature.py is of another store than ``store``; else empty.

    Two stores may well have subjects of the same names, such as 0001.
    """
    try:
        made = json.loads(Path(features).with_name("features.json").read_text(encoding="utf-8"))
        theirs, where = made["store_version"], made.get("root_dir", "another place")
    except (OSError, ValueError, TypeError, KeyError):
        return ""  # a table by hand, or of embed_scan.py
    if theirs == store.version:
        return ""
    return (
        f"{features} is of the patches of {where}, and {flag} {store.layout.root} is another store, or was changed "
        "since: where a name stands for somebody else there, what is said of it is of somebody else"
    )


def refuse_leaks(tables: dict[str, pd.DataFrame], labels: Sequence[str], path: str) -> None:
    """Raise StoreError where a table of features has a column of the labels: it would be predicted from itself."""
    for name, table in tables.items():
        name = table.attrs.get("path", name)
        shared = [str(column) for column in table.columns if str(column) in set(labels) - {"sid"}]
        if shared:
            raise StoreError(
                f"{name} has column {shared[0]!r}, which {path} has too: features must not hold what is predicted"
            )


def matching_sids(tables: dict[str, pd.DataFrame], labels: pd.DataFrame, path: str) -> list[str]:
    """Subjects that every table and the labels have, sorted: folds are the same in whatever order rows are.

    Raises:
        StoreError: there are none; it tells where one table writes 007 and another 7.
    """
    first = next(iter(tables.values())).index
    known = set(labels["sid"])
    table_paths = {name: table.attrs.get("path", name) for name, table in tables.items()}
    sids = [sid for sid in sorted(first) if sid in known and all(sid in table.index for table in tables.values())]
    if sids:
        return sids
    for name, index in [*((name, table.index) for name, table in tables.items()), (path, labels["sid"])]:
        there = set(index)
        lacking = [sid for sid in first if sid not in there]
        if lacking:
            name = table_paths.get(name, name)
            hint = _alike(lacking, index)
            raise StoreError(f"{name} has none of the features' subjects, such as {lacking[0]!r}{hint}")
    raise StoreError(f"the tables and {path} have no sid in common")


def _alike(lacking: Sequence[str], there: Sequence[str]) -> str:
    """Where one table writes 007 and another 7 or 7.0, or a01 and A01, to end a message."""

    def bare(sid: str) -> str:
        return str(sid).lower().removesuffix(".0").lstrip("0") or "0"

    others = {bare(sid): sid for sid in there if sid}
    alike = next(((sid, others[bare(sid)]) for sid in lacking if bare(sid) in others), None)
    return f"; it has {alike[1]!r} for {alike[0]!r}, and a sid is text" if alike else ""


def tell_unmatched(features: Sequence[str], labels: Sequence[str], path: str, note: Callable[[str], None]) -> None:
    """A note of subjects that one of the two tables lacks: they are left out."""
    features, labels = list(features), list(labels)
    unlabelled = sorted(set(features) - set(labels))
    unknown = sorted(set(labels) - set(features))
    if unlabelled:
        hint = _alike(unlabelled, unknown)
        note(f"{len(unlabelled)} of {len(features)} subjects have no row in {path}, such as {unlabelled[0]!r}{hint}")
    if unknown:
        note(f"{len(unknown)} of {len(labels)} subjects of {path} have no features, such as {unknown[0]!r}")
