"""The flags of train.py: names, bounds, published defaults and help."""

import argparse
import math
import os
from typing import Any

from misc.command import OneOf, Parser, UserError, at_least, between
from misc.experiment import Experiment
from misc.process import PATIENCE
from misc.progress import add_progress_flag
from misc.run.augmentation import add_augmentation_flags, refuse_unknown_letters
from misc.run.recipes import add_recipe
from misc.sizes import OPTIMIZERS


def parse_arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without the store."""
    parser = Parser(description)
    add_run(parser)
    add_method(parser)
    add_recipe(parser, argv)
    add_output(parser)
    args = parser.parse_args(argv)
    args.root_dir = os.path.abspath(args.root_dir)  # configs.json is read from elsewhere
    for name in ("subjects", "init_from", "batch_table"):
        setattr(args, name, getattr(args, name) and os.path.abspath(getattr(args, name)))
    try:
        refuse_contradictions(args)
        refuse_unknown_letters(args.augmentation)
        Experiment.named(args.exp_name)
    except UserError as error:
        parser.error(str(error))
    return args


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Raise UserError for a value, or two that do not go together, beyond what each flag's bounds say."""
    if args.init_from and args.resume not in ("", "auto"):
        raise UserError("--init-from begins a run and --resume goes on with one: give one of them, or --resume auto")
    if args.batch_by and (args.batch_by == ["report"]) == bool(args.batch_table):
        raise UserError("--batch-by takes report alone, or columns of --batch-table CSV")
    if args.batch_table and not args.batch_by:
        raise UserError("--batch-table: name its columns by --batch-by")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: below 2^32")
    if args.num_coordinates != 1:
        raise UserError(f"--num-coordinates {args.num_coordinates}: a location is one 3-D point, only 1 is defined")
    if not 0 < args.moco_t < math.inf:
        raise UserError(f"--moco-t {args.moco_t}: above 0")
    if args.gamma[0] > args.gamma[1]:
        raise UserError(f"--gamma {args.gamma[0]} {args.gamma[1]}: the smallest exponent comes first")
    if args.moco_k % args.batch_size:
        raise UserError(
            f"--moco-k {args.moco_k} is not a multiple of --batch-size {args.batch_size}; a queue takes whole batches, "
            f"use {max(1, args.moco_k // args.batch_size) * args.batch_size}"
        )


class Group:
    """A titled group of flags in the help; one call a flag: name, type, default, help."""

    def __init__(self, parser: Parser, title: str):
        self.group = parser.add_argument_group(title)

    def add(self, flag: str, kind: Any, default: Any, text: str, **more: Any) -> None:
        self.group.add_argument(flag, type=kind, default=default, help=text, **more)

    def switch(self, flag: str, text: str, **more: Any) -> None:
        self.group.add_argument(flag, help=text, **({"action": "store_true"} | more))


def add_run(parser: Parser) -> None:
    """Flags of the run: what it reads, how long it takes, what it computes on."""
    group = Group(parser, "the run")
    add, switch = group.add, group.switch
    add("--root-dir", str, None, "patch store made by preprocess/run_preprocess.sh", required=True)
    add("--exp-name", str, None, "name of the experiment's folder, ssl_exp/<exp-name>", required=True)
    add("--subjects", str, None, "CSV with a column sid: train on these subjects only, to hold others out")
    add("--resume", str, "", "auto: the latest checkpoint, or a new start; or a name in the folder; or a path")
    add("--init-from", str, None, "begin with this checkpoint's encoder, even of another store", metavar="CHECKPOINT")
    add("--start-epoch", at_least(int, 0), None, "count epochs from here instead of from the checkpoint's")
    add("--epochs", at_least(int, 1), 20, "visits to every location; raise it for few subjects")
    add("--seed", at_least(int, 0), 0, "of weights, queue, shuffling, augmentation; vary it to see what chance does")
    add("--device", OneOf("auto", "cpu", "cuda"), "auto", "auto takes a GPU if there is one")
    add(
        "--workers",
        at_least(int, 0),
        16,
        "data-loader workers per machine; raise it while GPUs wait; 0 has none",
    )
    add("--amp", OneOf("off", "bf16"), "off", "bf16: for GPUs from A100 on, and CPUs with AVX512-BF16 or AMX")
    switch("--tf32", "let float32 products use TF32 on GPUs: faster, 10-bit mantissa")
    add("--patience", at_least(float, 0.01), PATIENCE, "minutes to wait for a rank that hangs; raise it for slow disks")
    switch("--deterministic", "the same bytes again on a GPU too, as on a CPU anyway: slower convolutions")
    switch("--compile", "torch.compile the encoders, for long runs on GPUs; slower on CPUs (41 against 49 samples/s)")


