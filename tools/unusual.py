"""Score how unusual each patch and each subject is, learning from healthy subjects only.

    python tools/unusual.py --features-dir ssl_exp/NAME/patch_rep/0020 --labels labels.csv --healthy never_smoker \\
        --out-dir unusual

The script fits a normal distribution to the patch features of the subjects with 1 in the column given by
--healthy. The distribution has one mean per location and one covariance for all locations. The score of a patch is
its squared Mahalanobis distance divided by the number of features, which is about 1 for typical patches. A subject's
score is the mean of its patch scores. A healthy subject is scored with a distribution that was fitted without this
subject. The script writes

    unusual.csv         sid, score, worst_patch (row of atlas_patch_loc.npy)
    patch_scores.csv    sid, patch, value: input for emphysema_map.py --patch-labels, which maps scores over a scan
    unusual.json        AUROC of the score for separating healthy subjects from all others, with its 95 % interval;
                        with --baselines STORE also the AUROC of the same score of patch histograms
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.store import PatchStore
from misc.command import OneOf, Parser, UserError, run
from misc.files import check_writable, write_json, write_text
from misc.progress import add_progress_flag
from tools.evaluation.baselines import BINS, make_baseline_tables
from tools.evaluation.metrics import auroc
from tools.evaluation.normal import FEWEST, score_patch_abnormality
from tools.evaluation.splits import draw_resamples
from tools.evaluation.tables import read_healthy_and_known_masks, read_patch_features, read_patch_sids
from tools.evaluation.vectors import FILES, VECTORS

RESAMPLES = 1000


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--features-dir", required=True, help="output folder of extract_feature.py")
    text = (
        "patch features to score: 'layers' scores the mean and SD of every layer's channels; 'mean' and 'moments' both "
        "score the encoder's output"
    )
    text += " (default: layers if extract_feature.py ran with --layers, else mean)"
    add("--patient-vector", type=OneOf(*VECTORS), help=text)
    add("--labels", required=True, help="CSV with a sid column and the column named by --healthy")
    add(
        "--healthy",
        required=True,
        metavar="COLUMN",
        help="label column: 1 for healthy subjects, which define the normal features; 0 for all others",
    )
    add(
        "--baselines",
        metavar="STORE",
        help="patch store of the subjects in --features-dir; the histograms of their patches are scored as a baseline",
    )
    add("--out-dir", required=True, help="output folder")
    add_progress_flag(parser)
    return parser.parse_args()


def compute_auroc(score: np.ndarray, healthy: np.ndarray) -> dict[str, float]:
    """Return the AUROC of scores (n,) for detecting subjects that are not healthy, with its 95 % interval."""
    truth, both = (~healthy).astype(int), np.stack([-score, score], axis=1)
    weights = draw_resamples(np.arange(len(score)), RESAMPLES, seed=0)
    low, high = np.nanquantile(auroc(truth, both, weights), [0.025, 0.975])
    mean = auroc(truth, both, np.ones((len(score), 1)))[0]
    return {"auroc": float(mean), "low": float(low), "high": float(high)}


def main() -> None:
    args = parse_arguments()
    check_writable(Path(args.out_dir), "--out-dir")
    if args.patient_vector is None and (Path(args.features_dir) / FILES["layers"]).is_file():
        args.patient_vector = "layers"
    path = Path(args.features_dir) / FILES["layers" if args.patient_vector == "layers" else "moments"]
    features, sids = read_patch_features(path), read_patch_sids(path)
    healthy, known = read_healthy_and_known_masks(args.labels, sids, args.healthy, FEWEST)
    scores = {"features": score_patch_abnormality(features, healthy)}
    if args.baselines:
        store = PatchStore(args.baselines)
        if missing := set(sids) - set(store.sids):
            raise UserError(
                f"--baselines {args.baselines} lacks subject {min(missing)!r} of --features-dir; "
                "give the store that these features were extracted from"
            )
        table = (
            make_baseline_tables(store, args.no_progress, smoothed=False)["histogram_by_location"].loc[sids].to_numpy()
        )
        scores["histogram_by_location"] = score_patch_abnormality(table.reshape(len(sids), -1, BINS), healthy)
    found = {}
    if (known & ~healthy).any():
        found = {name: compute_auroc(patches.mean(axis=1)[known], healthy[known]) for name, patches in scores.items()}
    out_dir, ours = Path(args.out_dir), scores["features"]
    patients = pd.DataFrame({"sid": sids, "score": ours.mean(axis=1), "worst_patch": ours.argmax(axis=1)})
    write_text(out_dir / "unusual.csv", patients.round(5).to_csv(index=False))
    places = np.tile(np.arange(ours.shape[1]), len(sids))
    rows = pd.DataFrame({"sid": np.repeat(sids, ours.shape[1]), "patch": places, "value": ours.ravel().round(4)})
    write_text(out_dir / "patch_scores.csv", rows.to_csv(index=False))
    write_json(out_dir / "unusual.json", found)
    print(f"unusual: {len(sids)} subjects scored, {healthy.sum()} healthy subjects to learn from; {out_dir}")
    for name, figures in found.items():
        print(f"{name}: AUROC {figures['auroc']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})")


if __name__ == "__main__":
    run(main)
