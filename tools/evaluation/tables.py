"""Read feature and label tables, and match them by subject."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.labels import are_no_and_yes, explain_missing_column, read_numbers_and_words
from data.layout import StoreError
from data.store import PatchStore
from data.tables import read_table, suggest_column
from misc.command import OneOf, Parser
from misc.files import load_array
from tools.evaluation.vectors import FILES, VECTORS, PatientVectors, Table


def read_features(path: str) -> pd.DataFrame:
    """Read patient_features.csv into a table indexed by sid. Raises StoreError."""
    table = read_table(path).set_index("sid")
    try:
        table = table.astype(np.float64)
    except ValueError:
        numbers = table.apply(pd.to_numeric, errors="coerce")
        row, column = np.argwhere(numbers.isna().to_numpy())[0]
        where = f"{table.iat[row, column]!r} in column {table.columns[column]} of sid {table.index[row]}"
        raise StoreError(
            f"{path} has {where}, which is not a number; write plain numbers with a decimal point, such as 0.5"
        ) from None
    if table.columns.empty:
        raise StoreError(f"{path} has no feature columns, only sid")
    numbers = next((name for name in table.columns if name.startswith("Unnamed:")), None)
    if numbers is not None:
        raise StoreError(f"{path} has a column {numbers!r} with saved row numbers; delete this column")
    wrong = ~np.isfinite(table.to_numpy())
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise StoreError(
            f"{path} has {table.iat[row, column]} in column {table.columns[column]} of sid {table.index[row]}; "
            "features must be finite: extract the features again, or use another checkpoint if the training diverged"
        )
    return table


def read_patch_features(path: str | os.PathLike, sids: list[str] | None = None) -> np.ndarray:
    """Read patch features (N, L, D) float32. The array is memory-mapped if the file already has the order of ``sids``.

    Args:
        path: pred_arr_patch_full.npy; sid_arr_full.npy must be in the same folder.
        sids: subjects to return, in this order (default: the order of the file; see :func:`read_patch_sids`).

    Raises:
        StoreError: a file is missing, has the wrong shape, lacks a subject, or has a value that is not finite.
    """
    path = Path(path)
    there = read_patch_sids(path)
    try:
        features = load_array(path, mapped=True)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as an array: {error}") from error
    if features.ndim != 3 or len(there) != len(features) or features.dtype.kind != "f":
        raise StoreError(
            f"{path} has dtype {features.dtype} and shape {features.shape} for {len(there)} subjects; it must hold "
            "floats of shape (subjects, patches, features)"
        )
    for row in range(len(features)):
        if not np.isfinite(features[row]).all():
            raise StoreError(
                f"{path} has features that are not finite for sid {there[row]}; extract the features again"
            )
    if sids is None or sids == there:
        return features
    rows = {sid: row for row, sid in enumerate(there)}
    lacking = next((sid for sid in sids if sid not in rows), None)
    if lacking is not None:
        raise StoreError(
            f"{path} has no features of subject {lacking!r}, which the patient features include; "
            "use files that one run of extract_feature.py wrote"
        )
    return features[[rows[sid] for sid in sids]]


class ChosenVector(NamedTuple):
    """The patient vector that a tool uses, and the file that it is computed from."""

    kind: str  # one of VECTORS
    patches: Path | None  # file of patch features; None if kind is "mean"


def choose_patient_vector(
    kind: str | None, features_path: str, patch_features_path: str | None, note: Callable[[str], None]
) -> ChosenVector:
    """Resolve --patient-vector. The default is layers or moments if its file is next to ``features_path``, else mean.

    Args:
        kind: value of --patient-vector, or None.
        features_path: path of patient_features.csv.
        patch_features_path: value of --patch-features, or None for the file next to ``features_path``.
        note: function that prints a line of text; called if ``kind`` is None and moments or the mean are chosen.

    Raises:
        StoreError: the file of patch features does not exist.
    """
    if kind == "mean":
        return ChosenVector(kind, None)
    if kind is not None:
        path = Path(patch_features_path) if patch_features_path else Path(features_path).with_name(FILES[kind])
        if not path.is_file():
            how = "extract_feature.py --layers writes it" if kind == "layers" else "extract_feature.py writes it"
            raise StoreError(f"--patient-vector {kind} needs {path}, which does not exist; {how}")
        return ChosenVector(kind, path)
    for best in ("layers", "moments"):
        path = Path(features_path).with_name(FILES[best])
        if path.is_file() and path.with_name("sid_arr_full.npy").is_file():
            if best == "moments":
                note(
                    f"{path.parent} has no {FILES['layers']} "
                    f"(extract_feature.py --layers): using --patient-vector moments"
                )
            return ChosenVector(best, path)
    note(f"no patch features next to {features_path}; using --patient-vector mean, which is the table itself")
    return ChosenVector("mean", None)


def read_vectors(chosen: ChosenVector, features: pd.DataFrame, sids: Sequence[str]) -> Table:
    """Read the patient vectors of some subjects, (N, ...).

    Args:
        chosen: result of :func:`choose_patient_vector`.
        features: patient_features.csv as read by :func:`read_features`.
        sids: N subjects, one per row.

    Raises:
        StoreError: a subject has no patch features.
    """
    if chosen.patches is None:
        return features.loc[list(sids)].to_numpy()
    rows = {sid: row for row, sid in enumerate(read_patch_sids(chosen.patches))}
    lacking = next((sid for sid in sids if sid not in rows), None)
    if lacking is not None:
        raise StoreError(
            f"{chosen.patches} has no features of subject {lacking!r}, which the patient features include; "
            "use files that one run of extract_feature.py wrote, or --patient-vector mean"
        )
    return PatientVectors(chosen.kind, read_patch_features(chosen.patches), np.array([rows[sid] for sid in sids]))


def add_vector_flags(parser: Parser, patches: bool = True) -> None:
    """Add the flag --patient-vector, and with ``patches`` also --patch-features."""
    text = (
        "features of a subject: mean over patches, moments (mean and SD over patches, standardised per location), or "
        "layers (moments of every layer)"
    )
    text += " (default: layers, else moments, if the file is next to --features, else mean)"
    parser.add_argument("--patient-vector", type=OneOf(*VECTORS), help=text)
    if patches:
        text = (
            "file of patch features (default: layer_arr_patch_full.npy or pred_arr_patch_full.npy next to --features)"
        )
        parser.add_argument("--patch-features", metavar="NPY", help=text)


def add_label_flags(parser: Parser) -> None:
    """Add --order (pairs of a column and its words) and --missing (numbers) for label tables."""
    text = "treat the words of a column as ordered grades, such as Stage=I,II,IIIa; without --order, words are classes"
    parser.add_argument("--order", action="append", default=[], metavar="COLUMN=A,B,C", type=_parse_order, help=text)
    text = "numbers that stand for missing values in all label columns, such as 999"
    parser.add_argument("--missing", nargs="+", type=float, default=[], metavar="NUMBER", help=text)


def _parse_order(text: str) -> tuple[str, list[str]]:
    """Split COLUMN=A,B,C into the column name and the list of words."""
    name, _, words = text.partition("=")
    found = words.split(",")
    if not name or len(found) < 2 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: give two or more different words as COLUMN=A,B,C")
    return name, found


def read_patch_sids(path: Path) -> list[str]:
    """Read the subject of each row of a patch feature file from sid_arr_full.npy next to it. Raises StoreError."""
    beside = path.with_name("sid_arr_full.npy")
    for file in (path, beside):
        if not file.is_file():
            raise StoreError(f"{file.parent} has no {file.name}; extract_feature.py writes this file")
    try:
        return [str(sid) for sid in load_array(beside)]
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{beside} cannot be read as an array: {error}") from error


def read_healthy_and_known_masks(
    labels_path: str, sids: list[str], column: str, min_healthy: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read a column of zeros and ones.

    Return two (N,) bool arrays: which subjects are healthy (value 1), and which subjects have a value.

    Raises:
        StoreError: the column is missing, has values other than 0 and 1, or has fewer healthy subjects than
            ``min_healthy``.
    """
    values, names, words = read_numbers_and_words(
        labels_path, sids, lambda text: print(f"note: {text}", file=sys.stderr) if repr(column) in text else None
    )
    if column not in names:
        raise StoreError(explain_missing_column(labels_path, column, names, "--healthy"))
    found = values[:, names.index(column)]
    known, healthy = ~np.isnan(found), found == 1
    strange = column in words and not are_no_and_yes(words[column])
    if strange or not np.isin(found[known], (0, 1)).all():
        raise StoreError(f"column {column!r} of {labels_path} must be 1 (healthy), 0 (not healthy) or empty")
    if healthy.sum() < min_healthy:
        raise StoreError(
            f"column {column!r} of {labels_path} has {healthy.sum()} healthy subjects; "
            f"at least {min_healthy} are needed"
        )
    return healthy, known


