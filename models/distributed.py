"""Collectives that are no-ops when there is one process, so that callers need no second path."""

import argparse
import inspect
import os
import sys
import time
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LATER_SECONDS = 5  # for torchrun, which looks at its processes ten times a second
# torch 2.14 renamed it.
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def print_error(message: object) -> None:
    """One line on standard error. Works without a process group.

    Ranks mostly share a fault: the others give the first one time to tell it, and the launcher to
    end them, before they tell theirs.
    """
    number = int(os.environ.get("RANK", 0))
    if number:
        time.sleep(LATER_SECONDS)
    print(f"error: {f'(rank {number}) ' if number else ''}{message}", file=sys.stderr, flush=True)


def one_line_errors(parser: argparse.ArgumentParser) -> None:
    """A wrong flag is one line of the first rank, without the usage of every flag before it."""

    def error(message: str) -> NoReturn:
        print_error(f"{message}; see --help")
        sys.exit(2)

    parser.error = error


@torch.no_grad()
def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's rows in rank order: (n, ...) on each rank -> (world * n, ...).

    No gradient flows through it. All ranks must pass the same shape.
    """
    world = world_size()
    if world == 1:
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
    _gather(gathered, tensor)
    return gathered


@torch.no_grad()
def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over the ranks, in place; returns the tensor."""
    world = world_size()
    if world > 1:
        dist.all_reduce(tensor)
        tensor /= world
    return tensor


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model in DistributedDataParallel where there is a process group; else return it as it is.

    Buffers are made equal once, here. In steps nothing but gradients is exchanged: BatchNorm
    statistics stay each rank's own, and the queue stays equal by itself, since every rank enqueues
    the same gathered keys. (torch's own broadcast would send its 1.2 GB at every forward.)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return model
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # torch 2.15 renamed the flag.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    keep_buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True, **keep_buffers
    )


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()
