"""Pre-train DrasCLR on a patch store.

Train in one process, on a GPU if there is one, otherwise on the CPU:

    python train.py --root-dir /data/patches --exp-name first

Train on four GPUs of one machine, with the published hyper-parameters:

    torchrun --standalone --nproc-per-node 4 train.py --root-dir /data/patches --exp-name published

Train on two machines with four GPUs each. Run this command on the first machine, and with --node-rank 1 on the second:

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node0:29500 \\
        train.py --root-dir /data/patches --exp-name published

The output goes to ssl_exp/<exp-name>/: configs.json, checkpoint_patch_{epoch:04d}.pth.tar, TensorBoard curves
and log.jsonl. A run that is stopped by a signal saves a checkpoint first. --resume auto continues from the
latest checkpoint and gives the same result as an uninterrupted run.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Set OMP_WAIT_POLICY before torch loads OpenMP, so that waiting threads sleep.
# By default, waiting threads spin and block a core that another process could use.
# On 2 cores shared with a busy process, a training step takes 228 ms if waiting threads sleep, and 262 ms if they spin.
# On idle cores, a training step takes 145 ms if waiting threads sleep, and 149 ms if they spin.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import torch
from torch.utils.data import DataLoader

from data.augment import Augmentation
from data.dataset import Draw, PatchDataset
from data.device import BatchCarrier, ResidentPatches
from data.loader import iterate_batches, make_loader
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.similarity import read_similarity
from data.store import PatchStore
from data.views import StepDraws, StepViews, draw_view_grid
from misc import process
from misc.command import StopRequest, count_usable_cores, run
from misc.experiment import Experiment, describe_running_code
from misc.run.augmentation import collect_ranges
from misc.run.flags import parse_arguments
from misc.run.resume import describe_initialization, needs_neighbors, note_setting_changes
from misc.run.runlog import Meters, RunLog
from misc.run.saver import Saver
from misc.run.watch import watch_steps
from misc.sizes import choose_bn_groups, list_rank_groups
from models.builder import DrasCLR
from models.checkpoint import read_config, verify_checkpoint
from models.cnn3d import Encoder
from models.fast.graph import RecordedStep, can_record_cuda_graph
from models.fast.memory import keep_freed_memory_in_process
from models.probe import effective_rank
from models.state import TrainingState, load_initial_weights
from models.step import Descent, Inputs, LocationTable, TrainingStep, WholeStep, make_optimizer, statistic_names


def compute_learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Return the learning rate of epoch e, counted from 0. The learning rate is constant within an epoch.

    The schedule ``cosine`` gives lr (1 + cos(pi e / epochs)) / 2 in epoch e. The schedule ``step`` divides lr by 10 for
    each milestone that epoch e has reached.
    """
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


class Data(NamedTuple):
    """The store and the objects that turn it into batches."""

    store: PatchStore
    sampler: LocationBatchSampler
    loader: DataLoader
    workers: int  # number of data-loader workers of this rank
    table: LocationTable
    carrier: BatchCarrier


def open_data(args: argparse.Namespace, device: torch.device, neighbors: int, draw: Draw) -> Data:
    """Open the store and set up this rank's share of the batches.

    Args:
        args: flags of the run.
        device: device that receives the batches.
        neighbors: neighbouring patches to read with each patch; 0 for none.
        draw: function that draws the random parameters of the augmentation.

    Raises:
        StoreError: the store cannot be used.
    """
    rank, world = process.rank(), process.world_size()
    store = PatchStore(args.root_dir, require_grouped=True, subjects=args.subjects)
    dataset = PatchDataset(store, neighbors, draw)
    resident = ResidentPatches.make_if_memory_allows(store, dataset.neighbors, device)
    dataset.read = resident is None
    sizes = (store.num_subjects, store.num_locations, args.batch_size, args.seed)
    similarity = None
    if args.batch_by:
        note = (lambda text: print(f"note: {text}")) if rank == 0 else (lambda _: None)
        similarity = read_similarity(args.batch_by, args.batch_table, store.layout, store.sids, note)
    sampler = LocationBatchSampler(*sizes, rank, world, args.location_order, similarity)
    workers = math.ceil(min(args.workers, count_usable_cores()) / process.local_world_size())
    loader = make_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")
    table = LocationTable.from_arrays(normalize_locations(store.locations), dataset.neighbors, device)
    return Data(store, sampler, loader, workers, table, BatchCarrier(device, resident))


