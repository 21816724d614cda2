"""Command-line flags of train.py: names, bounds, published defaults and help texts."""

import argparse
import math
import os
from typing import Any

from misc.command import OneOf, Parser, UserError, at_least, between
from misc.experiment import Experiment
from misc.process import PATIENCE
from misc.progress import add_progress_flag
from misc.run.augmentation import add_augmentation_flags, check_augmentation_letters
from misc.run.recipes import add_recipe_flag
from misc.sizes import OPTIMIZERS


def parse_arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and check everything that does not need the store."""
    parser = Parser(description)
    add_run_flags(parser)
    add_hyperparameter_flags(parser)
    add_recipe_flag(parser, argv)
    add_output_flags(parser)
    args = parser.parse_args(argv)
    # The paths are absolute, because a script started in another folder may read configs.json.
    args.root_dir = os.path.abspath(args.root_dir)
    for name in ("subjects", "init_from", "batch_table"):
        setattr(args, name, getattr(args, name) and os.path.abspath(getattr(args, name)))
    try:
        refuse_contradictions(args)
        check_augmentation_letters(args.augmentation)
        Experiment.from_name(args.exp_name)
    except UserError as error:
        parser.error(str(error))
    return args


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Raise UserError for invalid values and conflicting flags that the bounds of a single flag cannot catch."""
    if args.init_from and args.resume not in ("", "auto"):
        raise UserError(
            "--init-from starts a new run, but --resume continues an earlier run; drop one flag, or use --resume auto"
        )
    if args.batch_by and (args.batch_by == ["report"]) == bool(args.batch_table):
        raise UserError("--batch-by takes either the single word 'report', or column names together with --batch-table")
    if args.batch_table and not args.batch_by:
        raise UserError("--batch-table needs --batch-by with column names from that table")
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed} is too large; use a number below 2^32")
    if args.num_coordinates != 1:
        raise UserError(
            f"--num-coordinates {args.num_coordinates} is not supported; use 1, that is, one 3-D point per location"
        )
    if not 0 < args.moco_t < math.inf:
        raise UserError(f"--moco-t {args.moco_t} must be a finite number above 0")
    if args.gamma[0] > args.gamma[1]:
        raise UserError(
            f"--gamma {args.gamma[0]} {args.gamma[1]} is in the wrong order; give the smaller exponent first"
        )
    if args.moco_k % args.batch_size:
        raise UserError(
            f"--moco-k {args.moco_k} is not a multiple of --batch-size {args.batch_size}, but a queue holds whole "
            f"batches; use {max(1, args.moco_k // args.batch_size) * args.batch_size}"
        )


class Group:
    """A titled group of flags in the help. Each call of ``add_flag`` or ``add_switch`` defines one flag."""

    def __init__(self, parser: Parser, title: str):
        self.group = parser.add_argument_group(title)

    def add_flag(self, flag: str, kind: Any, default: Any, text: str, **more: Any) -> None:
        self.group.add_argument(flag, type=kind, default=default, help=text, **more)

    def add_switch(self, flag: str, text: str, **more: Any) -> None:
        self.group.add_argument(flag, help=text, **({"action": "store_true"} | more))


def add_run_flags(parser: Parser) -> None:
    """Add the flags for input, length and hardware of the run."""
    group = Group(parser, "the run")
    add, switch = group.add_flag, group.add_switch
    add("--root-dir", str, None, "patch store made by preprocess/run_preprocess.sh", required=True)
    add("--exp-name", str, None, "name of the experiment folder, ssl_exp/<exp-name>", required=True)
    add("--subjects", str, None, "CSV with a column sid; train only on these subjects, for example to hold out others")
    add("--resume", str, "", "auto (latest checkpoint, or a new run), a checkpoint name in the experiment, or a path")
    add(
        "--init-from",
        str,
        None,
        "start from the encoder of this checkpoint, which may come from another store",
        metavar="CHECKPOINT",
    )
    add(
        "--start-epoch",
        at_least(int, 0),
        None,
        "number of finished epochs to assume, instead of the number in the checkpoint",
    )
    add("--epochs", at_least(int, 1), 20, "passes over all locations; raise it if there are few subjects")
    add(
        "--seed",
        at_least(int, 0),
        0,
        "seed of weights, queue, shuffling and augmentation; vary it to measure the spread",
    )
    add("--device", OneOf("auto", "cpu", "cuda"), "auto", "device to train on; auto uses a GPU if available")
    add(
        "--workers",
        at_least(int, 0),
        16,
        "data-loader workers per machine; raise it if GPUs wait for data; 0 reads in the main process",
    )
    add(
        "--amp",
        OneOf("off", "bf16"),
        "off",
        "mixed precision; use bf16 on A100 or newer GPUs, or on CPUs with AVX512-BF16 or AMX",
    )
    switch("--tf32", "use TF32 for float32 products on GPUs: faster, with a 10-bit mantissa")
    add("--patience", at_least(float, 0.01), PATIENCE, "minutes to wait for a hanging rank; raise it for slow disks")
    switch(
        "--deterministic", "make GPU results reproducible to the byte, as CPU results always are; slower convolutions"
    )
    switch(
        "--compile",
        "apply torch.compile to the encoders, for long GPU runs; slower on CPUs (41 instead of 49 samples/s)",
    )


