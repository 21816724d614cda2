"""Fine-tune a checkpoint, or random weights, on a fraction of the labels, to measure label efficiency.

    python tools/finetune.py --root-dir /data/patches --checkpoint ssl_exp/NAME/checkpoint_patch_0020.pth.tar random \\
        --labels labels.csv --column GOLD --fractions 0.05 0.1 0.5 1 --out-dir finetuned

The script learns one label column from the patches of each subject. A column with two values is learned as classes, a
column with a few whole numbers as grades, and any other column by regression. With --patch-labels CSV (sid, patch,
value), the script learns from the labels of single patches.

--layers frozen trains a linear head on the features. --layers last also trains the last two convolutions, and --layers
all trains everything. Every arm (a checkpoint or random weights) gets the same subjects. Each seed selects a test set
and the order of the other subjects. A fraction of 0.1 takes the first 10 % of the shuffled subjects, and uses a quarter
of these for early stopping.

Run the same command again to resume; finished fits are not repeated. The script writes to --out-dir

    fits/{arm}-{fraction}-{seed}.json      metrics of the test subjects
    curve.csv, curve.png                   metrics by number of labelled subjects, for every fit
    curve.md                               mean and SD over seeds
    {arm}.pth.tar                          encoder_q and head of the largest fraction and first seed
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.labels import explain_missing_column, read_numbers_and_words
from data.layout import StoreError
from data.locations import normalize_locations
from data.store import PatchStore
from misc import process
from misc.command import OneOf, Parser, at_least, between, run
from misc.files import write_json, write_text
from misc.progress import add_progress_flag, progress_bar
from models.checkpoint import save_checkpoint
from models.cnn3d import Encoder
from models.fast.memory import keep_freed_memory_in_process
from tools.evaluation.kinds import KINDS, guess_kind_of_words
from tools.evaluation.metrics import METRICS
from tools.evaluation.tables import add_label_flags, read_held_out_subjects
from tools.evaluation.vectors import VECTORS
from tools.finetuning.curve import format_markdown, plot_curve
from tools.finetuning.fit import Data, Fitted, fine_tune_and_predict
from tools.finetuning.network import LAYERS, POOLINGS, load_encoder
from tools.finetuning.tasks import Split, Task, draw_split, make_subject_task, read_patch_label_task


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root-dir", required=True, help="patch store, grouped by preprocess/group_patches.py")
    add(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="PATH|random",
        help="checkpoints to fine-tune and compare; random stands for untrained weights",
    )
    add("--sha256", help="expected SHA-256 of the first checkpoint; set it to verify downloaded weights")
    add(
        "--labels",
        help="CSV with a sid column and label columns, each numeric or categorical (at most 10 distinct words)",
    )
    add("--column", help="column of --labels to predict")
    add_label_flags(parser)
    add(
        "--patch-labels",
        metavar="CSV",
        help="CSV with the columns sid, patch and value, one labelled patch per row; replaces --labels",
    )
    kinds = tuple(kind for kind in KINDS if kind != "log10")
    add("--kind", type=OneOf(*kinds), help="kind of the label (default: guessed from the values)")
    text = "column of --labels: 1 for test subjects, 0 for others (default: 30 %% of the subjects, drawn for each seed)"
    add("--held-out", metavar="COLUMN", help=text)
    text = "fractions of the labelled training subjects to use; each fraction is one point of the learning curve"
    add("--fractions", nargs="+", type=between(float, 0, 1), default=[0.05, 0.1, 0.25, 0.5, 1.0], help=text)
    add(
        "--layers",
        type=OneOf(*LAYERS),
        default="frozen",
        help="encoder layers to train in addition to the head; use all if there are many labels",
    )
    text = "how the patches of a subject are combined; use attention if only a few patches show the disease"
    add("--pooling", type=OneOf(*POOLINGS), default="mean", help=text)
    text = "features of a frozen encoder: mean, moments (mean and SD over patches, standardised per location) or layers"
    text += (
        " (moments of every layer) (default: layers; mean with --patch-labels, or if --layers or --pooling is changed)"
    )
    add("--patient-vector", type=OneOf(*VECTORS), help=text)
    add(
        "--seeds",
        type=at_least(int, 1),
        default=3,
        help="number of seeds; each seed gives a different split and different weights; raise it if results vary a lot",
    )
    add(
        "--device",
        type=OneOf("auto", "cpu", "cuda"),
        default="auto",
        help="device for training; auto uses a GPU if there is one",
    )
    add("--out-dir", required=True, help="output folder; give the same folder again to resume")
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.patch_labels) == bool(args.labels) or bool(args.labels) != bool(args.column):
        parser.error("give either --labels with --column, or --patch-labels")
    if args.held_out and not args.labels:
        parser.error("--held-out names a column of --labels; give --labels")
    fixed = args.labels and args.layers == "frozen" and args.pooling == "mean"
    args.patient_vector = args.patient_vector or ("layers" if fixed else "mean")
    if args.patient_vector != "mean" and not fixed:
        parser.error(f"--patient-vector {args.patient_vector} needs --labels, --layers frozen and --pooling mean")
    return args


class Arm:
    """An encoder to start fine-tuning from.

    Args:
        checkpoint_or_random: path of a checkpoint, or "random".
        model_sizes: sizes of an encoder with random weights; None for the default sizes.
        store: the patch store.
        sha256: expected SHA-256 of the checkpoint.
    """

    def __init__(
        self, checkpoint_or_random: str, model_sizes: dict | None, store: PatchStore, sha256: str | None = None
    ):
        self.random = checkpoint_or_random == "random"
        self.name = "random" if self.random else Path(checkpoint_or_random).name.removesuffix(".pth.tar")
        self.sizes = model_sizes or {"rep_dim": 128, "moco_dim": 128, "num_experts": 8, "num_coordinates": 1}
        self._encoder = None
        if not self.random:
            self._encoder, self.sizes = load_encoder(checkpoint_or_random, store, sha256)

    def prepare_encoder_and_features(
        self, seed: int, data: Data, task: Task, layers: bool
    ) -> tuple[Encoder, torch.Tensor]:
        """Return the encoder and its representations of all patches, (N, L, D). ``seed`` sets random weights."""
        encoder = self._encoder
        if self.random:
            torch.manual_seed(seed)
            encoder = Encoder(**{name: value for name, value in self.sizes.items() if name != "mlp"})
            calibrate_batchnorm(encoder.to(data.locations.device), data, np.unique(task.rows)[:16])
        encoder = encoder.to(data.locations.device)
        return encoder, data.encode(encoder, np.arange(data.store.num_subjects), layers)


def calibrate_batchnorm(encoder: Encoder, data: Data, rows: np.ndarray) -> None:
    """Compute BatchNorm statistics for random weights from the patches of a few subjects at every location.

    With the initial BatchNorm statistics, the representations would carry no information.
    """
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = None  # None: the running statistics are the plain mean over all passes
    encoder.train()
    with torch.no_grad():
        for place in range(len(data.locations)):
            encoder(data.read_patches(rows, np.array([place])), data.locations[place : place + 1])
    encoder.eval()


def compute_fit_metrics(task: Task, split: Split, fitted: Fitted) -> dict[str, float]:
    """Return the numbers of subjects, labels and training rounds, and the metrics on the test labels."""
    learnt = np.concatenate([split.train, split.validation])
    truth, ones = task.target[split.test], np.ones((len(split.test), 1))
    found = {name: float(metric(truth, fitted.predicted, ones)[0]) for name, metric in METRICS[task.kind].items()}
    return {"patients": len(np.unique(task.rows[learnt])), "labels": len(learnt), "rounds": fitted.rounds, **found}


def make_checkpoint(task: Task, fitted: Fitted) -> dict:
    """Return a checkpoint that extract_feature.py can read, with the head as an additional entry."""
    state = {f"module.encoder_q.{key}": value for key, value in fitted.encoder.state_dict().items()}
    head = {"state_dict": fitted.head.state_dict(), "kind": task.kind, "classes": [float(one) for one in task.classes]}
    if fitted.standardization is not None:
        kind, mean, factor = fitted.standardization
        head |= {"patient_vector": kind, "location_mean": torch.from_numpy(mean)}
        head["location_factor"] = torch.from_numpy(factor)
    return {"state_dict": state, "head": head}


def read_task_and_held_out_mask(args: argparse.Namespace, store: PatchStore) -> tuple[Task, np.ndarray | None]:
    """Read the labels to predict and, with --held-out, the held-out subjects (N,) bool. Raises StoreError."""
    if args.patch_labels:
        return read_patch_label_task(args.patch_labels, store.sids, store.num_locations, args.kind), None

    def print_note_if_on_label_column(text: str) -> None:
        if repr(args.column) in text:
            print(f"note: {text}", file=sys.stderr)

    values, names, words = read_numbers_and_words(
        args.labels, store.sids, print_note_if_on_label_column, dict(args.order), args.missing
    )
    if args.column not in names:
        raise StoreError(explain_missing_column(args.labels, args.column, names))
    held_out = read_held_out_subjects(values, names, args.held_out, args.labels) if args.held_out else None
    target = values[:, names.index(args.column)].astype(np.float64)
    kind = args.kind or guess_kind_of_words(args.column, words, dict(args.order)) or None
    task = make_subject_task(store.sids, target, args.column, kind)
    return task, held_out


def main() -> None:
    args = parse_arguments()
    store = PatchStore(args.root_dir, require_grouped=True)
    task, held_out = read_task_and_held_out_mask(args, store)
    device = process.set_up_process(args.device)
    if device.type == "cpu":
        keep_freed_memory_in_process()
    arms, sizes = [], None
    for given in sorted(
        args.checkpoint, key=lambda given: given == "random"
    ):  # "random" comes last, because a random encoder takes its sizes from the checkpoints
        arms.append(Arm(given, sizes, store, args.sha256 if given == args.checkpoint[0] else None))
        sizes = arms[-1].sizes
    data = Data(store, torch.from_numpy(normalize_locations(store.locations)).to(device))
    splits = {
        (fraction, seed): draw_split(task, fraction, seed, held_out)
        for fraction in sorted(set(args.fractions))
        for seed in range(args.seeds)
    }
    out_dir = Path(args.out_dir)
    (out_dir / "fits").mkdir(parents=True, exist_ok=True)

    rows = []
    with progress_bar(args.no_progress, total=len(arms) * len(splits), desc="finetune", unit="fit") as bar:
        for arm in arms:
            prepared: tuple[int, Encoder, torch.Tensor] | None = None
            for (fraction, seed), split in sorted(splits.items(), key=lambda item: item[0][::-1]):
                kept = out_dir / "fits" / f"{arm.name}-{fraction:g}-{seed}.json"
                if not kept.is_file():
                    drawn = seed if arm.random else 0  # only random weights depend on the seed
                    if prepared is None or prepared[0] != drawn:
                        prepared = (
                            drawn,
                            *arm.prepare_encoder_and_features(drawn, data, task, args.patient_vector == "layers"),
                        )
                    given = (
                        copy.deepcopy(prepared[1]),
                        args.layers,
                        args.pooling,
                        seed,
                        prepared[2],
                        args.patient_vector,
                    )
                    fitted = fine_tune_and_predict(task, split, data, *given)
                    if seed == 0 and fraction == max(args.fractions):
                        save_checkpoint(out_dir / f"{arm.name}.pth.tar", make_checkpoint(task, fitted))
                    write_json(
                        kept,
                        {
                            "arm": arm.name,
                            "fraction": fraction,
                            "seed": seed,
                            **compute_fit_metrics(task, split, fitted),
                        },
                    )
                rows.append(json.loads(kept.read_text(encoding="utf-8")))
                bar.update()
    table = pd.DataFrame(rows)
    metric = next(iter(METRICS[task.kind]))
    write_text(out_dir / "curve.csv", table.to_csv(index=False))
    text = format_markdown(table, list(METRICS[task.kind]))
    write_text(out_dir / "curve.md", text)
    plot_curve(table, metric, out_dir / "curve.png")
    print(text)


if __name__ == "__main__":
    run(main)
