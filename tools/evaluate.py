"""Predict labels from patient features by cross-validation, and report each metric with its 95 % interval.

    python tools/evaluate.py --features ssl_exp/NAME/patch_rep/0020/patient_features.csv \\
        --labels labels.csv --columns FEV1pp GOLD --baselines /data/patches --out-dir evaluation
    python tools/evaluate.py --features F --labels labels.csv --time-column years --event-column died --out-dir O

The script guesses what kind of label each column holds:

- two values: classes (AUROC, balanced accuracy)
- a few whole numbers: grades (quadratic kappa, exact agreement, agreement within one grade)
- anything else: regression (R2, mean absolute error)

--kind overrides the guess, for example --kind DLCO=log10. The models are ridge regression, logistic regression for
classes and ridge Cox regression for survival (C-index, survival curves by predicted risk). If the labels also have
columns whose names begin with FEV1pp and FEV1_FVC, a column GOLD or finalGold is predicted a second time from the
predictions of these two columns. The second prediction of GOLD is reported as GOLD_from_spirometry.

Penalty and scaling are chosen without the test fold. Intervals are 95 % bootstrap intervals over patients for a
fixed set of folds. A different --seed draws different folds and changes a metric by a few hundredths. `permuted` is the
value of the metric for shuffled labels.

--compare NAME=FILE evaluates another table on the same folds, for example the features of an untrained encoder.
--baselines STORE evaluates baselines without a network: the fraction of lung below -950 HU, and HU histograms.
--baselines also evaluates the features together with the histogram, and reports what the features add. The combined
prediction is the mean of two models' predictions. One model uses only the histogram, and the other uses the histogram,
the features and the mean over locations.
--held-out COLUMN fits the models to the subjects with 0 in that column and evaluates them on the subjects with 1.

--patient-vector selects the features. The default is `layers` if the file from extract_feature.py --layers exists.
With `layers` or `moments`, the published mean over locations is evaluated as an additional table, `mean`.

With --out-dir the script writes evaluation.json, evaluation.md and one PNG per label, and removes the files of an
earlier evaluation. The script also writes standardization.npz, which embed_scan.py needs to compute the same vector
for a single scan. The script also prints the result table.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError
from data.store import PatchStore
from data.tables import read_table
from misc.command import Parser, at_least, count_usable_cores, run
from misc.files import check_writable, make_safe_name, write_json, write_text
from misc.progress import add_progress_flag, progress_bar
from tools.evaluation.baselines import make_baseline_tables
from tools.evaluation.cohort import EvaluatedSubjects, make_labels, print_note
from tools.evaluation.judge import Evaluation, Label, evaluate_label
from tools.evaluation.kinds import KINDS
from tools.evaluation.learn import join_tables_with_even_weights, prepend_covariate_weights
from tools.evaluation.plots import plot_predictions
from tools.evaluation.report import explain_results, format_metric_overview, format_metrics_table
from tools.evaluation.tables import (
    ChosenVector,
    add_label_flags,
    add_vector_flags,
    choose_patient_vector,
    describe_store_mismatch,
    is_constant,
    match_sids,
    read_features,
    read_vectors,
    refuse_label_columns_in_features,
    report_unmatched_subjects,
)
from tools.evaluation.vectors import JoinedTable, Standardization, Table, join_tables

STANDARDIZATION = "standardization.npz"
OF_BASELINES = (
    *("density", "density_by_location", "histogram", "histogram_smoothed"),
    *("histogram_by_location", "features+histogram"),
)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--features", required=True, help="patient_features.csv written by extract_feature.py")
    text = "another feature table to evaluate on the same folds, as NAME=FILE or FILE; can be repeated"
    add("--compare", action="append", default=[], metavar="NAME=FILE", help=text)
    add_vector_flags(parser)
    add(
        "--labels",
        required=True,
        help="CSV with a sid column and label columns, each numeric or categorical (at most 10 distinct words)",
    )
    add("--columns", nargs="+", help="label columns to predict (default: every column that can be predicted)")
    add(
        "--kind",
        action="append",
        default=[],
        metavar="COLUMN=KIND",
        help=f"set the kind of a label column if it is guessed wrongly: {', '.join(KINDS)}; can be repeated",
    )
    add_label_flags(parser)
    text = "numeric covariates, such as age; every model uses them, and one additional model uses only the covariates"
    add("--covariates", nargs="+", default=[], metavar="COLUMN", help=text)
    text = "label column with the patient of each scan; all scans of a patient are then in the same fold"
    add("--group-column", metavar="COLUMN", help=text)
    add(
        "--time-column",
        metavar="COLUMN",
        help="label column with the follow-up time for survival analysis (0 or more, in any unit)",
    )
    add(
        "--event-column",
        metavar="COLUMN",
        help="label column with 1 or yes if the event was observed, 0 or no if censored; for other words, set --order",
    )
    text = (
        "patch store of the subjects in --features; with this flag, the script also evaluates density and histogram "
        "baselines, and the features combined with the histogram"
    )
    add("--baselines", metavar="STORE", help=text)
    text = "label column: models are fitted to the subjects with 0 and evaluated on the subjects with 1"
    add("--held-out", metavar="COLUMN", help=text)
    add(
        "--folds",
        type=at_least(int, 2),
        default=5,
        help="number of cross-validation folds; lower it if there are few events",
    )
    add(
        "--seed", type=at_least(int, 0), default=0, help="random seed for the folds, the bootstrap and the permutations"
    )
    add("--out-dir", help="output folder for evaluation.json, evaluation.md, standardization.npz and pictures")
    add("--json", help="additional file for the metrics, with the same content as evaluation.json")
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.time_column) != bool(args.event_column):
        parser.error("--time-column and --event-column must be given together")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    if args.json and Path(args.json).is_dir():
        parser.error(f"--json {args.json} is a folder; give a file name")
    if args.json and Path(args.json).suffix != ".json" and Path(args.json).exists():
        parser.error(f"--json {args.json} already exists and does not end in .json; remove it or give another name")
    args.columns = list(dict.fromkeys(args.columns)) if args.columns else None
    wanted = (*(args.columns or ()), args.time_column, args.event_column)
    if args.event_column in (args.columns or ()):
        parser.error(f"--columns {args.event_column} is already predicted as --event-column; remove it from --columns")
    for name in args.covariates:
        if name in wanted:
            parser.error(
                f"--covariates {name} is also a label to predict, so it would be "
                "predicted from itself; remove one of the two"
            )
    args.kind = dict(text.partition("=")[::2] for text in args.kind)
    for column, kind in args.kind.items():
        if kind not in KINDS:
            parser.error(f"--kind {column}={kind}: the kind must be one of {', '.join(KINDS)}")
    return args


def read_named_tables(args: argparse.Namespace, chosen: ChosenVector) -> dict[str, pd.DataFrame]:
    """Read all tables named on the command line, and return them by name.

    The first table of the result, ``features``, contains the means over locations. If another patient vector is
    chosen, main() replaces the means in ``features``.
    """
    tables = {"features": read_features(args.features)}
    tables["features"].attrs["path"] = args.features
    if chosen.kind != "mean":
        tables["mean"] = tables["features"]
    for text in args.compare:
        name, sign, path = text.partition("=")
        name, path = (name, path) if sign and not Path(text).exists() else ("compare", text)
        if not name:
            raise StoreError(f"--compare {text}: the name before = is empty; give NAME=FILE")
        if name in (*tables, *(OF_BASELINES if args.baselines else ()), *(("covariates",) if args.covariates else ())):
            raise StoreError(
                f"--compare {text}: another table is already called {name}; give another name as NAME=FILE"
            )
        tables[name] = read_features(path)
        tables[name].attrs["path"] = path
    if args.baselines:
        try:
            store = PatchStore(args.baselines)
        except StoreError as error:
            raise StoreError(re.sub("^--root-dir ", "--baselines ", str(error))) from error
        told = describe_store_mismatch(args.features, store, "--baselines")
        if told:
            print_note(told)
        tables |= make_baseline_tables(store, args.no_progress)
    return tables


def save_standardization(path: Path, vectors: Table, features: str) -> None:
    """Save the standardisation over all subjects for embed_scan.py, or delete the file if mean vectors are used."""
    if isinstance(vectors, JoinedTable):  # the covariates come first
        vectors = vectors.tables[-1]
    if isinstance(vectors, np.ndarray):
        path.unlink(missing_ok=True)
        return
    try:
        made = json.loads(Path(features).with_name("features.json").read_text(encoding="utf-8"))
        checkpoint = str(made["checkpoint_sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        checkpoint = ""  # the feature table is not from extract_feature.py
    Standardization.fit(vectors.kind, vectors.patches, vectors.rows).save(path, checkpoint)


def remove_pictures(out_dir: Path) -> None:
    """Delete the pictures of an earlier evaluation, which may have predicted other columns."""
    try:
        before = json.loads((out_dir / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    figures = before if isinstance(before, dict) else {}
    for name in [name for name, tables in figures.items() if isinstance(tables, dict) and "features" in tables]:
        (out_dir / f"{make_safe_name(name)}.png").unlink(missing_ok=True)


def main() -> None:
    args = parse_arguments()
    if os.getloadavg()[0] > count_usable_cores():
        # On a busy machine, several BLAS threads wait for each other and are ten times slower than one.
        threadpool_limits(1)
    notes: list[str] = []  # notes to print after all checks have passed
    chosen = choose_patient_vector(args.patient_vector, args.features, args.patch_features, notes.append)
    tables = read_named_tables(args, chosen)
    table = read_table(args.labels, file_names=False)
    sids = match_sids(tables, table, args.labels)
    refuse_label_columns_in_features(tables, table.columns, args.labels)
    report_unmatched_subjects(tables["features"].index, table["sid"], args.labels, print_note)
    if len(sids) < (there := tables["features"].index.isin(table["sid"]).sum()):
        print_note(
            f"{len(sids)} of {there} subjects with features and labels are in every table; "
            "the other subjects are left out"
        )
    for flag, path in (("--out-dir", args.out_dir), ("--json", args.json and Path(args.json).absolute().parent)):
        if path:
            check_writable(Path(path), flag)
    cohort = EvaluatedSubjects(args, sids, table)
    arrays: dict[str, Table] = {name: table.loc[sids].to_numpy() for name, table in tables.items()}
    arrays["features"] = read_vectors(chosen, tables["features"], sids)
    weights = {name: np.ones(table.shape[1]) for name, table in arrays.items()}
    added_to: dict[str, str] = {}
    if args.baselines:
        together = [arrays[name] for name in ("features", "mean", "histogram") if name in arrays]
        arrays["features+histogram"], weights["features+histogram"] = join_tables_with_even_weights(*together)
        added_to["features+histogram"] = "histogram"
    covariates = cohort.covariates
    if args.covariates:
        count = covariates.shape[1]
        weights = {name: prepend_covariate_weights(count, weights[name]) for name in arrays}
        arrays = {name: join_tables(covariates, table) for name, table in arrays.items()} | {"covariates": covariates}
    labels = make_labels(cohort, args)
    for text in notes:
        print_note(text)
    for name, table in tables.items():
        if is_constant(table.loc[sids].to_numpy()):
            print_note(
                f"{table.attrs.get('path', name)} has the same values for every subject, so it cannot predict anything"
            )

    results: dict[str, dict[str, Any]] = {}
    judged: list[tuple[Label, np.ndarray, Evaluation]] = []
    bar = progress_bar(args.no_progress, total=len(labels), desc="evaluate", unit="label")
    with bar:
        for label, known in labels:
            held_out = None if cohort.held_out is None else cohort.held_out[known]
            given = {name: table[known] for name, table in arrays.items()}
            found = evaluate_label(
                label, given, cohort.groups[known], args.folds, weights, held_out, args.seed, added_to
            )
            reported = np.ones(known.sum(), dtype=bool) if held_out is None else held_out
            judged.append((label, reported, found))
            results[label.name] = found.figures
            bar.update()
    listed = [(label, int(reported.sum()), found) for label, reported, found in judged]
    text = format_metric_overview(listed)
    words = "\n".join(explain_results(results))
    print(text, words, sep="\n" if words else "", flush=True)
    if args.out_dir:
        out_dir = Path(args.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_pictures(out_dir)
        write_json(out_dir / "evaluation.json", results)
        save_standardization(out_dir / STANDARDIZATION, arrays["features"], args.features)
        write_text(out_dir / "evaluation.md", f"{text}\n\n{words}\n\n{format_metrics_table(listed)}\n")
        for label, reported, found in judged:
            plot_predictions(label, found, "features", reported, out_dir / f"{make_safe_name(label.name)}.png")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    run(main)
