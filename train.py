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
import contextlib
import fcntl
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tensorboard_logger import Logger
from torch import nn
from tqdm import tqdm

from data.augment import Augmentation, make_views, step_generators
from data.dataset import PatchBatch, PatchDataset, make_loader
from data.layout import StoreError
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from models import distributed
from models.builder import DrasCLR
from models.checkpoint import (
    CheckpointError,
    add_module,
    checkpoint_name,
    load_strict,
    read_checkpoint,
    save_checkpoint,
    strip_module,
)
from models.cnn3d import Encoder
from models.device import DeviceError, end_process, start_process, usable_cores

METERS = ("loss_patch", "loss_neighbor", "loss", "accuracy_patch", "accuracy_neighbor")
UNFINISHED = "checkpoint_patch_unfinished.pth.tar"  # of an epoch under way
CHECKPOINT_PATTERN = re.compile(r"checkpoint_patch_(\d{4,})\.pth\.tar")


# ============================================================ arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    distributed.one_line_errors(parser)

    def add(group, flag, default, text, **more):
        shown = "" if default in (None, "") else f" (default: {default})"
        group.add_argument(flag, default=default, help=text + shown, **more)

    run = parser.add_argument_group("the run")
    run.add_argument("--root-dir", required=True, help="patch store made by preprocess/run_preprocess.sh")
    run.add_argument(
        "--exp-name",
        required=True,
        help="experiments go to ssl_exp/<exp-name> under the current folder; extract_feature.py wants that folder",
    )
    add(
        run,
        "--resume",
        "",
        "'auto': the experiment's latest checkpoint, a new start where it has none; or a name in its folder; or a path",
    )
    add(run, "--start-epoch", None, "count epochs from here instead of from the checkpoint's", type=int)
    add(run, "--epochs", 20, "epochs in all; each visits every location once", type=int)
    add(run, "--seed", 0, "of weights, queue, shuffling and augmentation", type=int)
    add(run, "--device", "auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    add(
        run,
        "--workers",
        16,
        "reading processes on this machine, shared by its ranks, no more than its cores; 0 reads in the main process",
        type=int,
    )
    add(
        run,
        "--amp",
        "off",
        "bf16 computes the encoder in bfloat16: for GPUs from A100 on and CPUs with AVX512-BF16 or AMX",
        choices=("off", "bf16"),
    )
    run.add_argument(
        "--tf32", action="store_true", help="let float32 products use TF32 on GPUs: faster, 10-bit mantissa"
    )
    run.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the encoders, for long runs on GPUs; on CPUs it measured slower, 41 against 49 samples/s",
    )

    method = parser.add_argument_group("the method, with the published values as defaults")
    add(method, "--batch-size", 128, "subjects a step, over all ranks; at most the cohort", type=int)
    add(method, "--lr", 0.01, "learning rate at the start; scale it with the batch", type=float)
    add(method, "--lr-schedule", "cosine", "over --epochs, or steps at --schedule", choices=("cosine", "step"))
    add(method, "--schedule", [120, 160], "epochs at which 'step' divides the rate by 10", type=int, nargs="*")
    add(method, "--momentum", 0.9, "of SGD", type=float)
    add(method, "--weight-decay", 1e-4, "of SGD", type=float)
    add(method, "--rep-dim", 128, "size of the representation h, the features", type=int)
    add(method, "--moco-dim", 128, "size of the projection z, compared in the loss", type=int)
    add(
        method,
        "--moco-k",
        4096,
        "keys in each location's queue, a multiple of the batch; lower it below some 1000 subjects",
        type=int,
    )
    add(method, "--moco-m", 0.999, "momentum of the key encoder; lower it for short runs", type=float)
    add(method, "--moco-t", 0.2, "temperature", type=float)
    add(method, "--num-experts", 8, "kernels mixed per convolution; 1 switches the conditioning off", type=int)
    add(method, "--num-coordinates", 1, "points per location; 1 is the only value defined", type=int)
    add(method, "--k-neighbors", 2, "nearest locations in the neighbour task", type=int)
    add(method, "--beta", 1.0, "weight of the neighbour loss", type=float)
    add(method, "--warm-up", 0, "epochs before the neighbour loss counts", type=int)
    add(method, "--augmentation", "agc", "letters in order: f flip, a affine, e elastic, g Gaussian noise, c contrast")
    method.add_argument("--no-mlp", dest="mlp", action="store_false", help="project with one linear layer (MoCo v1)")

    out = parser.add_argument_group("output")
    add(out, "--print-freq", 10, "steps between log lines and curve points", type=int)
    add(out, "--save-freq", 1, "epochs between checkpoints; the last epoch is always saved", type=int)
    add(out, "--save-minutes", 30.0, "minutes between saves within an epoch; 0 for none", type=float)
    out.add_argument(
        "--save-initial",
        action="store_true",
        help="save checkpoint_patch_0000 too: an untrained encoder to compare with",
    )
    out.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")
    add(out, "--arch", "custom", "name kept in the checkpoint")

    args = parser.parse_args(argv)
    args.root_dir = os.path.abspath(args.root_dir)  # configs.json is read from elsewhere
    at_least = {"epochs": 1, "batch_size": 1, "seed": 0, "workers": 0, "rep_dim": 1, "moco_dim": 1, "moco_k": 1}
    at_least |= {"num_experts": 1, "k_neighbors": 1, "warm_up": 0, "print_freq": 1, "save_freq": 1, "save_minutes": 0}
    at_least |= {"lr": 0, "momentum": 0, "weight_decay": 0, "beta": 0}
    for name, least in at_least.items():
        if not least <= getattr(args, name) < math.inf:  # nan is neither
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    if not Path(args.exp_name).name or Path(args.exp_name).is_absolute() or ".." in Path(args.exp_name).parts:
        parser.error(f"--exp-name {args.exp_name!r}: the name of a folder that goes into ssl_exp/")
    if args.start_epoch is not None and args.start_epoch < 0:
        parser.error(f"--start-epoch {args.start_epoch}: at least 0")
    if args.seed >= 2**32:
        parser.error(f"--seed {args.seed}: below 2^32")
    if args.num_coordinates != 1:
        parser.error(f"--num-coordinates {args.num_coordinates}: a location is one 3-D point, only 1 is defined")
    if args.moco_t <= 0 or not 0 <= args.moco_m <= 1:
        parser.error("--moco-t must be above 0, --moco-m between 0 and 1")
    try:
        Augmentation(args.augmentation)
    except StoreError as error:
        parser.error(str(error))
    if args.moco_k % args.batch_size:
        parser.error(
            f"--moco-k {args.moco_k} is not a multiple of --batch-size {args.batch_size}; a queue takes whole batches, "
            f"use {max(1, args.moco_k // args.batch_size) * args.batch_size}"
        )
    return args


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Rate of an epoch (0 the first), fixed within it.

    cosine: lr / 2 (1 + cos(pi e / epochs)); step: a tenth at each milestone that e has reached.
    """
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD over every parameter, the frozen key encoder's too: the published checkpoints list all 164."""
    return torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay, foreach=True
    )