def add_hyperparameter_flags(parser: Parser) -> None:
    """Add the flags of the method, with the published values as defaults."""
    group = Group(parser, "the method, with the published values as defaults")
    add, switch = group.add_flag, group.add_switch
    count, size, amount = at_least(int, 1), at_least(int, 1), at_least(float, 0)
    add(
        "--batch-size",
        size,
        128,
        "subjects per step over all ranks, at most the cohort size; lower it for a small cohort",
    )
    add("--lr", amount, 0.01, "initial learning rate; raise it with the batch size, lower it if the loss diverges")
    add("--lr-schedule", OneOf("cosine", "step"), "cosine", "cosine decays to 0 over --epochs; step uses --schedule")
    add(
        "--schedule",
        int,
        [120, 160],
        "epochs at which --lr-schedule step divides the learning rate by 10",
        nargs="*",
    )
    add(
        "--optimizer", OneOf(*OPTIMIZERS), "sgd", "optimiser; for short runs, adamw with --lr 0.001 --weight-decay 0.05"
    )
    add("--momentum", amount, 0.9, "SGD momentum, or beta 1 of AdamW; lower it if the loss oscillates")
    add("--weight-decay", amount, 1e-4, "weight decay of the optimiser; raise it if a small cohort is overfitted")
    add(
        "--accumulate",
        count,
        1,
        "number of batches to average the gradient over in one step; raise it if a larger batch does not fit in memory",
    )
    add("--rep-dim", size, 128, "size of the representation h, which becomes the features; lower it for few subjects")
    add("--moco-dim", size, 128, "size of the projection z that the loss compares")
    add("--moco-k", size, 4096, "keys in each queue, a multiple of the batch size; use at most half the cohort size")
    add("--moco-m", between(float, 0, 1), 0.999, "momentum of the key encoder; lower it for short runs")
    add("--moco-t", float, 0.2, "softmax temperature; raise it if negatives are few, lower it to separate similar ones")
    add("--num-experts", count, 8, "expert kernels per convolution, mixed by location; 1 turns conditioning off")
    add("--num-coordinates", int, 1, "points per location; only 1 is supported")
    add("--k-neighbors", count, 2, "nearest locations in the neighbour task; more cover a wider area and take longer")
    add("--beta", amount, 1.0, "weight of the neighbour loss; lower it if neighbours differ too much, 0 turns it off")
    add(
        "--warm-up",
        at_least(int, 0),
        0,
        "epochs without the neighbour loss; raise it if that loss hurts early training",
    )
    add_augmentation_flags(group.group)
    add(
        "--negatives",
        OneOf("queue", "batch"),
        "queue",
        "source of negatives; batch uses the keys of the same step and suits small cohorts",
    )
    add(
        "--bn-groups",
        count,
        None,
        "groups with separate BatchNorm statistics (default: 4, or as the ranks and the batch size require)",
    )
    text = "put similar scans in the same batch, so that scanner and breath-hold level do not reveal the positive key"
    text += "; report compares lung volume, density, slice thickness and kernel; other columns need --batch-table"
    add("--batch-by", str, None, text, nargs="+", metavar="COLUMN")
    add("--batch-table", str, None, "CSV with sid and the scan parameters that --batch-by names", metavar="CSV")
    add(
        "--location-order",
        OneOf("sequential", "interleaved"),
        "sequential",
        "order of steps in an epoch; interleaved visits locations in short turns, so queue keys are more recent",
    )
    switch("--mask-own", "exclude a subject's own keys from its negatives; use it if --moco-k exceeds the cohort size")
    switch("--one-queue", "share one queue among all locations, as an ablation; use a larger --moco-k")
    switch(
        "--no-mlp", "use one linear layer as the projection (MoCo v1) instead of two", dest="mlp", action="store_false"
    )


def add_output_flags(parser: Parser) -> None:
    """Add the flags for logging and checkpoints."""
    group = Group(parser, "output")
    add = group.add_flag
    add("--print-freq", at_least(int, 1), 10, "steps between log lines; lower it to follow a short run")
    add(
        "--save-freq",
        at_least(int, 1),
        1,
        "epochs between checkpoints; raise it to save disk space; the last epoch is always saved",
    )
    add("--keep", at_least(int, 0), 0, "number of latest checkpoints to keep; 0 keeps all")
    add(
        "--save-minutes",
        at_least(float, 0),
        30.0,
        "minutes between saves within an epoch; lower it if machines fail; 0 turns these saves off",
    )
    group.add_switch("--save-initial", "also save checkpoint_patch_0000, the untrained encoder, for comparison")
    add_progress_flag(group.group)
    add("--arch", str, "custom", "architecture name to record in the checkpoint")
