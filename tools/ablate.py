"""Measure what a part of the method contributes: train with and without that part, and compare on held-out subjects.

    python tools/ablate.py --out-dir ablation
    python tools/ablate.py --out-dir ablation --root-dir /data/patches --labels labels.csv --held-out test --seeds 5 \\
        --arms full no-neighbours --arm "cold=--moco-t 0.1" --epochs 8

Each arm is trained once per seed, with the same recipe and number of epochs, on the subjects that are not held out.
After training, features are extracted for all subjects. A ridge regression is fitted to the training subjects and
evaluated on the held-out subjects. For comparison, the arm `random` runs one epoch at learning rate 0, which only
estimates BatchNorm statistics. The density and histogram baselines are also evaluated. Without --root-dir the script
first makes a synthetic cohort.

Run the same command again to resume; finished runs are not repeated. The script writes to --out-dir

    rows/{arm}-{seed}.csv     results of one run: column, table, r2; the tables are the patient vectors (mean, moments,
                              layers), each on its own, and joined with the mean and the histogram
    ablation.csv              the results of all runs
    ablation.md, ablation.png mean and SD over seeds, and the paired difference from the first arm
    ssl_exp/{arm}-{seed}/     the experiments
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import explain_missing_column, read_labels
from data.store import PatchStore
from misc.command import OneOf, Parser, UserError, at_least, run
from misc.files import check_writable, write_text
from misc.progress import add_progress_flag, progress_bar
from misc.run.recipes import RECIPES
from tools.evaluation.ablation import format_markdown, plot_runs, summarize_runs
from tools.evaluation.baselines import make_baseline_tables
from tools.evaluation.kinds import find_label_problem
from tools.evaluation.learn import FOLDS, compute_held_out_ridge_r2, join_tables_with_even_weights
from tools.evaluation.tables import choose_patient_vector, read_features, read_held_out_subjects, read_vectors
from tools.evaluation.vectors import VECTORS, Table

ROOT = Path(__file__).resolve().parent.parent
FULL = ("--beta", "1", "--k-neighbors", "2")  # train both tasks; the small recipe trains only the patch task
ARMS = {
    "full": FULL,
    "no-neighbours": (*FULL, "--beta", "0"),  # neighbours are not encoded and do not affect BatchNorm
    "one-expert": (*FULL, "--num-experts", "1"),
    # With --recipe small, all negatives of a step come from one location.
    # The arms "queues" and "one-queue" differ only in the queue: one per location, or one for all locations.
    "queues": (*FULL, "--negatives", "queue", "--mask-own"),
    "one-queue": (*FULL, "--negatives", "queue", "--mask-own", "--one-queue", "--moco-k", "1024"),
    "random": ("--lr", "0", "--epochs", "1"),  # one epoch, to estimate the BatchNorm statistics
}
COHORT_COLUMNS = (
    *("centrilobular_fraction", "mild_centrilobular_fraction", "moderate_centrilobular_fraction"),
    *("severe_centrilobular_fraction", "panlobular_fraction", "paraseptal_fraction", "upper_centrilobular_fraction"),
    *("lower_centrilobular_fraction", "cluster_mm", "reticulation_fraction", "emphysema_grade", "paraseptal_grade"),
    *("FEV1pp", "FEV1_FVC", "exacerbations"),
)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out-dir", required=True, help="output folder of the study; give the same folder again to resume")
    add("--root-dir", help="patch store (default: a synthetic cohort, made in --out-dir)")
    add("--labels", help="CSV with a sid column and numeric label columns; needed with --root-dir")
    text = "label column: 1 for held-out subjects, 0 for subjects used for training and fitting"
    add("--held-out", default="held_out", metavar="COLUMN", help=text)
    add(
        "--columns",
        nargs="+",
        help="label columns to predict (default: all numeric columns, or the labels of the synthetic cohort)",
    )
    add(
        "--num-subjects",
        type=at_least(int, 40),
        default=200,
        help="size of the synthetic cohort; more subjects give less noisy results",
    )
    text = (
        f"arms to run: {', '.join(ARMS)}; to run only arms defined with --arm, give --arms without a name. "
        "The first arm is the reference"
    )
    add("--arms", nargs="*", default=list(ARMS), help=text)
    text = "define an additional arm by its name and the train.py flags that it adds to the arm 'full'; can be repeated"
    add("--arm", action="append", default=[], metavar="NAME=FLAGS", help=text)
    add(
        "--seeds",
        type=at_least(int, 1),
        default=3,
        help="number of runs per arm; raise it if the SD over seeds hides a difference",
    )
    add(
        "--first-seed",
        type=at_least(int, 0),
        default=0,
        help="seed of the first run; change it to split a study across machines",
    )
    add("--recipe", type=OneOf(*RECIPES), default="small", help="value of train.py --recipe for all arms")
    add("--epochs", type=at_least(int, 1), help="number of epochs per arm (default: set by --recipe)")
    add_progress_flag(parser)
    args = parser.parse_args()
    args.arms = {name: ARMS.get(name) for name in args.arms}
    for text in args.arm:
        name, sign, flags = text.partition("=")
        if not sign or not name.replace("-", "").isalnum():
            parser.error(f"--arm {text}: give NAME=FLAGS; the name may have letters, digits and -")
        args.arms[name] = (*FULL, *shlex.split(flags))  # train.py uses the last value of a repeated flag
    unknown = [name for name, flags in args.arms.items() if flags is None]
    if unknown:
        parser.error(f"--arms {unknown[0]} must be one of {', '.join(ARMS)}; define other arms by --arm NAME=FLAGS")
    if not args.arms:
        parser.error("--arms is empty; give at least one arm, or --arm NAME=FLAGS")
    if bool(args.root_dir) != bool(args.labels):
        parser.error("--root-dir and --labels must be given together")
    return args


def run_command(log: Path, *command: object, cwd: Path | None = None) -> None:
    """Run a command and append its output to ``log``.

    If the command fails, raise UserError with the last line of the log.
    """
    with open(log, "a", encoding="utf-8") as stream:
        done = subprocess.run(
            [str(part) for part in command], stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, check=False
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        raise UserError(
            f"{command[1]} failed with exit status {done.returncode} (see {log}): {lines[-1] if lines else ''}"
        )


def make_synthetic_store(out_dir: Path, subjects: int) -> tuple[Path, Path]:
    """Make a synthetic cohort and its patch store, unless they exist. Return the paths of the store and the labels."""
    cohort, store, log = out_dir / "cohort", out_dir / "patches", out_dir / "cohort.log"
    if not (cohort / "labels.csv").is_file():
        flags = ("--num-subjects", subjects, "--num-workers", 2, "--no-progress")
        run_command(log, sys.executable, ROOT / "tools" / "make_cohort.py", "--out-dir", cohort, *flags)
    if not (store / "subjects.csv").is_file():
        flags = ("--input-csv", cohort / "dataset.csv", "--root-dir", store, "--method", "threshold", "--no-progress")
        more = ("--atlas-mask", cohort / "atlas_lung_mask.nii.gz", "--num-workers", 2)
        run_command(log, sys.executable, ROOT / "preprocess" / "run_preprocess.py", *flags, *more)
    return store, cohort / "labels.csv"


class Study:
    """Data and settings of an ablation study: patch store, baselines, labels and held-out subjects."""

    def __init__(self, args: argparse.Namespace, out_dir: Path, store: Path, labels: Path):
        self.out_dir, self.root_dir = out_dir, store
        patches = PatchStore(store)
        self.sids = patches.sids
        values, names = read_labels(labels, self.sids, lambda text: print(f"note: {text}", file=sys.stderr))
        self.held_out = read_held_out_subjects(values, names, args.held_out, str(labels))
        self.labels = pd.DataFrame(values.astype(np.float64), index=self.sids, columns=names)
        wanted = args.columns or (names if args.root_dir else COHORT_COLUMNS)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UserError(explain_missing_column(labels, unknown[0], names))
        self.columns = [name for name in wanted if name != args.held_out and not self.warn_unusable_label_column(name)]
        self.subjects = out_dir / "trained_on.csv"
        trained = [sid for sid, held in zip(self.sids, self.held_out) if not held]
        write_text(self.subjects, pd.DataFrame({"sid": trained}).to_csv(index=False))
        baselines = make_baseline_tables(patches, args.no_progress)
        self.baselines = {name: table.loc[self.sids].to_numpy() for name, table in baselines.items()}

    def warn_unusable_label_column(self, column: str) -> str:
        values = self.labels[column].to_numpy()
        reasons = [
            find_label_problem(values[rows & ~np.isnan(values)], "regression", FOLDS)
            for rows in (self.held_out, ~self.held_out)
        ]
        reason = next(filter(None, reasons), "")
        if reason:
            print(f"note: column {column!r} left out: {reason}", file=sys.stderr)
        return reason

    def evaluate_tables(
        self, tables: dict[str, Table], weights: dict[str, np.ndarray], arm: str, seed: int
    ) -> pd.DataFrame:
        """Evaluate tables. Return one row per label column and table, with arm, seed, column, table and r2."""
        rows = []
        for column in self.columns:
            target = self.labels[column].to_numpy()
            known = ~np.isnan(target)
            for name, table in tables.items():
                score = compute_held_out_ridge_r2(table[known], target[known], self.held_out[known], weights.get(name))
                rows.append({"arm": arm, "seed": seed, "column": column, "table": name, "r2": round(score, 4)})
        return pd.DataFrame(rows)

    def run_arm(self, arm: str, flags: tuple[str, ...], seed: int, common: list[str]) -> pd.DataFrame:
        """Train, extract and evaluate one run, or read the run's result if its CSV exists."""
        kept = self.out_dir / "rows" / f"{arm}-{seed}.csv"
        if kept.is_file():
            return pd.read_csv(kept)
        name, log = f"{arm}-{seed}", self.out_dir / "rows" / f"{arm}-{seed}.log"
        train = ("--root-dir", self.root_dir, "--subjects", self.subjects, "--exp-name", name, "--resume", "auto")
        last = ("--seed", seed, "--save-freq", 1000, "--workers", 1, "--no-progress")
        run_command(log, sys.executable, ROOT / "train.py", *train, *common, *flags, *last, cwd=self.out_dir)
        folder = self.out_dir / "ssl_exp" / name
        checkpoint = max(folder.glob("checkpoint_patch_[0-9]*.pth.tar")).name
        given = ("--exp-name", folder, "--checkpoint-patch", checkpoint, "--root-dir", self.root_dir, "--no-progress")
        run_command(
            log, sys.executable, ROOT / "extract_feature.py", *given, "--layers", "--out-dir", folder / "features"
        )
        rows = self.evaluate_tables(*self.read_features_and_column_weights(folder / "features"), arm, seed)
        write_text(kept, rows.to_csv(index=False))
        return rows

    def read_features_and_column_weights(self, features_folder: Path) -> tuple[dict[str, Table], dict[str, np.ndarray]]:
        """Return the tables and column weights of a run.

        Each patient vector is used alone, and joined with the mean vector and the histogram baseline.
        """
        path = str(features_folder / "patient_features.csv")
        table, alone = read_features(path), {}
        for kind in reversed(VECTORS):
            alone[kind] = read_vectors(choose_patient_vector(kind, path, None, print), table, self.sids)
        both, weights = {}, {}
        for kind, table in alone.items():
            together = [table, *([alone["mean"]] if kind != "mean" else []), self.baselines["histogram"]]
            both[f"{kind}+histogram"], weights[f"{kind}+histogram"] = join_tables_with_even_weights(*together)
        return alone | both, weights


