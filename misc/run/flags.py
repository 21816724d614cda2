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
    args.subjects, args.init_from = (path and os.path.abspath(path) for path in (args.subjects, args.init_from))
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
    if args.seed >= 2**32:
        raise UserError(f"--seed {args.seed}: below 2^32")
    if args.num_coordinates != 1:
        raise UserError(f"--num-coordinates {args.num_coordinates}: a location is one 3-D point, only 1 is defined")
    if not 0 < args.moco_t < math.inf:
        raise UserError(f"--moco-t {args.moco_t}: above 0")
    if args.moco_k % args.batch_size:
        raise UserError(
            f"--moco-k {args.moco_k} is not a multiple of --batch-size {args.batch_size}; a queue takes whole batches, "
            f"use {max(1, args.moco_k // args.batch_size) * args.batch_size}"
        )


def add_run(parser: Parser) -> None:
    """Flags of the run: what it reads, how long it takes, what it computes on."""
    add = parser.add_argument_group("the run").add_argument
    add("--root-dir", required=True, help="patch store made by preprocess/run_preprocess.sh")
    add(
        "--exp-name",
        required=True,
        help="experiments go to ssl_exp/<exp-name> under the current folder; extract_feature.py wants that folder",
    )
    add("--subjects", help="CSV with a column sid: train on these subjects only, to hold others out")
    add(
        "--resume",
        default="",
        help="auto: the experiment's latest checkpoint, or a new start if it has none; or a name in its folder; "
        "or a path",
    )
    add(
        "--init-from",
        metavar="CHECKPOINT",
        help="begin with the encoder's weights of this checkpoint, whatever its queue and locations, for example for "
        "another cohort",
    )
    add(
        "--start-epoch",
        type=at_least(int, 0),
        help="count epochs from here instead of from the checkpoint's; to train on weights of another cohort, 0",
    )
    add(
        "--epochs",
        type=at_least(int, 1),
        default=20,
        help="epochs in all; each visits every location once; raise it for few subjects, whose epochs are short",
    )
    add(
        "--seed",
        type=at_least(int, 0),
        default=0,
        help="of weights, queue, shuffling and augmentation; vary it to see how much a result depends on chance",
    )
    add("--device", type=OneOf("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    add(
        "--workers",
        type=at_least(int, 0),
        default=16,
        help="data-loader workers on this machine, shared by its ranks, no more than its cores; raise it while GPUs "
        "wait for data, lower it if memory is short; 0 reads in the main process",
    )
    add(
        "--amp",
        type=OneOf("off", "bf16"),
        default="off",
        help="bf16 computes the encoder in bfloat16: for GPUs from A100 on and CPUs with AVX512-BF16 or AMX",
    )
    add("--tf32", action="store_true", help="let float32 products use TF32 on GPUs: faster, 10-bit mantissa")
    add(
        "--patience",
        type=at_least(float, 0.01),
        default=PATIENCE,
        help="minutes that ranks wait for one that hangs; raise it for slow disks",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bytes again on a GPU too, as on a CPU anyway: slower convolutions",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the encoders, for long runs on GPUs; on CPUs it measured slower, 41 against 49 samples/s",
    )


def add_method(parser: Parser) -> None:
    """Flags of the method, with the published values as defaults."""
    group = parser.add_argument_group("the method, with the published values as defaults")

    def add(flag: str, kind: Any, default: Any, text: str, **more: Any) -> None:
        group.add_argument(flag, type=kind, default=default, help=text, **more)

    count, size, amount = at_least(int, 1), at_least(int, 1), at_least(float, 0)
    add("--batch-size", size, 128, "subjects a step, over all ranks, at most the cohort; lower it for a small cohort")
    add("--lr", amount, 0.01, "learning rate at the start; raise it with the batch, lower it when the loss diverges")
    add("--lr-schedule", OneOf("cosine", "step"), "cosine", "cosine falls to 0 over --epochs; step follows --schedule")
    add("--schedule", int, [120, 160], "epochs at which 'step' divides the rate by 10", nargs="*")
    add(
        "--optimizer",
        OneOf(*OPTIMIZERS),
        "sgd",
        "adamw with --lr 0.001 and --weight-decay 0.05 for runs of few steps; sgd otherwise",
    )
    add("--momentum", amount, 0.9, "of SGD, beta 1 of AdamW; lower it when the loss swings")
    add("--weight-decay", amount, 1e-4, "of the optimiser; raise it if a small cohort is overfitted")
    add(
        "--accumulate",
        count,
        1,
        "batches whose gradients are averaged for a step of the optimiser; raise it for a steadier gradient if memory "
        "allows no larger batch (negatives stay those of the batch)",
    )
    add("--rep-dim", size, 128, "size of the representation h, the features; lower it for few subjects")
    add("--moco-dim", size, 128, "size of the projection z, compared in the loss")
    add("--moco-k", size, 4096, "keys in each location's queue, a multiple of the batch; at most half the cohort")
    add("--moco-m", between(float, 0, 1), 0.999, "momentum of the key encoder; lower it for runs of few steps")
    add("--moco-t", float, 0.2, "temperature; raise it when negatives are few, lower it to tell near ones apart")
    add("--num-experts", count, 8, "kernels that every convolution mixes by location; 1 switches conditioning off")
    add("--num-coordinates", int, 1, "points per location; 1 is the only value defined")
    add("--k-neighbors", count, 2, "nearest locations in the neighbour task; more see farther and take longer")
    add(
        "--beta",
        amount,
        1.0,
        "weight of the neighbour loss; lower it if neighbours differ too much; 0 drops the task, and no neighbour is "
        "read or encoded",
    )
    add("--warm-up", at_least(int, 0), 0, "epochs before the neighbour loss counts; raise it when it hurts the start")
    add_augmentation_flags(group)
    add(
        "--negatives",
        OneOf("queue", "batch"),
        "queue",
        "queue: other subjects' keys of earlier steps; batch: keys of this step, as new as the key: for few subjects",
    )
    add(
        "--bn-groups",
        count,
        None,
        "groups of the batch with separate BatchNorm statistics, a multiple of the ranks (default: 4 as published, "
        "more ranks, or what the batch allows); fewer for small batches",
    )
    add(
        "--location-order",
        OneOf("sequential", "interleaved"),
        "sequential",
        "sequential: all steps of a location, then the next; interleaved: short visits in turn, for younger queues",
    )
    group.add_argument(
        "--mask-own",
        action="store_true",
        help="leave a subject's own keys out of its queue's negatives; if --moco-k exceeds the cohort",
    )
    group.add_argument(
        "--one-queue",
        action="store_true",
        help="one queue for all locations instead of one each, to see what the latter gains; give it a larger --moco-k",
    )
    group.add_argument(
        "--no-mlp",
        dest="mlp",
        action="store_false",
        help="project with one linear layer (MoCo v1) instead of two; for checkpoints that were trained so",
    )


def add_output(parser: Parser) -> None:
    """Flags of what a run writes."""
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "--print-freq",
        type=at_least(int, 1),
        default=10,
        help="steps between log lines and curve points; lower it to watch a short run, raise it for a small log",
    )
    add(
        "--save-freq",
        type=at_least(int, 1),
        default=1,
        help="epochs between checkpoints; the last epoch is always saved; raise it if the disk is small",
    )
    add("--keep", type=at_least(int, 0), default=0, help="checkpoints to keep, the latest; 0 keeps every epoch's")
    add(
        "--save-minutes",
        type=at_least(float, 0),
        default=30.0,
        help="minutes between saves within an epoch; lower it if machines fail often, 0 for none",
    )
    add("--save-initial", action="store_true", help="save checkpoint_patch_0000 too: an untrained encoder to compare")
    add_progress_flag(group)
    add("--arch", default="custom", help="name kept in the checkpoint")
