"""Read the labels, covariates and patients of subjects, and find the labels that can be predicted."""

import argparse
import sys

import numpy as np
import pandas as pd

from data.labels import are_no_and_yes, explain_missing_column, read_numbers_and_words
from data.layout import StoreError
from data.tables import suggest_column
from tools.evaluation.judge import Label
from tools.evaluation.kinds import (
    FEWEST,
    find_label_problem,
    find_missing_code,
    find_survival_problem,
    guess_kind_of_words,
    guess_label_kind,
)
from tools.evaluation.splits import find_patient_in_both_parts, find_sids_that_look_like_one_patient
from tools.evaluation.tables import number_patients, read_held_out_subjects

STAGES = ("GOLD", "finalGold")  # columns of the COPD stage, which is derived from spirometry
SPIROMETRY = ("FEV1pp", "FEV1_FVC")  # how the names of the spirometry columns begin


def print_note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


class EvaluatedSubjects:
    """Labels, covariates and patients of the subjects that are in every table.

    Args:
        args: arguments of tools/evaluate.py.
        sids: N subjects.
        table: the label table as text.
    """

    def __init__(self, args: argparse.Namespace, sids: list[str], table: pd.DataFrame):
        self.path = args.labels
        asked = {*(args.columns or ()), *args.covariates, args.held_out, args.time_column, args.event_column}
        told = [f"column {name!r}" for name in filter(None, asked)] if args.columns or args.time_column else [""]

        def print_note_on_used_columns(text: str) -> None:
            if args.group_column and f"column {args.group_column!r}" in text:
                return  # omit notes about the patient column, because it is not a label
            if "column" not in text or any(name in text for name in told):
                print_note(text)

        labels = read_numbers_and_words(args.labels, sids, print_note_on_used_columns, dict(args.order), args.missing)
        self.names, self.words = labels.names, labels.classes
        self.order = set(dict(args.order))
        self.values = labels.values.astype(np.float64)
        self.held_out = (
            read_held_out_subjects(labels.values, self.names, args.held_out, args.labels) if args.held_out else None
        )
        self.covariates = np.column_stack(
            [np.empty((len(sids), 0)), *(self.get_column(name) for name in args.covariates)]
        )
        for name, values in zip(args.covariates, self.covariates.T):
            _note_missing_value_code(name, values[~np.isnan(values)])
        self.known = ~np.isnan(self.covariates).any(axis=1)
        if not self.known.all():
            first = sids[int(np.argmin(self.known))]
            print_note(
                f"{(~self.known).sum()} of {len(sids)} subjects lack a covariate and are left out, such as {first!r}"
            )
        if args.group_column:
            self.groups = number_patients(table, args.group_column, sids, args.labels)
            both = None if self.held_out is None else find_patient_in_both_parts(self.groups, self.held_out)
            if both is not None:
                fitted, reported = (sids[row] for row in both)
                raise StoreError(
                    f"--held-out {args.held_out}: sids {fitted!r} (0) and {reported!r} (1) are scans of one patient, "
                    "who would be in both the training part and the held-out part; give all scans of a patient the "
                    f"same value in {self.path}"
                )
        else:
            self.groups = np.arange(len(sids))
            alike = find_sids_that_look_like_one_patient(sids)
            if alike:
                print_note(
                    f"sids {', '.join(alike[:3])} look like scans of one patient; give --group-column, or a model may "
                    "be tested on patients that it was fitted to, which makes every label look predictable"
                )

    def get_column(self, name: str) -> np.ndarray:
        """Return the values of a numeric column, (N,), which are NaN where unknown. Raises StoreError."""
        if name in self.names:
            return self.values[:, self.names.index(name)]
        raise StoreError(explain_missing_column(self.path, name, self.names))

    def split_into_fitted_and_held_out(self, known: np.ndarray, folds: int) -> list[tuple[str, np.ndarray, int, int]]:
        """Split the k rows that are ``known`` into the part that models are fitted to and the held-out part.

        Returns:
            With --held-out, the training part and the held-out part; otherwise one part with all rows. Each part is
            a tuple: the beginning of an error message, a mask (k,) bool of the part's rows, the number of folds for
            :func:`find_label_problem`, and the minimum number of patients.
        """
        if self.held_out is None:
            return [("", np.ones(known.sum(), dtype=bool), folds, folds)]
        held = self.held_out[known]
        return [("in the training part, ", ~held, 2, 2 * FEWEST), ("in the held-out part, ", held, 1, FEWEST)]