# ============================================================ checkpoints


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state as published: which implementation runs is this machine's matter."""
    state = optimizer.state_dict()
    groups = [{**group, "foreach": None, "fused": None} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: Path) -> None:
    """Load momentum buffers and the group; keep this process's implementation. Raises CheckpointError."""
    implementation = {name: optimizer.param_groups[0][name] for name in ("foreach", "fused")}
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: its optimizer state is of another model ({error})") from error
    optimizer.param_groups[0].update(implementation)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that is furthest on: an unfinished epoch's, else the highest number."""
    numbered = {
        int(m[1]): p for p in folder.glob("checkpoint_patch_*.pth.tar") if (m := CHECKPOINT_PATTERN.fullmatch(p.name))
    }
    newest = numbered[max(numbered)] if numbered else None
    unfinished = folder / UNFINISHED
    if unfinished.is_file() and (newest is None or read_checkpoint(unfinished)["epoch"] >= max(numbered)):
        return unfinished
    return newest


def find_resume(resume: str, folder: Path) -> Path | None:
    """What --resume means; None starts anew. Raises CheckpointError."""
    if resume == "auto":
        return latest_checkpoint(folder)
    occupied = any(folder.glob("checkpoint_patch_*.pth.tar"))
    if not resume:
        if occupied:
            raise CheckpointError(
                f"{folder} has checkpoints already; give --resume auto to go on, or another --exp-name"
            )
        return None
    inside = folder / resume
    found = inside if inside.is_file() else Path(resume)
    if not found.is_file():
        there = sorted(path.name for path in folder.glob("*.pth.tar"))
        raise CheckpointError(
            f"--resume {resume}: no checkpoint of that name in {folder}"
            + (f", which has {', '.join(there)}" if there else "")
            + ", and no file at that path"
        )
    if occupied and found.resolve().parent != folder.resolve():
        raise CheckpointError(
            f"{folder} has checkpoints already, which going on from {found} would overwrite; choose another --exp-name"
        )
    return found