def read_held_out_subjects(
    values: np.ndarray, names: list[str], column: str, label_table_path: str, min_subjects: int = 5
) -> np.ndarray:
    """Read the held-out subjects, (N,) bool, from a column of 0 and 1. Raises StoreError."""
    if column not in names:
        raise StoreError(explain_missing_column(label_table_path, column, names, "--held-out"))
    held = values[:, names.index(column)]
    counts = (held == 0).sum(), (held == 1).sum()
    if sum(counts) < len(held):
        raise StoreError(
            f"--held-out {column} must be 0 or 1 for every subject; "
            f"{label_table_path} has an empty cell or another value"
        )
    if min(counts) < min_subjects:
        raise StoreError(
            f"--held-out {column} has {counts[0]} subjects with 0 and {counts[1]} with 1; "
            f"at least {min_subjects} of each are needed"
        )
    return held == 1


def number_patients(table: pd.DataFrame, column: str, sids: list[str], path: str) -> np.ndarray:
    """Return the patient number of each subject, (N,), from a column of the label table. Raises StoreError."""
    if column not in table.columns:
        raise StoreError(
            f"{path} has no column {column!r} for --group-column{suggest_column(column, list(table.columns))}"
        )
    if column == "sid":
        raise StoreError(
            "--group-column sid names scans, not patients; give the column of the patients, or leave the flag out"
        )
    names = table.set_index("sid")[column].reindex(sids)
    unnamed = names.isna() | (names == "")
    if unnamed.any():
        raise StoreError(
            f"{path}: sid {unnamed.idxmax()} has no {column}; --group-column needs a patient for every scan"
        )
    numbers = pd.factorize(names)[0]
    if numbers.max() == 0:
        raise StoreError(
            f"{path}: column {column!r} is {names.iloc[0]!r} for every scan; --group-column must distinguish patients"
        )
    return numbers