def main() -> None:
    args = parse_arguments()
    out_dir = Path(args.out_dir).resolve()
    check_writable(out_dir, "--out-dir")
    (out_dir / "rows").mkdir(parents=True, exist_ok=True)
    data = (
        (Path(args.root_dir), Path(args.labels)) if args.root_dir else make_synthetic_store(out_dir, args.num_subjects)
    )
    study = Study(args, out_dir, data[0].resolve(), data[1])
    common = ["--recipe", args.recipe, *(["--epochs", str(args.epochs)] if args.epochs else [])]
    rows = [study.evaluate_tables(study.baselines, {}, "baseline", 0)]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    with progress_bar(args.no_progress, total=len(seeds) * len(args.arms), desc="ablate", unit="run") as bar:
        for seed in seeds:  # run all arms of a seed before the next seed, so that an interrupted study has paired seeds
            for arm, flags in args.arms.items():
                rows.append(study.run_arm(arm, flags, seed, common))
                bar.update()
                table = pd.concat(rows)
                write_text(out_dir / "ablation.csv", table.to_csv(index=False))
                text = format_markdown(summarize_runs(table, next(iter(args.arms))), study.held_out)
                write_text(out_dir / "ablation.md", text)
    plot_runs(table, out_dir / "ablation.png")
    print(text)


if __name__ == "__main__":
    run(main)