def add_method(parser: Parser) -> None:
    """Flags of the method, with the published values as defaults."""
    group = Group(parser, "the method, with the published values as defaults")
    add, switch = group.add, group.switch
    count, size, amount = at_least(int, 1), at_least(int, 1), at_least(float, 0)
    add("--batch-size", size, 128, "subjects a step, over all ranks, at most the cohort; lower it for a small cohort")
    add("--lr", amount, 0.01, "learning rate at the start; raise it with the batch, lower it when the loss diverges")
    add("--lr-schedule", OneOf("cosine", "step"), "cosine", "cosine falls to 0 over --epochs; step follows --schedule")
    add("--schedule", int, [120, 160], "epochs at which 'step' divides the rate by 10", nargs="*")
    add("--optimizer", OneOf(*OPTIMIZERS), "sgd", "adamw, with --lr 0.001 --weight-decay 0.05, for runs of few steps")
    add("--momentum", amount, 0.9, "of SGD, beta 1 of AdamW; lower it when the loss swings")
    add("--weight-decay", amount, 1e-4, "of the optimiser; raise it if a small cohort is overfitted")
    add("--accumulate", count, 1, "batches whose mean gradient makes a step; raise it if memory allows no larger batch")
    add("--rep-dim", size, 128, "size of the representation h, the features; lower it for few subjects")
    add("--moco-dim", size, 128, "size of the projection z, compared in the loss")
    add("--moco-k", size, 4096, "keys in each location's queue, a multiple of the batch; at most half the cohort")
    add("--moco-m", between(float, 0, 1), 0.999, "momentum of the key encoder; lower it for runs of few steps")
    add("--moco-t", float, 0.2, "temperature; raise it when negatives are few, lower it to tell near ones apart")
    add("--num-experts", count, 8, "kernels that every convolution mixes by location; 1 switches conditioning off")
    add("--num-coordinates", int, 1, "points per location; 1 is the only value defined")
    add("--k-neighbors", count, 2, "nearest locations in the neighbour task; more see farther and take longer")
    add("--beta", amount, 1.0, "weight of the neighbour loss; lower it if neighbours differ too much; 0 reads none")
    add("--warm-up", at_least(int, 0), 0, "epochs before the neighbour loss counts; raise it when it hurts the start")
    add_augmentation_flags(group.group)
    add("--negatives", OneOf("queue", "batch"), "queue", "batch: keys of this step, for few subjects")
    add(
        "--bn-groups",
        count,
        None,
        "groups with own BatchNorm statistics (default: 4, or what the batch allows)",
    )
    text = (
        "deal similar scans to a step, so that scanner and breath give no key away: report (the store's own reports: "
    )
    text += "volume, density, slices, kernel), or columns of --batch-table"
    add("--batch-by", str, None, text, nargs="+", metavar="COLUMN")
    add("--batch-table", str, None, "CSV with sid and how each subject was scanned, for --batch-by", metavar="CSV")
    add("--location-order", OneOf("sequential", "interleaved"), "sequential", "interleaved: for younger queues")
    switch("--mask-own", "leave a subject's own keys out of its queue's negatives; if --moco-k exceeds the cohort")
    switch("--one-queue", "one queue for all locations, to see what one each gains; give it a larger --moco-k")
    switch("--no-mlp", "project with one linear layer (MoCo v1) instead of two", dest="mlp", action="store_false")


def add_output(parser: Parser) -> None:
    """Flags of what a run writes."""
    group = Group(parser, "output")
    add = group.add
    add("--print-freq", at_least(int, 1), 10, "steps between log lines; lower it to watch a short run")
    add(
        "--save-freq",
        at_least(int, 1),
        1,
        "epochs between checkpoints; raise it for a small disk; the last is kept",
    )
    add("--keep", at_least(int, 0), 0, "checkpoints to keep, the latest; 0 keeps every epoch's")
    add("--save-minutes", at_least(float, 0), 30.0, "between saves in an epoch, 0 for none; lower it if machines fail")
    group.switch("--save-initial", "save checkpoint_patch_0000 too: an untrained encoder to compare")
    add_progress_flag(group.group)
    add("--arch", str, "custom", "name kept in the checkpoint")
