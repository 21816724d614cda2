"""Pre-train DrasCLR on a patch store.

One process, on a GPU where there is one, else on the CPU:

    python train.py --root-dir /data/patches --exp-name first

Four GPUs of one machine, the published hyper-parameters:

    torchrun --standalone --nproc-per-node 4 train.py --root-dir /data/patches --exp-name published

Two machines of four GPUs, on each of them (the first is node 0):

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node0:29500 \\
        train.py --root-dir /data/patches --exp-name published

Writes ssl_exp/<exp-name>/: configs.json, checkpoint_patch_{epoch:04d}.pth.tar, TensorBoard curves and
log.jsonl. Stopped by a signal, it saves first; --resume auto goes on from there, to the same result.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from data.augment import LETTERS, PUBLISHED, Augmentation, Ranges
from data.dataset import PatchDataset, batches, make_loader
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from data.views import grid_of_views, step_views
from misc import process
from misc.code import running_code
from misc.command import OneOf, Parser, StopRequest, UserError, at_least, between, run
from misc.cores import usable_cores
from misc.experiment import Experiment
from misc.recipes import add_recipe
from misc.runlog import Meters, RunLog
from misc.saver import Saver
from misc.sizes import bn_groups, groups_of_rank
from misc.watch import watched
from models.builder import DrasCLR
from models.checkpoint import intact
from models.cnn3d import Encoder
from models.cpu.memory import keep_freed_memory
from models.state import TrainingState, note_changes, start_from
from models.step import FIGURES, OPTIMIZERS, Descent, LocationTable, compute_losses, effective_rank, make_optimizer

# ============================================================ arguments


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
    text = "adamw with --lr 0.001 and --weight-decay 0.05 for runs of few steps; sgd otherwise"
    add("--optimizer", OneOf(*OPTIMIZERS), "sgd", text)
    add("--momentum", amount, 0.9, "of SGD, beta 1 of AdamW; lower it when the loss swings")
    add("--weight-decay", amount, 1e-4, "of the optimiser; raise it when a small cohort is learnt by heart")
    text = (
        "batches whose gradients are averaged for a step of the optimiser; raise it for a steadier gradient where "
        "memory allows no larger batch (negatives stay those of the batch)"
    )
    add("--accumulate", count, 1, text)
    add("--rep-dim", size, 128, "size of the representation h, the features; lower it for few subjects")
    add("--moco-dim", size, 128, "size of the projection z, compared in the loss")
    add("--moco-k", size, 4096, "keys in each location's queue, a multiple of the batch; at most half the cohort")
    add("--moco-m", between(float, 0, 1), 0.999, "momentum of the key encoder; lower it for runs of few steps")
    add("--moco-t", float, 0.2, "temperature; raise it when negatives are few, lower it to tell near ones apart")
    add("--num-experts", count, 8, "kernels that every convolution mixes by location; 1 switches conditioning off")
    add("--num-coordinates", int, 1, "points per location; 1 is the only value defined")
    add("--k-neighbors", count, 2, "nearest locations in the neighbour task; more see farther and take longer")
    text = "weight of the neighbour loss; lower it where neighbours differ too much, 0 drops the task"
    add("--beta", amount, 1.0, text)
    add("--warm-up", at_least(int, 0), 0, "epochs before the neighbour loss counts; raise it when it hurts the start")
    add("--augmentation", str, "agc", f"transforms in order: {LETTERS}; drop c where density itself matters")
    add("--rotate", amount, PUBLISHED.rotate, "degrees about each axis; lower it where pose tells something")
    text = "voxels along each axis; lower it where views share too little: 12 is a third of a patch"
    add("--translate", amount, PUBLISHED.translate, text)
    add("--scale", between(float, 0, 0.9), PUBLISHED.scale, "zoom, a share either way; lower it where size tells much")
    add("--noise-std", amount, PUBLISHED.noise_std, "HU, the largest of g; raise it for cohorts of many doses")
    add("--noise-prob", between(float, 0, 1), PUBLISHED.noise_prob, "how often g is applied; raise it likewise")
    add("--smooth", amount, PUBLISHED.smooth, "voxels, the largest sigma of s; raise it where slices are thick")
    add("--shift", amount, PUBLISHED.shift, "HU, the largest of i, either way; raise it where breath differs much")
    text = "smallest and largest exponent of c; narrow it where density itself matters"
    add("--gamma", at_least(float, 0.01), list(PUBLISHED.gamma), text, nargs=2)
    text = "queue: other subjects' keys of earlier steps; batch: keys of this step, as new as the key: for few subjects"
    add("--negatives", OneOf("queue", "batch"), "queue", text)
    text = (
        "groups of the batch with BatchNorm statistics of their own, a multiple of the ranks (default: 4 as published, "
        "more ranks, or what the batch allows); fewer for small batches"
    )
    add("--bn-groups", count, None, text)
    text = "sequential: all steps of a location, then the next; interleaved: short visits in turn, for younger queues"
    add("--location-order", OneOf("sequential", "interleaved"), "sequential", text)
    text = "leave a subject's own keys out of its queue's negatives; where --moco-k exceeds the cohort"
    group.add_argument("--mask-own", action="store_true", help=text)
    text = "one queue for all locations instead of one each, to see what the latter earns; give it a larger --moco-k"
    group.add_argument("--one-queue", action="store_true", help=text)
    text = "project with one linear layer (MoCo v1) instead of two; for checkpoints that were trained so"
    group.add_argument("--no-mlp", dest="mlp", action="store_false", help=text)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without the store."""
    parser = Parser(__doc__)
    switch = dict(action="store_true")
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--root-dir", required=True, help="patch store made by preprocess/run_preprocess.sh")
    text = "experiments go to ssl_exp/<exp-name> under the current folder; extract_feature.py wants that folder"
    add("--exp-name", required=True, help=text)
    text = "CSV with a column sid: train on these subjects only, as when others are held out to report on"
    add("--subjects", help=text)
    text = "auto: the experiment's latest checkpoint, a new start where it has none; or a name in its folder; or a path"
    add("--resume", default="", help=text)
    text = (
        "begin with the encoder's weights of this checkpoint, whatever its queue and locations, as for another cohort"
    )
    add("--init-from", metavar="CHECKPOINT", help=text)
    text = "count epochs from here instead of from the checkpoint's; to train on weights of another cohort, 0"
    add("--start-epoch", type=at_least(int, 0), help=text)
    text = "epochs in all; each visits every location once; raise it for few subjects, whose epochs are short"
    add("--epochs", type=at_least(int, 1), default=20, help=text)
    text = "of weights, queue, shuffling and augmentation; vary it to see how far a result hangs on chance"
    add("--seed", type=at_least(int, 0), default=0, help=text)
    add("--device", type=OneOf("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    text = (
        "reading processes on this machine, shared by its ranks, no more than its cores; raise it while GPUs wait for "
        "data, lower it where memory is short; 0 reads in the main process"
    )
    add("--workers", type=at_least(int, 0), default=16, help=text)
    text = "bf16 computes the encoder in bfloat16: for GPUs from A100 on and CPUs with AVX512-BF16 or AMX"
    add("--amp", type=OneOf("off", "bf16"), default="off", help=text)
    add("--tf32", **switch, help="let float32 products use TF32 on GPUs: faster, 10-bit mantissa")
    text = "minutes that ranks wait for one that hangs; raise it for slow disks"
    add("--patience", type=at_least(float, 0.01), default=process.PATIENCE, help=text)
    add("--deterministic", **switch, help="the same bytes again on a GPU too, as on a CPU anyway: slower convolutions")
    text = "torch.compile the encoders, for long runs on GPUs; on CPUs it measured slower, 41 against 49 samples/s"
    add("--compile", **switch, help=text)

    add_method(parser)
    add_recipe(parser, argv)
    group = parser.add_argument_group("output")
    add = group.add_argument
    text = "steps between log lines and curve points; lower it to watch a short run, raise it for a small log"
    add("--print-freq", type=at_least(int, 1), default=10, help=text)
    text = "epochs between checkpoints; the last epoch is always saved; raise it where the disk is small"
    add("--save-freq", type=at_least(int, 1), default=1, help=text)
    add("--keep", type=at_least(int, 0), default=0, help="checkpoints to keep, the latest; 0 keeps every epoch's")
    text = "minutes between saves within an epoch; lower it where machines fail often, 0 for none"
    add("--save-minutes", type=at_least(float, 0), default=30.0, help=text)
    add("--save-initial", **switch, help="save checkpoint_patch_0000 too: an untrained encoder to compare with")
    add("--no-progress", **switch, help="no progress bar (none is drawn without a terminal)")
    add("--arch", default="custom", help="name kept in the checkpoint")

    args = parser.parse_args(argv)
    args.root_dir = os.path.abspath(args.root_dir)  # configs.json is read from elsewhere
    args.subjects, args.init_from = (path and os.path.abspath(path) for path in (args.subjects, args.init_from))
    if args.init_from and args.resume not in ("", "auto"):
        parser.error("--init-from begins a run and --resume goes on with one: give one of them, or --resume auto")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed}: below 2^32")
    if args.num_coordinates != 1:
        parser.error(f"--num-coordinates {args.num_coordinates}: a location is one 3-D point, only 1 is defined")
    if not 0 < args.moco_t < math.inf:
        parser.error(f"--moco-t {args.moco_t}: above 0")
    if args.moco_k % args.batch_size:
        parser.error(
            f"--moco-k {args.moco_k} is not a multiple of --batch-size {args.batch_size}; a queue takes whole batches, "
            f"use {max(1, args.moco_k // args.batch_size) * args.batch_size}"
        )
    try:
        Experiment.named(args.exp_name)
        make_augmentation(args)
    except UserError as error:
        parser.error(str(error))
    return args