def make_labels(cohort: EvaluatedSubjects, args: argparse.Namespace) -> list[tuple[Label, np.ndarray]]:
    """Return the labels to predict, each with a mask (N,) of the subjects that have a value. Raises StoreError."""
    taken = {args.held_out, args.group_column, args.time_column, args.event_column, *args.covariates}
    unknown = next((name for name in args.kind if name not in cohort.names), None)
    if unknown:
        raise StoreError(
            f"--kind {unknown}: {cohort.path} has no numeric column with this name"
            f"{suggest_column(unknown, cohort.names)}"
        )
    idle = next((name for name in args.kind if args.columns and name not in args.columns), None)
    if idle:
        raise StoreError(
            f"--kind {idle} has no effect, because {idle} is not predicted; use --columns "
            f"{' '.join(args.columns)} {idle}"
        )
    wanted = args.columns or ([] if args.time_column else [name for name in cohort.names if name not in taken])
    labels = []
    for name in wanted:
        values = cohort.get_column(name)
        known = ~np.isnan(values) & cohort.known
        _note_missing_value_code(name, values[known])
        if not args.columns and (reason := find_reason_to_skip(name, values[known])):
            print_note(f"column {name!r} left out: {reason}; give --columns {name} to predict it anyway")
            continue
        kind = (
            args.kind.get(name)
            or guess_kind_of_words(name, cohort.words, cohort.order)
            or (guess_label_kind(values[known]) if known.any() else "regression")
        )
        reason = explain_unusable_labels(cohort, values, known, kind, args.folds)
        reason = reason or ("" if name in args.kind else find_missing_value_code_problem(values[known]))
        source = next((one for one in args.covariates if name in STAGES and one.startswith(SPIROMETRY)), None)
        if source:
            reason = f"it is derived from --covariates {source}, so it would be predicted from itself"
        if reason and args.columns:
            raise StoreError(f"{cohort.path}: column {name!r} cannot be predicted: {reason}")
        if reason:
            print_note(f"column {name!r} left out: {reason}")
            continue
        if args.columns and np.isnan(values).any():
            print_note(f"column {name!r} has a value for {(~np.isnan(values)).sum()} of {len(values)} subjects")
        classes = tuple(np.unique(values[known])) if kind == "class" else ()
        target = np.searchsorted(classes, values[known]).astype(float) if classes else values[known]
        labels.append((Label(name, kind, target, classes), known))
        stages = make_stage_label(cohort, name, values, known, args.folds) if kind == "grade" else None
        labels += [stages] if stages else []
    if args.time_column:
        words = cohort.words.get(args.event_column)
        ordered = args.event_column in cohort.order and len(words or ()) == 2
        if words and not ordered and not are_no_and_yes(words):
            raise StoreError(
                f"{cohort.path}: --event-column {args.event_column} has the words {', '.join(words)}; write 1 or yes "
                "if the event was observed, 0 or no if not, or give --order "
                f"{args.event_column}=CENSORED,OBSERVED with these words"
            )
        both = np.stack([cohort.get_column(args.time_column), cohort.get_column(args.event_column)], axis=1)
        known = ~np.isnan(both).any(axis=1) & cohort.known
        reason = explain_unusable_labels(cohort, both, known, "survival", args.folds)
        if reason:
            flags = f"--time-column {args.time_column}, --event-column {args.event_column}"
            raise StoreError(f"{cohort.path}: {flags}: {reason}")
        labels.append((Label(args.event_column, "survival", both[known], time=args.time_column), known))
    if not labels:
        raise StoreError(f"{cohort.path} has no label column that can be predicted for these subjects")
    return labels


