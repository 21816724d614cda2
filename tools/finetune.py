"""How many labels does it take? Fine-tuning from a checkpoint and from random weights, with a share of the labels.

    python tools/finetune.py --root-dir /data/patches --checkpoint ssl_exp/NAME/checkpoint_patch_0020.pth.tar random \\
        --labels labels.csv --column GOLD --fractions 0.05 0.1 0.5 1 --out-dir finetuned

Learns a column (two values as classes, a few whole numbers as grades, others as numbers) from patients' patches, or
with --patch-labels CSV (sid, patch, value) from single patches. --layers frozen trains a linear head on the features,
last the last two convolutions too, all everything. Every arm gets the same patients: for each seed a test set, and of
the others the first share of a shuffled list, a quarter of it to stop by.

A run stopped goes on; a finished fit is not done again. Writes, in --out-dir,

    fits/{arm}-{fraction}-{seed}.json      figures of the test patients
    curve.csv, curve.png                   label efficiency: figure by number of labelled patients, every fit
    curve.md                               mean and SD over seeds
    {arm}.pth.tar                          of the largest fraction and first seed: encoder_q and head
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

from data.labels import read_numbers_and_words, why_no_column
from data.layout import StoreError
from data.locations import normalize_locations
from data.store import PatchStore
from misc import process
from misc.command import OneOf, Parser, at_least, between, run
from misc.files import write_json, write_text
from misc.progress import add_progress_flag, progress_bar
from models.checkpoint import save_checkpoint
from models.cnn3d import Encoder
from models.fast.memory import keep_freed_memory
from tools.evaluation.kinds import KINDS, kind_of_words
from tools.evaluation.metrics import METRICS
from tools.evaluation.tables import add_label_flags, held_out_rows
from tools.evaluation.vectors import VECTORS
from tools.finetuning.curve import draw, markdown
from tools.finetuning.fit import Data, Fitted, fit
from tools.finetuning.network import LAYERS, POOLINGS, trained_encoder
from tools.finetuning.tasks import Split, Task, draw_split, patch_task, patient_task


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root-dir", required=True, help="patch store, grouped")
    add(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="PATH|random",
        help="where arms start; random: untrained weights",
    )
    add("--sha256", help="of the first checkpoint; another file is refused, for weights that were downloaded")
    add("--labels", help="CSV with sid and columns of numbers or of a few words")
    add("--column", help="of the labels, to learn")
    add_label_flags(parser)
    add("--patch-labels", metavar="CSV", help="sid, patch, value: labels of single patches, in place of --labels")
    kinds = tuple(kind for kind in KINDS if kind != "log10")
    add("--kind", type=OneOf(*kinds), help="of the label, where the guess is wrong")
    text = "column of --labels, 1 for patients to test on (default: three in ten, others with each seed)"
    add("--held-out", metavar="COLUMN", help=text)
    text = "shares of the labelled patients that are not tested on"
    add("--fractions", nargs="+", type=between(float, 0, 1), default=[0.05, 0.1, 0.25, 0.5, 1.0], help=text)
    add("--layers", type=OneOf(*LAYERS), default="frozen", help="what is trained beside the head; all for many labels")
    text = "of a patient's patches; attention where disease is in few of them"
    add("--pooling", type=OneOf(*POOLINGS), default="mean", help=text)
    text = "of a frozen encoder: layers (mean and SD of every layer, standardised per location), moments (the same of "
    text += "h), or mean (default: layers, but mean with --patch-labels, another --layers or --pooling)"
    add("--patient-vector", type=OneOf(*VECTORS), help=text)
    add(
        "--seeds",
        type=at_least(int, 1),
        default=3,
        help="of split, order and random weights; raise it where they differ",
    )
    add("--device", type=OneOf("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--out-dir", required=True, help="folder of the fits; give the same to go on")
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.patch_labels) == bool(args.labels) or bool(args.labels) != bool(args.column):
        parser.error("give --labels and --column, or --patch-labels")
    if args.held_out and not args.labels:
        parser.error("--held-out is a column of --labels")
    fixed = args.labels and args.layers == "frozen" and args.pooling == "mean"
    args.patient_vector = args.patient_vector or ("layers" if fixed else "mean")
    if args.patient_vector != "mean" and not fixed:
        parser.error(f"--patient-vector {args.patient_vector} goes with --labels, --layers frozen and --pooling mean")
    return args


class Arm:
    """An encoder to start from."""

    def __init__(self, given: str, sizes: dict | None, store: PatchStore, sha256: str | None = None):
        self.random = given == "random"
        self.name = "random" if self.random else Path(given).name.removesuffix(".pth.tar")
        self.sizes = sizes or {"rep_dim": 128, "moco_dim": 128, "num_experts": 8, "num_coordinates": 1}
        self._encoder = None
        if not self.random:
            self._encoder, self.sizes = trained_encoder(given, store, sha256)

    def prepare(self, seed: int, data: Data, task: Task, layers: bool) -> tuple[Encoder, torch.Tensor]:
        """The encoder, of random weights drawn by the seed, and the representations that it gives, (N, L, D)."""
        encoder = self._encoder
        if self.random:
            torch.manual_seed(seed)
            encoder = Encoder(**{name: value for name, value in self.sizes.items() if name != "mlp"})
            calibrate(encoder.to(data.locations.device), data, np.unique(task.rows)[:16])
        encoder = encoder.to(data.locations.device)
        return encoder, data.encode(encoder, np.arange(data.store.num_subjects), layers)


def calibrate(encoder: Encoder, data: Data, rows: np.ndarray) -> None:
    """BatchNorm statistics for random weights, of a few patients' patches at every location: else h says nothing."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = None  # the plain mean over the passes
    encoder.train()
    with torch.no_grad():
        for place in range(len(data.locations)):
            encoder(data.read(rows, np.array([place])), data.locations[place : place + 1])
    encoder.eval()