def is_constant(features: np.ndarray) -> bool:
    """Return whether all rows of (N, D) are equal."""
    return bool((features == features[:1]).all())


def describe_store_mismatch(features_path: str | os.PathLike, store: PatchStore, store_flag: str) -> str:
    """Return a warning if extract_feature.py computed ``features_path`` from a store other than ``store``, else "".

    Different stores can have subjects with equal names, such as 0001.
    """
    try:
        made = json.loads(Path(features_path).with_name("features.json").read_text(encoding="utf-8"))
        theirs, where = made["store_version"], made.get("root_dir", "another store")
    except (OSError, ValueError, TypeError, KeyError):
        return ""  # features without features.json were made by hand or by embed_scan.py
    if theirs == store.version:
        return ""
    return (
        f"{features_path} was extracted from {where}, but {store_flag} {store.layout.root} is a different store "
        "or has changed since; results are wrong for any sid that stands for different subjects in these stores"
    )


def refuse_label_columns_in_features(
    feature_tables: dict[str, pd.DataFrame], label_columns: Sequence[str], labels_path: str
) -> None:
    """Raise StoreError if a feature table contains a label column, which would then be predicted from itself."""
    for name, table in feature_tables.items():
        name = table.attrs.get("path", name)
        shared = [str(column) for column in table.columns if str(column) in set(label_columns) - {"sid"}]
        if shared:
            raise StoreError(
                f"{name} has column {shared[0]!r}, which is also in {labels_path}; remove the column from the features"
            )


def match_sids(tables: dict[str, pd.DataFrame], labels: pd.DataFrame, path: str) -> list[str]:
    """Return the subjects that are in every table and in the labels.

    The subjects are sorted, so that the folds do not depend on the order of rows in the tables.

    Raises:
        StoreError: the tables and labels have no subject in common; the message names different spellings such as 007
            and 7.
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
            hint = _describe_sid_spelling(lacking, index)
            raise StoreError(f"no subject is in all tables: {name} lacks subject {lacking[0]!r}{hint}")
    raise StoreError(f"no subject is both in {path} and in every feature table")


def _describe_sid_spelling(missing_sids: Sequence[str], present_sids: Sequence[str]) -> str:
    """Return a hint if two tables spell a subject differently (007, 7 or 7.0; a01 or A01), to append to a message."""

    def normalize_sid(sid: str) -> str:
        return str(sid).lower().removesuffix(".0").lstrip("0") or "0"

    others = {normalize_sid(sid): sid for sid in present_sids if sid}
    alike = next(((sid, others[normalize_sid(sid)]) for sid in missing_sids if normalize_sid(sid) in others), None)
    return (
        f"; it has {alike[1]!r} instead of {alike[0]!r}, but a sid must have the same spelling in both tables"
        if alike
        else ""
    )


def report_unmatched_subjects(
    feature_sids: Sequence[str], label_sids: Sequence[str], label_table_path: str, note: Callable[[str], None]
) -> None:
    """Print a note about subjects that are in only one of the two tables and are left out."""
    feature_sids, label_sids = list(feature_sids), list(label_sids)
    unlabelled = sorted(set(feature_sids) - set(label_sids))
    unknown = sorted(set(label_sids) - set(feature_sids))
    if unlabelled:
        hint = _describe_sid_spelling(unlabelled, unknown)
        note(
            f"{len(unlabelled)} of {len(feature_sids)} subjects have no row in {label_table_path}, "
            f"such as {unlabelled[0]!r}{hint}"
        )
    if unknown:
        note(
            f"{len(unknown)} of {len(label_sids)} subjects of {label_table_path} have no features, "
            f"such as {unknown[0]!r}"
        )