def set_aside_later(folder: Path, resumed: Path, epoch: int) -> list[str]:
    """Rename the checkpoints of the resumed folder that are further on: their epochs will be trained anew.

    Under another name they are kept, and --resume auto does not take them for this run's.
    """
    if resumed.resolve().parent != folder.resolve():
        return []
    later = [path for path in folder.iterdir() if (m := CHECKPOINT_PATTERN.fullmatch(path.name)) and int(m[1]) > epoch]
    unfinished = folder / UNFINISHED
    if unfinished.is_file() and unfinished.resolve() != resumed.resolve():
        later.append(unfinished)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for path in later:
        path.rename(folder / f"superseded-{stamp}-{path.name}")
    return sorted(path.name for path in later)


def open_log(folder: Path) -> Any:
    """log.jsonl, opened for this run alone, until it is closed or the process ends.

    Raises:
        CheckpointError: another run has it, and the folder with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115 (open for the whole run)
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which reading processes would inherit
    except (BlockingIOError, PermissionError):
        log.close()
        raise CheckpointError(f"{folder} is in use by another run; let it end, or choose another --exp-name") from None
    except OSError:  # a file system without locks
        pass
    return log


def environment() -> dict[str, Any]:
    """What a run depends on beside its flags: the commit and the versions."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        commit += " with uncommitted changes" if changed else ""
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    return {"git_commit": commit, "versions": versions}


# ============================================================ one step


