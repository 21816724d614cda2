"""How well do patient features predict a number? Cross-validated R² of a ridge regression.

    python tools/evaluate.py --features ssl_exp/NAME/patch_rep/0020/patient_features.csv \\
        --labels labels.csv --columns emphysema_fraction FEV1pp

With --compare FILE the same folds are used for a second table, such as an untrained encoder's.
With --baselines STORE so are the share of lung below -950 HU, HU histograms, and features and histogram together: what
a density reading knows, no network need learn.

Each column's line has the mean and the standard deviation of R² over repeated 5-fold
cross-validation; the penalty is chosen inside each training fold. With --held-out COLUMN, of 0 and 1, the
regression is fitted to the subjects with 0 and R² is of those with 1, with its bootstrap standard deviation.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import read_labels
from data.layout import StoreError
from data.store import PatchStore
from data.tables import read_table
from misc.command import Parser, run
from misc.files import write_json
from tools.evaluation.baselines import baseline_tables
from tools.evaluation.probe import FOLDS, cross_validated_r2, held_out_r2


def read_features(path: str) -> pd.DataFrame:
    """patient_features.csv by sid. Raises StoreError."""
    table = read_table(path).set_index("sid")
    try:
        table = table.astype(np.float64)
    except ValueError as error:
        raise StoreError(f"{path} has a cell that is no number: {error}") from error
    if table.columns.empty:
        raise StoreError(f"{path} has no column beside sid")
    wrong = ~np.isfinite(table.to_numpy())
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise StoreError(
            f"{path} has {table.iat[row, column]} in column {table.columns[column]} of sid {table.index[row]}; "
            "features are finite: extract them again, from another checkpoint if this one's training diverged"
        )
    return table


def why_not(target: np.ndarray) -> str:
    """Why a column (n,), of known values, cannot be predicted; empty where it can."""
    if len(target) < 2 * FOLDS:
        return f"is known for {len(target)} subjects; at least {2 * FOLDS} are needed"
    if np.ptp(target) == 0:
        return f"is {target[0]:g} for every subject; there is nothing to predict"
    return ""


def held_out_rows(values: np.ndarray, names: list[str], column: str, labels: str) -> np.ndarray:
    """(N,) bool from a column of 0 and 1. Raises StoreError."""
    if column not in names:
        raise StoreError(f"{labels} has no numeric column {column!r} for --held-out; it has {', '.join(names)}")
    held = values[:, names.index(column)]
    counts = (held == 0).sum(), (held == 1).sum()
    if sum(counts) < len(held):
        raise StoreError(f"--held-out {column} must be 0 or 1 for every subject; {labels} has another value")
    if min(counts) < FOLDS:
        raise StoreError(f"--held-out {column}: {counts[0]} subjects to fit and {counts[1]} to report on; 5 at least")
    return held == 1


def evaluate(
    tables: dict[str, pd.DataFrame],
    values: np.ndarray,
    names: list[str],
    wanted: list[str] | None,
    labels: str,
    held_out: np.ndarray | None = None,
) -> dict[str, dict]:
    """R² of every table for every column.

    Args:
        tables: features by sid, all with the same rows.
        values: (N, P) labels of these rows.
        names: their P columns.
        wanted: columns to predict; None takes those that can be.
        labels: the label table's path, for errors.
        held_out: (N,) subjects to report on, from the others; None cross-validates.

    Raises:
        StoreError: a wanted column cannot be predicted, or none can.
    """
    results = {}
    for name in wanted or names:
        if name not in names:
            raise StoreError(f"{labels} has no numeric column {name!r}; it has {', '.join(names)}")
        target = values[:, names.index(name)].astype(np.float64)
        known = ~np.isnan(target)
        reason = why_not(target[known])
        if reason and wanted:
            raise StoreError(f"column {name!r} {reason}")
        if reason:
            print(f"note: column {name!r} left out, it {reason}", file=sys.stderr)
            continue
        results[name] = {"subjects": int(known.sum())}
        for key, table in tables.items():
            x, y = table.to_numpy()[known], target[known]
            results[name][key] = cross_validated_r2(x, y) if held_out is None else held_out_r2(x, y, held_out[known])
    if not results:
        raise StoreError(f"{labels} has no column that can be predicted for these subjects")
    return results


def show(results: dict[str, dict], tables: list[str]) -> str:
    """A table of text: a line a column, mean and standard deviation of R²."""
    lines = [f"{'column':<24}{'subjects':>9}" + "".join(f"{'R2 ' + name:>{len(name) + 6}}" for name in tables)]
    for column, row in results.items():
        cells = [f"{f'{row[name][0]:.2f} +- {row[name][1]:.2f}':>{len(name) + 6}}" for name in tables]
        lines.append(f"{column:<24}{row['subjects']:>9}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--features", required=True, help="patient_features.csv of extract_feature.py")
    parser.add_argument("--compare", help="a second patient_features.csv, evaluated on the same folds")
    parser.add_argument("--labels", required=True, help="CSV with sid and numeric columns")
    parser.add_argument("--columns", nargs="+", help="columns to predict (default: every numeric one that varies)")
    text = "patch store, for what a density reading says of the same patches, and what the features add to it"
    parser.add_argument("--baselines", metavar="STORE", help=text)
    text = "column of 0 and 1: fit to the subjects with 0, report on those with 1"
    parser.add_argument("--held-out", metavar="COLUMN", help=text)
    parser.add_argument("--json", help="write the numbers here too")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")
    args = parser.parse_args()
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise StoreError(f"--json {args.json}: its folder does not exist")

    tables = {"features": read_features(args.features)}
    if args.compare:
        tables["compare"] = read_features(args.compare)
    if args.baselines:
        tables |= baseline_tables(PatchStore(args.baselines), args.no_progress)
    sids = [sid for sid in tables["features"].index if all(sid in table.index for table in tables.values())]
    if not sids:
        raise StoreError(f"{args.features} and {args.compare or args.baselines} have no sid in common")
    tables = {key: table.loc[sids] for key, table in tables.items()}
    if args.baselines:
        tables["features+histogram"] = pd.concat([tables["features"], tables["histogram"]], axis=1)
    values, names = read_labels(args.labels, sids, lambda text: print(f"note: {text}", file=sys.stderr))
    held_out = None
    if args.held_out:
        held_out = held_out_rows(values, names, args.held_out, args.labels)
        values = np.delete(values, names.index(args.held_out), axis=1)
        names.remove(args.held_out)
    results = evaluate(tables, values, names, args.columns, args.labels, held_out)
    print(show(results, list(tables)))
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    run(main)
