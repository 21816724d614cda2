"""How well do patient features predict a number? Cross-validated R² of a ridge regression.

    python tools/evaluate.py --features ssl_exp/NAME/patch_rep/0020/patient_features.csv \\
        --labels labels.csv --columns emphysema_fraction FEV1pp

With --compare FILE the same folds are used for a second table, such as an untrained encoder's.
Each column's line has the mean and the standard deviation of R² over repeated 5-fold
cross-validation; the penalty is chosen inside each training fold.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError
from data.store import read_labels
from data.tables import read_table
from preprocess.subjects import one_line_errors

FOLDS, REPEATS = 5, 10


def cross_validated_r2(features: np.ndarray, target: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over repeats of the out-of-fold R²: (N, D), (N,) -> two numbers.

    Every subject is predicted once in each repeat by a model that has not seen it; R² is of those
    N predictions together, so that small folds do not distort it.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 5, 25)))
    scores = []
    for repeat in range(REPEATS):
        folds = KFold(FOLDS, shuffle=True, random_state=seed + repeat)
        scores.append(r2_score(target, cross_val_predict(model, features, target, cv=folds)))
    return float(np.mean(scores)), float(np.std(scores))


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True, help="patient_features.csv of extract_feature.py")
    parser.add_argument("--compare", help="a second patient_features.csv, evaluated on the same folds")
    parser.add_argument("--labels", required=True, help="CSV with sid and numeric columns")
    parser.add_argument("--columns", nargs="+", help="columns to predict (default: every numeric one that varies)")
    parser.add_argument("--json", help="write the numbers here too")
    one_line_errors(parser)
    args = parser.parse_args()
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise StoreError(f"--json {args.json}: its folder does not exist")

    tables = {"features": read_features(args.features)}
    if args.compare:
        tables["compare"] = read_features(args.compare)
    sids = [sid for sid in tables["features"].index if all(sid in table.index for table in tables.values())]
    if not sids:
        raise StoreError(f"{args.features} and {args.compare} have no sid in common")
    values, names = read_labels(args.labels, sids, lambda text: print(f"note: {text}", file=sys.stderr))
    wanted = args.columns or names
    results = {}
    for name in wanted:
        if name not in names:
            raise StoreError(f"{args.labels} has no numeric column {name!r}; it has {', '.join(names)}")
        target = values[:, names.index(name)].astype(np.float64)
        known = ~np.isnan(target)
        reason = ""
        if known.sum() < 2 * FOLDS:
            reason = f"is known for {known.sum()} subjects; at least {2 * FOLDS} are needed"
        elif np.ptp(target[known]) == 0:
            reason = f"is {target[known][0]:g} for every subject; there is nothing to predict"
        if reason and args.columns:
            raise StoreError(f"column {name!r} {reason}")
        if reason:
            print(f"note: column {name!r} left out, it {reason}", file=sys.stderr)
            continue
        results[name] = {"subjects": int(known.sum())}
        for key, table in tables.items():
            features = table.loc[[sid for sid, ok in zip(sids, known) if ok]].to_numpy()
            results[name][key] = cross_validated_r2(features, target[known])
    if not results:
        raise StoreError(f"{args.labels} has no column that can be predicted for these subjects")
    heading = f"{'column':<24}{'subjects':>9}{'R2 features':>18}" + (f"{'R2 compared':>18}" if args.compare else "")
    print(heading)
    for name, row in results.items():
        cells = [f"{row[key][0]:.2f} +- {row[key][1]:.2f}" for key in tables]
        print(f"{name:<24}{row['subjects']:>9}" + "".join(f"{cell:>18}" for cell in cells))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
