"""How well do patient features predict a label? Cross-validated figures with intervals, beside what needs no network.

    python tools/evaluate.py --features ssl_exp/NAME/patch_rep/0020/patient_features.csv \\
        --labels labels.csv --columns FEV1pp GOLD --baselines /data/patches --out-dir evaluation
    python tools/evaluate.py --features F --labels labels.csv --time-column years --event-column died --out-dir O

A column's kind is recognised: two values are classes (AUROC, balanced accuracy), a few whole numbers grades
(quadratic kappa, exact, within one), others regression (R2, mean absolute error); --kind COLUMN=log10 and the like set
it. Models are ridge regressions, logistic regression for classes, ridge Cox for survival (C-index, curves by predicted
risk). A column GOLD or finalGold beside FEV1pp... and FEV1_FVC... is predicted by way of these two as well, as
GOLD_from_spirometry.

Everything that is chosen (penalty, scaling) is chosen inside the folds. Intervals are the bootstrap's over patients,
95 %; `permuted` is the figure for permuted labels. With --compare NAME=FILE a further table, such as an untrained
encoder's, is judged on the same folds; with --baselines STORE so are the share of lung below -950 HU, HU histograms,
and features and histogram together (what the features weigh beside it is chosen inside the folds). --held-out COLUMN,
of 0 and 1, fits to the subjects with 0 and reports on those with 1.

Writes, with --out-dir, evaluation.json, evaluation.md and a PNG a column; prints a table.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import read_labels
from data.layout import StoreError
from data.store import PatchStore
from data.tables import read_table, spelt
from misc.command import Parser, at_least, run
from misc.files import check_writable, write_json, write_text
from misc.progress import progress_bar
from tools.evaluation.baselines import baseline_tables
from tools.evaluation.judge import Judged, Label, judge
from tools.evaluation.kinds import KINDS, recognize, stands_for_missing, why_no_survival, why_not
from tools.evaluation.learn import added_weights, covariate_weights
from tools.evaluation.plots import draw
from tools.evaluation.report import details, explain, overview
from tools.evaluation.splits import look_like_one_patient
from tools.evaluation.tables import group_numbers, held_out_rows, matching_sids, read_features, refuse_leaks

STAGES = ("GOLD", "finalGold")  # columns that follow from the two below
SPIROMETRY = ("FEV1pp", "FEV1_FVC")  # beginnings of their names


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--features", required=True, help="patient_features.csv of extract_feature.py")
    text = "a further table on the same folds, NAME=FILE or FILE; several times"
    add("--compare", action="append", default=[], metavar="NAME=FILE", help=text)
    add("--labels", required=True, help="CSV with sid and numeric columns")
    add("--columns", nargs="+", help="columns to predict (default: every numeric one that can be)")
    add(
        "--kind",
        action="append",
        default=[],
        metavar="COLUMN=KIND",
        help=f"{', '.join(KINDS)}; where the guess is wrong",
    )
    text = "numeric columns of the labels that are known anyway, such as age: in every model, and a table of their own"
    add("--covariates", nargs="+", default=[], metavar="COLUMN", help=text)
    text = "column that names a scan's patient, so that all scans of one are in one fold"
    add("--group-column", metavar="COLUMN", help=text)
    add("--time-column", metavar="COLUMN", help="follow-up of survival, 0 or more, in any unit")
    add(
        "--event-column",
        metavar="COLUMN",
        help="1 where the event was seen, 0 where the patient was followed without it",
    )
    text = "patch store, for what a density reading says of the same patches, and what the features add to it"
    add("--baselines", metavar="STORE", help=text)
    text = "column of 0 and 1: fit to the subjects with 0, report on those with 1"
    add("--held-out", metavar="COLUMN", help=text)
    add("--folds", type=at_least(int, 2), default=5, help="of the cross-validation; lower it for few events")
    add("--seed", type=at_least(int, 0), default=0, help="of folds, bootstrap and permutations")
    add("--out-dir", help="folder for evaluation.json, evaluation.md and pictures")
    add("--json", help="write the figures here too")
    add("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")
    args = parser.parse_args()
    if bool(args.time_column) != bool(args.event_column):
        parser.error("--time-column and --event-column go together")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    for name in args.covariates:
        if name in (*(args.columns or ()), args.time_column, args.event_column):
            parser.error(f"--covariates {name} is what is to be predicted: every figure would be perfect")
    args.kind = dict(text.partition("=")[::2] for text in args.kind)
    for column, kind in args.kind.items():
        if kind not in KINDS:
            parser.error(f"--kind {column}={kind}: one of {', '.join(KINDS)}")
    return args


def named_tables(args: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """The tables of the command line, by name; ``features`` is the first."""
    tables = {"features": read_features(args.features)}
    for text in args.compare:
        name, sign, path = text.partition("=")
        name, path = (name, path) if sign and not Path(text).exists() else ("compare", text)
        if name in tables:
            raise StoreError(f"--compare {text}: the name {name} is taken; give another, NAME=FILE")
        tables[name] = read_features(path)
        tables[name].attrs["path"] = path
    if args.baselines:
        tables |= baseline_tables(PatchStore(args.baselines), args.no_progress)
    return tables


class Cohort:
    """Labels, covariates and patients of the subjects that all tables have."""

    def __init__(self, args: argparse.Namespace, sids: list[str]):
        self.path, self.sids = args.labels, sids
        asked = {*(args.columns or ()), *args.covariates, args.held_out, args.time_column, args.event_column}
        told = [f"column {name!r}" for name in filter(None, asked)] if args.columns or args.time_column else [""]

        def hear(text: str) -> None:
            if "column" not in text or any(name in text for name in told):
                note(text)

        values, self.names = read_labels(args.labels, sids, hear)
        self.values = values.astype(np.float64)
        self.held_out = held_out_rows(values, self.names, args.held_out, args.labels) if args.held_out else None
        self.covariates = np.column_stack([np.empty((len(sids), 0)), *(self.column(name) for name in args.covariates)])
        self.known = ~np.isnan(self.covariates).any(axis=1)
        if not self.known.all():
            first = sids[int(np.argmin(self.known))]
            note(
                f"{(~self.known).sum()} of {len(sids)} subjects lack a covariate and are left out, the first {first!r}"
            )
        if args.group_column:
            table = read_table(args.labels, file_names=False)
            self.groups = group_numbers(table, args.group_column, sids, args.labels)
        else:
            self.groups = np.arange(len(sids))
            alike = look_like_one_patient(sids)
            if alike:
                note(
                    f"sids {', '.join(alike[:3])} look like scans of one patient; without --group-column they may "
                    "be in several folds, and any label is then predicted by recognising the patient"
                )

    def column(self, name: str) -> np.ndarray:
        """(N,) NaN where unknown. Raises StoreError."""
        if name not in self.names:
            raise StoreError(f"{self.path} has no numeric column {name!r}{spelt(name, self.names)}")
        return self.values[:, self.names.index(name)]


def make_labels(cohort: Cohort, args: argparse.Namespace) -> list[tuple[Label, np.ndarray]]:
    """What is to be predicted, each with the rows (N,) where it is known. Raises StoreError."""
    taken = {args.held_out, args.time_column, args.event_column, *args.covariates}
    unknown = next((name for name in args.kind if name not in cohort.names), None)
    if unknown:
        raise StoreError(f"--kind {unknown}: {cohort.path} has no such numeric column{spelt(unknown, cohort.names)}")
    wanted = args.columns or ([] if args.time_column else [name for name in cohort.names if name not in taken])
    labels = []
    for name in wanted:
        values = cohort.column(name)
        known = ~np.isnan(values) & cohort.known
        if stands_for_missing(values[known]):
            low = values[known].min()
            count = int((values[known] == low).sum())
            note(f"column {name!r} has {low:g} for {count} subjects: if that means missing, leave such cells empty")
        kind = args.kind.get(name) or recognize(values[known]) if known.any() else "regression"
        reason = why_not(values[known], kind, args.folds) or _too_few_patients(cohort, known, args.folds)
        if reason and args.columns:
            raise StoreError(f"column {name!r} {reason}")
        if reason:
            note(f"column {name!r} left out, it {reason}")
            continue
        classes = tuple(np.unique(values[known])) if kind == "class" else ()
        target = np.searchsorted(classes, values[known]).astype(float) if classes else values[known]
        labels.append((Label(name, kind, target, classes), known))
        stages = _stage(cohort, name, values, known) if kind == "grade" else None
        labels += [stages] if stages else []
    if args.time_column:
        both = np.stack([cohort.column(args.time_column), cohort.column(args.event_column)], axis=1)
        known = ~np.isnan(both).any(axis=1) & cohort.known
        reason = "nobody's time and event are known" if not known.any() else why_no_survival(*both[known].T, args.folds)
        if reason:
            raise StoreError(f"--time-column {args.time_column}, --event-column {args.event_column}: {reason}")
        labels.append((Label(args.event_column, "survival", both[known]), known))
    if not labels:
        raise StoreError(f"{cohort.path} has no column that can be predicted for these subjects")
    return labels


def _too_few_patients(cohort: Cohort, known: np.ndarray, folds: int) -> str:
    patients = len(np.unique(cohort.groups[known]))
    return "" if patients >= folds else f"is known for {patients} patients, fewer than the {folds} folds"


def _stage(cohort: Cohort, name: str, values: np.ndarray, known: np.ndarray) -> tuple[Label, np.ndarray] | None:
    """A stage by way of the spirometry that it follows from, where the table has it."""
    columns = [next((other for other in cohort.names if other.startswith(start)), None) for start in SPIROMETRY]
    if name not in STAGES or None in columns:
        return None
    spirometry = np.stack([cohort.column(column) for column in columns], axis=1)
    known = known & (spirometry > 0).all(axis=1)  # NaN is not above 0
    target = np.column_stack([values[known], np.log10(spirometry[known])])
    return Label(f"{name}_from_spirometry", "stage", target), known


def main() -> None:
    args = parse_arguments()
    tables = named_tables(args)
    known = read_table(args.labels, file_names=False)
    sids = matching_sids(tables, known, args.labels)
    refuse_leaks(tables, known.columns, args.labels)
    if len(sids) < (there := tables["features"].index.isin(known["sid"]).sum()):
        note(f"{len(sids)} of {there} subjects with features and labels are in every table; the others are left out")
    for flag, path in (("--out-dir", args.out_dir), ("--json", args.json and Path(args.json).absolute().parent)):
        if path:
            check_writable(Path(path), flag)
    cohort = Cohort(args, sids)
    arrays = {name: table.loc[sids].to_numpy() for name, table in tables.items()}
    weights = {name: np.ones(table.shape[1]) for name, table in arrays.items()}
    if args.baselines:
        arrays["features+histogram"] = np.hstack([arrays["features"], arrays["histogram"]])
        widths = arrays["features"].shape[1], arrays["histogram"].shape[1]
        weights["features+histogram"] = added_weights(*widths)
    covariates = cohort.covariates
    if args.covariates:
        count = covariates.shape[1]
        weights = {name: covariate_weights(count, weights[name]) for name in arrays}
        arrays = {name: np.hstack([covariates, table]) for name, table in arrays.items()} | {"covariates": covariates}
    labels = make_labels(cohort, args)

    results: dict[str, dict[str, Any]] = {}
    judged: list[tuple[Label, np.ndarray, Judged]] = []
    bar = progress_bar(args.no_progress, total=len(labels), desc="evaluate", unit="label")
    with bar:
        for label, known in labels:
            held_out = None if cohort.held_out is None else cohort.held_out[known]
            given = {name: table[known] for name, table in arrays.items()}
            found = judge(label, given, cohort.groups[known], args.folds, weights, held_out, args.seed)
            reported = np.ones(known.sum(), dtype=bool) if held_out is None else held_out
            judged.append((label, reported, found))
            results[label.name] = found.figures
            bar.update()
    listed = [(label, int(reported.sum()), found) for label, reported, found in judged]
    text = overview(listed)
    print(text)
    for line in explain(results):
        print(line)
    if args.out_dir:
        out_dir = Path(args.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "evaluation.json", results)
        write_text(out_dir / "evaluation.md", f"{text}\n\n{details(listed)}\n")
        for label, reported, found in judged:
            draw(label, found, "features", reported, out_dir / f"{label.name}.png")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    run(main)
