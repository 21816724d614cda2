"""One process of a run: the device that it computes on, its process group, and collectives.

The collectives are no-ops when there is one process, so that callers need no second path.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from misc.command import UserError

# torch 2.14 renamed it.
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class DeviceError(UserError):
    """The machine lacks what was asked for; the message says what to do."""


# ============================================================ device and process group


def start_process(device: str) -> torch.device:
    """Choose this process's device and, under torchrun, join the process group.

    Args:
        device: ``auto`` (a GPU where there is one), ``cuda`` or ``cpu``.

    Returns:
        The device. NCCL joins GPUs, Gloo CPUs; one process without torchrun needs no group.

    Raises:
        DeviceError: no GPU, or fewer GPUs than processes on this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and gpus == 0:
        raise DeviceError("--device cuda, but this machine has no usable GPU; use --device cpu or auto")
    use_gpu = gpus > 0 and device != "cpu"
    if use_gpu and local_world_size() > gpus:
        raise DeviceError(f"{local_world_size()} processes on this machine, but {gpus} GPUs; start one process per GPU")
    if use_gpu:
        torch.cuda.set_device(local_rank)
        chosen = torch.device("cuda", local_rank)
    else:
        chosen = torch.device("cpu")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_gpu else "gloo", **({"device_id": chosen} if use_gpu else {}))
    return chosen


def end_process() -> None:
    """Leave the process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """:func:`start_process`, and :func:`end_process` at the end of the block."""
    try:
        yield start_process(device)
    finally:
        with contextlib.suppress(RuntimeError, ValueError):  # another rank is gone already
            end_process()


# ============================================================ ranks


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@torch.no_grad()
def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's rows in rank order: (n, ...) on each rank -> (world * n, ...).

    No gradient flows through it. All ranks must pass the same shape.
    """
    world = world_size()
    if world == 1:
        return tensor
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))  # (world * n, ...)
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


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


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