def make_augmentation(args: argparse.Namespace) -> Augmentation:
    """The transforms that the flags ask for. Raises StoreError."""
    ranges = Ranges(**{name: value for name, value in vars(args).items() if name in Ranges._fields})
    return Augmentation(args.augmentation, ranges)


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Rate of an epoch (0 the first), fixed within it.

    cosine: lr / 2 (1 + cos(pi e / epochs)); step: a tenth at each milestone that e has reached.
    """
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


# ============================================================ the script


class Data(NamedTuple):
    """Where a run's batches come from."""

    store: PatchStore
    sampler: LocationBatchSampler
    loader: DataLoader
    workers: int  # reading processes of this rank
    table: LocationTable


def open_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The store and this rank's share of its batches. Raises StoreError."""
    rank, world = process.rank(), process.world_size()
    store = PatchStore(args.root_dir, require_grouped=True, subjects=args.subjects)
    dataset = PatchDataset(store, args.k_neighbors)
    sizes = (store.num_subjects, store.num_locations, args.batch_size, args.seed)
    sampler = LocationBatchSampler(*sizes, rank, world, args.location_order)
    workers = math.ceil(min(args.workers, usable_cores()) / process.local_world_size())
    loader = make_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")
    table = LocationTable.of(normalize_locations(store.locations), dataset.neighbors, device)
    return Data(store, sampler, loader, workers, table)