def describe_store(args: argparse.Namespace, store: PatchStore) -> Iterator[str]:
    """Yield notes about the store that the user should read before training."""
    yield from store.describe_outdated_grouped_files()
    if args.moco_k > store.num_subjects:
        yield (
            f"--moco-k {args.moco_k} exceeds the {store.num_subjects} subjects, so a queue holds several keys of each "
            "subject, and queries get keys of their own subject as negatives"
        )


def build_model(args: argparse.Namespace, locations: int, groups: int) -> DrasCLR:
    """Build the model from the flags; ``groups`` is the number of BatchNorm groups on this rank."""
    return DrasCLR(
        Encoder,
        num_patch=locations,
        rep_dim=args.rep_dim,
        moco_dim=args.moco_dim,
        num_experts=args.num_experts,
        num_coordinates=args.num_coordinates,
        K=args.moco_k,
        m=args.moco_m,
        T=args.moco_t,
        mlp=args.mlp,
        bn_groups=groups,
        negatives=args.negatives,
        mask_own=args.mask_own,
        one_queue=args.one_queue,
    )


def train(args: argparse.Namespace, device: torch.device, stop: StopRequest) -> None:
    """Run the whole training on this rank."""
    # -------------------------------------------------------- process and experiment
    rank, world = process.rank(), process.world_size()
    say = print if rank == 0 else (lambda _: None)
    keep_freed_memory_in_process(device)
    torch.manual_seed(args.seed)
    process.set_arithmetic(args.tf32, args.deterministic)
    args.bn_groups = choose_bn_groups(args.bn_groups, args.batch_size, world)
    groups = list_rank_groups(args.bn_groups, rank, world)
    experiment = Experiment.from_name(args.exp_name)
    resume = experiment.find_resume_checkpoint(args.resume, verify_checkpoint, say)

    # -------------------------------------------------------- data
    # Read the checkpoint's settings before opening the data, because they determine whether neighbours are read.
    neighbor_pass = needs_neighbors(args.beta, None if resume is None else read_config(resume))
    draws = StepDraws(Augmentation(args.augmentation, collect_ranges(args)), args.seed, groups)
    data = open_data(args, device, args.k_neighbors if neighbor_pass else 0, draws)
    store, sampler = data.store, data.sampler
    settings = {**vars(args), "neighbor_pass": neighbor_pass, "world_size": world, **store.collect_identity()}
    process.check_ranks_agree({**settings, "resumed checkpoint": resume, **describe_running_code()})
    if args.amp == "bf16" and (factor := process.measure_bf16_slowdown(device)):
        say(
            f"note: --amp bf16 is slow on this processor: a convolution takes {factor:.0f} times as long as in "
            "float32; use --amp off"
        )
    for text in describe_store(args, store):
        say(f"note: {text}")

    # -------------------------------------------------------- model
    model = build_model(args, store.num_locations, len(groups)).to(device)
    optimizer = make_optimizer(model, args.lr, args.momentum, args.weight_decay, args.optimizer)

    # -------------------------------------------------------- restore
    state = TrainingState(model, optimizer, device, args.arch, settings)
    start, skip, sums = args.start_epoch or 0, 0, None
    if resume is not None:
        restored = state.restore(resume)
        begins_anew = args.start_epoch is not None
        note_setting_changes(restored.config, settings, resume, (restored.epoch, restored.step), begins_anew, say)
        if restored.note:
            say(f"note: {restored.note}")
        if not begins_anew:
            start, skip, sums = restored.epoch, restored.step, restored.sums
    elif args.init_from:
        say(describe_initialization(args.init_from, *load_initial_weights(model, Path(args.init_from))))
    if start >= args.epochs:
        say(f"nothing to do: {start} of {args.epochs} epochs are done")
        return
    stream = experiment.claim_folder() if rank == 0 else None
    if resume is not None:
        process.barrier()  # wait until every rank has read the checkpoint
        for name in experiment.rename_later_checkpoints(resume, start) if rank == 0 else ():
            say(f"note: {name} is later than the checkpoint to resume from; it is kept as superseded-*-{name}")

    # -------------------------------------------------------- ready
    if args.compile:
        model.encoder_q.compile()
        model.encoder_k.compile()
    training_step = process.wrap_data_parallel(TrainingStep(model, data.table, args.amp == "bf16"), device).train()
    views = StepViews(draws, device)
    advance = WholeStep(views, training_step, Descent(optimizer, args.accumulate))
    if can_record_cuda_graph(device, advance, args):
        advance = RecordedStep(advance, views.generators)
    if rank == 0:
        experiment.write_config({**settings, "num_patch": store.num_locations})
        if args.save_initial and resume is None:
            state.save(experiment.checkpoint(0), 0)
    say(
        f"{store.num_subjects} subjects, {store.num_locations} locations, {len(sampler)} steps per epoch; {world} x "
        f"{device.type}, {data.workers} data-loader workers each; {args.bn_groups} BatchNorm groups; "
        f"{experiment.folder}"
    )
    meters = Meters(statistic_names(neighbor_pass), device)
    saver = Saver(
        state, experiment, stop, args.epochs, args.save_freq, args.save_minutes, args.keep, latest_checkpoint=resume
    )
    log = RunLog(stream, experiment.folder, args.epochs, len(sampler), args.batch_size, args.no_progress)
    log.rewind_to(start, skip, resume)
    stop.start_recording_signals()  # after a stop signal, all ranks finish the step, rank 0 saves, and all ranks exit

    # -------------------------------------------------------- loop
    for epoch in range(start, args.epochs):
        skip, sums = (skip, sums) if epoch == start else (0, None)
        rate = optimizer.param_groups[0]["lr"] = compute_learning_rate(epoch, args)
        beta = args.beta if epoch >= args.warm_up else 0.0
        sampler.set_epoch(epoch, skip)
        meters.start_epoch(sums)
        log.start_epoch(epoch, skip)
        reader = watch_steps(iterate_batches(data.loader, say), epoch, skip, args.patience)
        for done, batch in enumerate(reader, start=skip + 1):
            views.seed_noise(batch.epoch, batch.location, batch.step)
            step = advance(Inputs(*data.carrier(batch)), beta, force_update=done == len(sampler))

            meters.add_statistics(step.outcome.statistics)
            log.record_step(lambda step=step: draw_view_grid(step.views))
            if done % args.print_freq == 0 or done == len(sampler):
                representation = process.all_gather_rows(step.outcome.representation)  # (world * B, rep_dim)
                means = {**meters.compute_means_and_reset(), "effective_rank": effective_rank(representation)}
                saver.check_finite(epoch, done, batch.location, means, meters)
                log.log_step(epoch, done, batch.location, meters.last_count, means, rate)
            if step.stepped and done < len(sampler):
                saver.save_after_step(epoch, done, meters)
        saver.save_after_epoch(epoch + 1)
        log.log_epoch(epoch, meters.epoch_means(len(sampler)), rate)  # log an epoch only after it is saved
        saver.exit_if_stopped()
    log.close()


def main() -> None:
    args = parse_arguments(__doc__)
    with process.join_process_group(args.device, args.patience) as device:
        train(args, device, StopRequest())


if __name__ == "__main__":
    run(main, memory="--batch-size (over all ranks), --moco-k or --workers")