def find_reason_to_skip(name: str, values: np.ndarray) -> str:
    """Return why a column that --columns does not name is probably not a label, or "" if the column may be a label."""
    lower = name.lower().replace("-", "_")
    if lower in ("held_out", "heldout", "split", "fold", "test", "train") and len(np.unique(values)) <= 10:
        return f"its name suggests a split into training and test subjects (--held-out {name})"
    if lower.startswith(("survival", "follow")) and (values >= 0).all():
        return f"its name suggests a follow-up time (--time-column {name}, with --event-column)"
    return ""


def explain_unusable_labels(
    cohort: EvaluatedSubjects, values: np.ndarray, has_value: np.ndarray, label_kind: str, folds: int
) -> str:
    """Return why labels (N, ...) cannot be predicted, or "" if they can; check fitted and held-out subjects.

    Args:
        has_value: (N,) bool, rows that have a value.
    """
    parts = cohort.split_into_fitted_and_held_out(has_value, folds)
    for words, rows, fewest, patients in parts:
        own, there = values[has_value][rows], len(np.unique(cohort.groups[has_value][rows]))
        if label_kind == "survival":
            reason = find_survival_problem(*own.T, FEWEST if words else folds, bool(words)) if rows.any() else ""
        else:
            reason = find_label_problem(own, label_kind, fewest) if len(own) >= patients or not words else ""
        if not reason and there < patients:
            reason = f"{there} patients have a value, fewer than the {folds} folds"
            if words:
                reason = f"{there} patients have a value; at least {patients} are needed"
        if reason:
            return words + reason
    if label_kind == "class" and cohort.held_out is not None:
        fitted, reported = (set(values[has_value][rows]) for _, rows, *_ in parts)
        if fitted != reported:
            return f"the class {min(fitted ^ reported):g} occurs only in one part of --held-out"
    return ""


def _note_missing_value_code(column: str, column_values: np.ndarray) -> None:
    """Print a note if values (n,) contain a number that often stands for a missing value."""
    code = find_missing_code(column_values)
    if code is not None:
        count = int((column_values == code).sum())
        print_note(
            f"column {column!r} has {code:g} for {count} subjects; if that means missing, give --missing {code:g} or "
            "leave these cells empty"
        )


def find_missing_value_code_problem(values: np.ndarray) -> str:
    """Return a description of the problem if values (n,) are 0, 1 and a code for missing values, else ""."""
    code = find_missing_code(values)
    if code is None or not set(values) - {code} <= {0.0, 1.0}:
        return ""
    return f"it has {code:g} in addition to 0 and 1; give --missing {code:g} if that means missing, else set --kind"


def make_stage_label(
    cohort: EvaluatedSubjects, name: str, values: np.ndarray, known: np.ndarray, folds: int
) -> tuple[Label, np.ndarray] | None:
    """Return a label for predicting a COPD stage from predicted spirometry, or None if this is not possible."""
    columns = [next((other for other in cohort.names if other.startswith(start)), None) for start in SPIROMETRY]
    if name not in STAGES or None in columns:
        return None
    spirometry = np.stack([cohort.get_column(column) for column in columns], axis=1)
    known = known & (spirometry > 0).all(axis=1)  # also excludes NaN, because NaN > 0 is False
    for what in (values, *spirometry.T):
        reason = explain_unusable_labels(cohort, what, known, "regression", folds)
        if reason:
            print_note(
                f"{name} is not predicted through spirometry: in the subjects with {', '.join(columns)}, {reason}"
            )
            return None
    target = np.column_stack([values[known], np.log10(spirometry[known])])
    return Label(f"{name}_from_spirometry", "stage", target), known