def describe(task: Task, split: Split, fitted: Fitted) -> dict[str, float]:
    """How much was learnt from, and the kind's figures of the test labels."""
    learnt = np.concatenate([split.train, split.validation])
    truth, ones = task.target[split.test], np.ones((len(split.test), 1))
    found = {name: float(metric(truth, fitted.predicted, ones)[0]) for name, metric in METRICS[task.kind].items()}
    return {"patients": len(np.unique(task.rows[learnt])), "labels": len(learnt), "rounds": fitted.rounds, **found}


def as_checkpoint(task: Task, fitted: Fitted) -> dict:
    """What extract_feature.py reads, and the head beside it."""
    state = {f"module.encoder_q.{key}": value for key, value in fitted.encoder.state_dict().items()}
    head = {"state_dict": fitted.head.state_dict(), "kind": task.kind, "classes": [float(one) for one in task.classes]}
    if fitted.standardization is not None:
        kind, mean, factor = fitted.standardization
        head |= {"patient_vector": kind, "location_mean": torch.from_numpy(mean)}
        head["location_factor"] = torch.from_numpy(factor)
    return {"state_dict": state, "head": head}


def read_task(args: argparse.Namespace, store: PatchStore) -> tuple[Task, np.ndarray | None]:
    """What is learnt, and who is held out where the table says. Raises StoreError."""
    if args.patch_labels:
        return patch_task(args.patch_labels, store.sids, store.num_locations, args.kind), None

    def say(text: str) -> None:
        if repr(args.column) in text:
            print(f"note: {text}", file=sys.stderr)

    values, names, words = read_numbers_and_words(args.labels, store.sids, say, dict(args.order), args.missing)
    if args.column not in names:
        raise StoreError(why_no_column(args.labels, args.column, names))
    held_out = held_out_rows(values, names, args.held_out, args.labels) if args.held_out else None
    target = values[:, names.index(args.column)].astype(np.float64)
    kind = args.kind or kind_of_words(args.column, words, dict(args.order)) or None
    task = patient_task(store.sids, target, args.column, kind)
    return task, held_out


def main() -> None:
    args = parse_arguments()
    store = PatchStore(args.root_dir, require_grouped=True)
    task, held_out = read_task(args, store)
    device = process.start_process(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    arms, sizes = [], None
    for given in sorted(args.checkpoint, key=lambda given: given == "random"):  # random takes the others' sizes
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
                    drawn = seed if arm.random else 0  # a checkpoint is the same for every seed
                    if prepared is None or prepared[0] != drawn:
                        prepared = (drawn, *arm.prepare(drawn, data, task, args.patient_vector == "layers"))
                    given = (
                        copy.deepcopy(prepared[1]),
                        args.layers,
                        args.pooling,
                        seed,
                        prepared[2],
                        args.patient_vector,
                    )
                    fitted = fit(task, split, data, *given)
                    if seed == 0 and fraction == max(args.fractions):
                        save_checkpoint(out_dir / f"{arm.name}.pth.tar", as_checkpoint(task, fitted))
                    write_json(
                        kept, {"arm": arm.name, "fraction": fraction, "seed": seed, **describe(task, split, fitted)}
                    )
                rows.append(json.loads(kept.read_text(encoding="utf-8")))
                bar.update()
    table = pd.DataFrame(rows)
    metric = next(iter(METRICS[task.kind]))
    write_text(out_dir / "curve.csv", table.to_csv(index=False))
    text = markdown(table, list(METRICS[task.kind]))
    write_text(out_dir / "curve.md", text)
    draw(table, metric, out_dir / "curve.png")
    print(text)


if __name__ == "__main__":
    run(main)