def compute_losses(
    model: nn.Module,
    batch: PatchBatch,
    locations: torch.Tensor,
    neighbors: torch.Tensor,
    augmentation: Augmentation,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment, encode, compare: the loss to descend, and the step's figures in the order of METERS.

    Args:
        model: DrasCLR, in DistributedDataParallel where there is a process group.
        batch: raw patches on any device.
        locations: (L, 3) normalised, on the model's device.
        neighbors: (L, k) indices, on the CPU.
    """
    device = locations.device
    generators = step_generators(args.seed, batch.epoch, batch.location, batch.step, distributed.rank(), device)
    patches = batch.patches.to(device, non_blocking=True)
    around = batch.neighbors.to(device, non_blocking=True)
    query, key, around = make_views(patches, around, augmentation, generators)

    here = locations[batch.location : batch.location + 1]  # (1, 3): one location for the whole batch
    near = torch.stack([locations[int(index)] for index in neighbors[batch.location]])[None]  # (1, k, 3)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
        logits_pch, logits_ngb, labels = model(batch.location, [query, here], [key, here], [around, near])
    loss_pch = F.cross_entropy(logits_pch, labels)
    loss_ngb = F.cross_entropy(logits_ngb, labels)
    loss = loss_pch if batch.epoch < args.warm_up else loss_pch + args.beta * loss_ngb
    with torch.no_grad():
        accuracies = [(logits.argmax(dim=1) == labels).float().mean() * 100 for logits in (logits_pch, logits_ngb)]
        figures = torch.stack([loss_pch, loss_ngb, loss, *accuracies])
    return loss, figures


# ============================================================ the script


def train(args: argparse.Namespace, stopping: list[int]) -> None:
    """All of it. ``stopping`` takes the signal that asks this process to stop."""
    # -------------------------------------------------------- process group and device
    device = start_process(args.device)
    rank, world = distributed.rank(), distributed.world_size()
    main_process = rank == 0
    say = print if main_process else (lambda *_: None)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True

    # -------------------------------------------------------- experiment folder
    folder = Path("ssl_exp") / args.exp_name
    resume = find_resume(args.resume, folder)
    distributed.barrier()  # every rank has looked before the first file is written

    # -------------------------------------------------------- data
    store = PatchStore(args.root_dir, require_grouped=True)
    dataset = PatchDataset(store, args.k_neighbors)
    sampler = LocationBatchSampler(store.num_subjects, store.num_locations, args.batch_size, args.seed, rank, world)
    augmentation = Augmentation(args.augmentation)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = math.ceil(min(args.workers, usable_cores()) / local_world)
    loader = make_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")
    locations = torch.from_numpy(normalize_locations(store.locations)).to(device)
    neighbors = torch.from_numpy(dataset.neighbors)

    if args.moco_k > store.num_subjects:
        say(
            f"note: --moco-k {args.moco_k} exceeds the {store.num_subjects} subjects, so a queue comes to hold a "
            "subject more than once, and its own keys among the negatives"
        )

    # -------------------------------------------------------- model and optimiser
    bare = DrasCLR(
        Encoder,
        num_patch=store.num_locations,
        rep_dim=args.rep_dim,
        moco_dim=args.moco_dim,
        num_experts=args.num_experts,
        num_coordinates=args.num_coordinates,
        K=args.moco_k,
        m=args.moco_m,
        T=args.moco_t,
        mlp=args.mlp,
    ).to(device)
    optimizer = make_optimizer(bare, args)

    # -------------------------------------------------------- resume
    first_epoch, first_step = 0, 0
    settings = {**vars(args), "num_subjects": store.num_subjects}
    totals = torch.zeros(len(METERS), dtype=torch.float64)  # sums over the steps of an epoch under way
    if resume is not None:
        content = read_checkpoint(resume)
        load_strict(bare, strip_module(content["state_dict"]), resume)
        if "optimizer" in content:
            load_optimizer(optimizer, content["optimizer"], resume)
        first_epoch, first_step = int(content.get("epoch", 0)), int(content.get("step", 0))
        if "rng_state" in content:
            torch.set_rng_state(content["rng_state"])
            if device.type == "cuda" and "cuda_rng_state" in content:
                torch.cuda.set_rng_state(content["cuda_rng_state"], device)
        totals = content.get("totals", totals)
        recorded = content.get("config") or {}
        changed = [name for name, before in recorded.items() if settings.get(name, before) != before]
        for name in changed:
            if name not in ("resume", "exp_name", "root_dir", "epochs", "start_epoch", "no_progress"):
                flag = name.replace("_", "-")
                say(f"note: --{flag} was {recorded[name]} in {resume.name} and is {settings[name]} now")
        say(f"resuming from {resume}: {first_epoch} epochs done" + (f" and {first_step} steps" if first_step else ""))
        for name in ("batch_size", "seed", "num_subjects"):
            if name in changed and first_step and args.start_epoch is None:
                raise CheckpointError(
                    f"{resume} is from within an epoch with {name} {recorded[name]}, now it is {settings[name]}: its "
                    f"steps are others; give the same, or --start-epoch {first_epoch} to begin that epoch again"
                )
        del content
    if args.start_epoch is not None:
        first_epoch, first_step = args.start_epoch, 0
        totals = torch.zeros_like(totals)
    if first_epoch >= args.epochs:
        say(f"nothing to do: {first_epoch} of {args.epochs} epochs are done")
        return
    log = open_log(folder) if main_process else None
    if resume is not None:
        distributed.barrier()  # every rank has read it
        for name in set_aside_later(folder, resume, first_epoch) if main_process else ():
            say(f"note: {name}, further on, is kept as superseded-*-{name}")

    if args.compile:
        bare.encoder_q.compile()
        bare.encoder_k.compile()
    model = distributed.data_parallel(bare, device)
    model.train()

    # -------------------------------------------------------- records
    curves = None
    if main_process:
        config = {**settings, "num_patch": store.num_locations, "world_size": world}
        (folder / "configs.json").write_text(json.dumps({**config, **environment()}, indent=2) + "\n")
        curves = Logger(str(folder), flush_secs=10)
    say(
        f"{store.num_subjects} subjects, {store.num_locations} locations, {len(sampler)} steps an epoch; "
        f"{world} x {device.type}, {workers} reading processes each; {folder}"
    )

    def save(name: str, epoch: int, step: int, sums: torch.Tensor) -> None:
        """The whole state after ``epoch`` finished epochs and ``step`` steps. Rank 0 has all of it."""
        checkpoint = {
            "epoch": epoch,
            "arch": args.arch,
            "state_dict": add_module(bare.state_dict()),
            "optimizer": optimizer_state(optimizer),
            "step": step,
            "totals": sums,
            "rng_state": torch.get_rng_state(),
            "config": settings,
        }
        if device.type == "cuda":
            checkpoint["cuda_rng_state"] = torch.cuda.get_rng_state(device)
        save_checkpoint(folder / name, checkpoint)

    if main_process and args.save_initial and resume is None:
        save(checkpoint_name(0), 0, 0, totals)

    # Asked to stop, rank 0 saves after the step under way; the others' next step fails then, see main.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))

    # -------------------------------------------------------- loop
    saved_at = time.monotonic()
    for epoch in range(first_epoch, args.epochs):
        rate = learning_rate(epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        skip = first_step if epoch == first_epoch else 0
        sampler.set_epoch(epoch, skip)
        sums = totals if epoch == first_epoch else torch.zeros_like(totals)  # over all ranks, but for the window
        window = torch.zeros_like(sums, device=device)
        window_start, window_steps = time.perf_counter(), 0
        epoch_start = time.perf_counter()
        bar = tqdm(
            total=len(sampler),
            initial=skip,
            desc=f"epoch {epoch + 1}/{args.epochs}",
            unit="step",
            disable=not main_process or args.no_progress or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        for done, batch in enumerate(loader, start=skip + 1):
            loss, figures = compute_losses(model, batch, locations, neighbors, augmentation, args)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            window += figures
            window_steps += 1
            bar.update()

            if done % args.print_freq == 0 or done == len(sampler):
                reduced = distributed.all_reduce_mean(window).cpu()  # waits for the device
                sums = sums + reduced
                mean = (reduced / window_steps).tolist()
                seconds = time.perf_counter() - window_start
                if not all(map(math.isfinite, mean)):
                    raise FloatingPointError(
                        f"the loss is not finite at epoch {epoch + 1}, step {done}; lower --lr, or check the store for "
                        f"damaged patches at location {batch.location}"
                    )
                if main_process:
                    point = dict(zip(METERS, mean))
                    speed = window_steps * args.batch_size / seconds
                    overall = done + len(sampler) * epoch
                    record = {"kind": "step", "epoch": epoch + 1, "step": done, "location": batch.location}
                    write_log(log, {**record, **point, "lr": rate, "samples_per_s": speed})
                    for name, value in point.items():
                        curves.log_value(f"train/{name}", value, overall)
                    curves.log_value("train/lr", rate, overall)
                    curves.log_value("train/samples_per_s", speed, overall)
                    bar.set_postfix(loss=f"{point['loss']:.3f}", refresh=False)
                    if bar.disable:
                        say(
                            f"epoch {epoch + 1} [{done}/{len(sampler)}] location {batch.location}  "
                            f"loss {point['loss']:.4f} "
                            f"(patch {point['loss_patch']:.4f}, neighbour {point['loss_neighbor']:.4f})  "
                            f"accuracy {point['accuracy_patch']:.1f} % {point['accuracy_neighbor']:.1f} %  "
                            f"{speed:.1f} samples/s"
                        )
                window.zero_()
                window_steps, window_start = 0, time.perf_counter()

            if main_process and done < len(sampler):
                due = args.save_minutes and time.monotonic() - saved_at > 60 * args.save_minutes
                if stopping or due:
                    save(UNFINISHED, epoch, done, sums + window.cpu())
                    saved_at = time.monotonic()
                if stopping:
                    bar.close()
                    say(
                        f"stopped by {signal.Signals(stopping[0]).name}; saved {folder / UNFINISHED}, "
                        "go on with --resume auto"
                    )
                    sys.stdout.flush()
                    os._exit(128 + stopping[0])  # workers and other ranks are not waited for
        bar.close()

        mean = (sums / len(sampler)).tolist()
        if main_process:
            finished = epoch + 1
            summary = dict(zip(METERS, mean))
            write_log(
                log,
                {
                    "kind": "epoch",
                    "epoch": finished,
                    **summary,
                    "lr": rate,
                    "seconds": time.perf_counter() - epoch_start,
                },
            )
            curves.log_value("epoch/loss", summary["loss"], finished)
            if finished % args.save_freq == 0 or finished == args.epochs or stopping:
                save(checkpoint_name(finished), finished, 0, torch.zeros_like(sums))
                (folder / UNFINISHED).unlink(missing_ok=True)
                saved_at = time.monotonic()
            say(
                f"epoch {finished}/{args.epochs}: loss {summary['loss']:.4f}, "
                f"accuracy {summary['accuracy_patch']:.1f} % (patch) {summary['accuracy_neighbor']:.1f} % (neighbour), "
                f"{time.perf_counter() - epoch_start:.0f} s"
            )
            if stopping:
                say(f"stopped by {signal.Signals(stopping[0]).name}; go on with --resume auto")
                sys.stdout.flush()
                os._exit(128 + stopping[0])
    if main_process:
        log.close()


def write_log(stream, record: dict[str, Any]) -> None:
    """One JSON line; six digits are more than the numbers mean."""
    rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
    stream.write(json.dumps(rounded) + "\n")


def main() -> int:
    args = parse_arguments()
    stopping: list[int] = []
    try:
        train(args, stopping)
    except (StoreError, CheckpointError, DeviceError, FloatingPointError, OSError) as error:
        distributed.print_error(error)
        return 2
    except Exception:  # not foreseen: say all, and do not wait for reading processes or other ranks
        if stopping and distributed.rank():  # but for the end of rank 0, which has saved
            os._exit(128 + stopping[0])
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            end_process()
    return 0


if __name__ == "__main__":
    sys.exit(main())