def notes(args: argparse.Namespace, store: PatchStore) -> Iterator[str]:
    """What to know of the store before it is trained on."""
    yield from store.notes()
    if args.moco_k > store.num_subjects:
        whose = "so a queue comes to hold a subject more than once, and its own keys among the negatives"
        yield f"--moco-k {args.moco_k} exceeds the {store.num_subjects} subjects, {whose}"


def build_model(args: argparse.Namespace, locations: int, groups: int) -> DrasCLR:
    """The model that the flags ask for; ``groups`` are this rank's BatchNorm groups."""
    sizes = dict(rep_dim=args.rep_dim, moco_dim=args.moco_dim, num_experts=args.num_experts)
    queue = dict(num_coordinates=args.num_coordinates, K=args.moco_k, m=args.moco_m, T=args.moco_t, mlp=args.mlp)
    choices = dict(bn_groups=groups, negatives=args.negatives, mask_own=args.mask_own, one_queue=args.one_queue)
    return DrasCLR(Encoder, num_patch=locations, **sizes, **queue, **choices)


def train(args: argparse.Namespace, device: torch.device, stop: StopRequest) -> None:
    """All of it, on this rank."""
    # -------------------------------------------------------- process and experiment
    rank, world = process.rank(), process.world_size()
    say = print if rank == 0 else (lambda _: None)
    keep_freed_memory(device)
    torch.manual_seed(args.seed)
    process.set_arithmetic(args.tf32, args.deterministic)
    args.bn_groups = bn_groups(args.bn_groups, args.batch_size, world)
    groups = groups_of_rank(args.bn_groups, rank, world)
    experiment = Experiment.named(args.exp_name)
    resume = experiment.resume_from(args.resume, intact, say)

    # -------------------------------------------------------- data
    store, sampler, loader, workers, table = open_data(args, device)
    settings = {**vars(args), "world_size": world, **store.facts()}
    process.agree({**settings, "resumed checkpoint": resume, **running_code()})
    augmentation = make_augmentation(args)
    for text in notes(args, store):
        say(f"note: {text}")

    # -------------------------------------------------------- model
    model = build_model(args, store.num_locations, len(groups)).to(device)
    optimizer = make_optimizer(model, args.lr, args.momentum, args.weight_decay, args.optimizer)
    descend = Descent(model, optimizer, args.accumulate)

    # -------------------------------------------------------- restore
    state = TrainingState(model, optimizer, device, args.arch, settings)
    start, skip, sums = args.start_epoch or 0, 0, None
    if resume is not None:
        restored = state.restore(resume)
        note_changes(restored, settings, resume, args.start_epoch is not None, say)
        if args.start_epoch is None:
            start, skip, sums = restored[:3]
    elif args.init_from:
        say(start_from(model, Path(args.init_from)))
    if start >= args.epochs:
        say(f"nothing to do: {start} of {args.epochs} epochs are done")
        return
    stream = experiment.claim() if rank == 0 else None
    if resume is not None:
        process.barrier()  # every rank has read it
        for name in experiment.set_aside_later(resume, start) if rank == 0 else ():
            say(f"note: {name}, further on, is kept as superseded-*-{name}")

    # -------------------------------------------------------- ready
    if args.compile:
        model.encoder_q.compile()
        model.encoder_k.compile()
    parallel = process.data_parallel(model, device).train()
    if rank == 0:
        experiment.write_config({**settings, "num_patch": store.num_locations})
        if args.save_initial and resume is None:
            state.save(experiment.checkpoint(0), 0)
    say(
        f"{store.num_subjects} subjects, {store.num_locations} locations, {len(sampler)} steps an epoch; {world} x "
        f"{device.type}, {workers} reading processes each; {args.bn_groups} BatchNorm groups; {experiment.folder}"
    )
    meters = Meters(FIGURES, device)
    saver = Saver(state, experiment, stop, args.epochs, args.save_freq, args.save_minutes, args.keep, good=resume)
    log = RunLog(stream, experiment.folder, args.epochs, len(sampler), args.batch_size, args.no_progress)
    log.go_on(start, skip, resume)
    stop.listen()  # asked to stop, all ranks end after the step under way, which the first one saves

    # -------------------------------------------------------- loop
    for epoch in range(start, args.epochs):
        skip, sums = (skip, sums) if epoch == start else (0, None)
        rate = optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        sampler.set_epoch(epoch, skip)
        meters.start_epoch(sums)
        log.start_epoch(epoch, skip)
        for done, batch in enumerate(watched(batches(loader, say), epoch, skip, args.patience), start=skip + 1):
            views = step_views(batch, augmentation, args.seed, groups, device)
            beta, subjects = args.beta if epoch >= args.warm_up else 0.0, batch.subjects.to(device, non_blocking=True)
            loss, figures = compute_losses(parallel, batch.location, views, table, beta, args.amp == "bf16", subjects)
            stepped = descend(loss, last=done == len(sampler))

            meters.add(figures)
            log.advance(lambda views=views: grid_of_views(views))
            if done % args.print_freq == 0 or done == len(sampler):
                h = process.all_gather_rows(model.representation)  # (B, rep_dim) of all ranks
                figures = {**meters.read(), "effective_rank": effective_rank(h)}
                saver.check(epoch, done, batch.location, figures, meters)
                log.step(epoch, done, batch.location, meters.last_count, figures, rate)
            if stepped and done < len(sampler):
                saver.after_step(epoch, done, meters)
        saver.after_epoch(epoch + 1)
        log.end_epoch(epoch, meters.epoch_means(len(sampler)), rate)  # told when it is saved
        saver.leave_if_asked()
    log.close()


def main() -> None:
    args = parse_arguments()
    with process.joined(args.device, args.patience) as device:
        train(args, device, StopRequest())


if __name__ == "__main__":
    run(main, memory="--batch-size (over all ranks), --moco-k or --workers")
