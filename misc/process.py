"""One process of a run: the device that it computes on, its process group, and collectives.

The collectives are no-ops when there is one process, so that callers need no second path.
"""

import contextlib
import inspect
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from misc.command import LOST, UserError, end_with_parent, leave, print_error

# torch 2.14 renamed it.
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


PATIENCE = 30.0  # minutes that a rank waits for another: the slowest save and the slowest disk's batch
FEWEST_FILES = 256  # open at a time: up to 128 files of patches, and what data-loader workers hand over
SLOWER = 1.5  # times, from which --amp bf16 is noted as slow
MORE = 3.0  # minutes that a collective waits longer, so that misc/run/watch.py can tell who is waited for
MAY_DIFFER = (
    "root_dir",
    "subjects",
    "batch_table",
    "no_progress",
)  # between machines, where what lies there is the same
_waits: list[str] = []  # names of the waits so far
_control: list = []  # the process group of small words between ranks, on CPUs; empty where there is one process


class DeviceError(UserError):
    """The machine lacks what was asked for; the message says what to do."""


# ============================================================ device and process group


def start_process(device: str, patience: float = PATIENCE) -> torch.device:
    """Choose this process's device, in float32, and, under torchrun, join the process group.

    Args:
        device: ``auto`` (a GPU where there is one), ``cuda`` or ``cpu``.
        patience: minutes that a rank waits for another.

    Returns:
        The device. NCCL joins GPUs, Gloo CPUs; one process without torchrun needs no group.

    Raises:
        DeviceError: no GPU, or fewer GPUs than processes on this machine.
        UserError: the process may open too few files.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank = _local_rank(gpus)
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
    set_arithmetic(tf32=False, deterministic=False)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < FEWEST_FILES:
        raise UserError(f"a process may open {most} files here (ulimit -n); {FEWEST_FILES} are needed: raise the limit")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if "RANK" in os.environ and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(signal.SIGTERM)
        try:
            more = {"device_id": chosen} if use_gpu else {}
            longest = timedelta(minutes=patience + MORE)
            dist.init_process_group("nccl" if use_gpu else "gloo", timeout=longest, **more)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise DeviceError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {where}: "
                f"{str(error).splitlines()[0][:200]}; check MASTER_ADDR and MASTER_PORT, and that all were started"
            ) from error
        _control[:] = [dist.new_group(backend="gloo", timeout=longest)] if dist.get_world_size() > 1 else []
    return chosen


def set_arithmetic(tf32: bool, deterministic: bool) -> None:
    """How a GPU computes; a CPU computes the same bytes again in any case. torch itself starts with TF32 convolutions.

    Args:
        tf32: products in TF32.
        deterministic: the same bytes again, by slower algorithms; torch warns where it has none.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks when it is first used
        torch.use_deterministic_algorithms(True, warn_only=True)


def precision() -> str:
    """What a GPU multiplies float32 numbers in now: ``float32`` or ``tf32``."""
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "float32"


def slow_bf16(device: torch.device) -> float:
    """How many times longer a convolution takes in bfloat16 than in float32; 0 if it is not longer, or on a GPU.

    A processor without bfloat16 arithmetic emulates it. Takes some 0.2 s.
    """
    if device.type != "cpu":
        return 0.0
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(8, 16, 16, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        kernel = torch.ones(16, 16, 3, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
        torch.conv3d(x, kernel, padding=1)
        start = time.perf_counter()
        for _ in range(3):
            torch.conv3d(x, kernel, padding=1)
        seconds[dtype] = time.perf_counter() - start
    factor = seconds[torch.bfloat16] / seconds[torch.float32]
    return factor if factor > SLOWER else 0.0


def _local_rank(gpus: int) -> int:
    """This process's number on its machine.

    torchrun says it. Where RANK and WORLD_SIZE come from elsewhere (Kubeflow's operators start one process a pod),
    the ranks of a machine are taken to be consecutive.

    Raises:
        DeviceError: variables say that there are several processes, but not enough to join them.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        several = next((name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if _number(name, 1) > 1), None)
        if several:
            raise DeviceError(
                f"{several} is {os.environ[several]}, but RANK and WORLD_SIZE are not set: each process would "
                "train alone; start one python tools/launch.py on each machine instead"
            )
        return 0
    missing = [name for name in names if not given[name]]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise DeviceError(
            f"{there} without {', '.join(missing)}: this process cannot find the others; set them, or unset RANK and "
            "WORLD_SIZE to train alone, or start by tools/launch.py"
        )
    rank, world = _number("RANK", -1), _number("WORLD_SIZE", -1)
    if not 0 <= rank < world or not 0 < _number("MASTER_PORT", -1) < 65536:
        raise DeviceError(
            f"RANK={given['RANK']} WORLD_SIZE={given['WORLD_SIZE']} MASTER_PORT={given['MASTER_PORT']}: a rank is a "
            "whole number from 0 to below WORLD_SIZE, a port one below 65536"
        )
    return _number("LOCAL_RANK", -1) if os.environ.get("LOCAL_RANK") else rank % max(1, gpus)


def _number(name: str, default: int) -> int:
    """A variable of the environment as a whole number; ``default`` where it is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def end_process() -> None:
    """Leave the process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: str, patience: float = PATIENCE) -> Iterator[torch.device]:
    """:func:`start_process`, and :func:`end_process` at the end of the block.

    Where another rank is lost, this one leaves at once with status LOST; the launcher tells why.
    """
    try:
        yield start_process(device, patience)
    except RuntimeError as error:
        if world_size() == 1 or not _is_lost(error):
            raise
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            print_error(f"another rank was lost; see its own output ({str(error).splitlines()[0][:200]})")
        leave(LOST)
    finally:
        with contextlib.suppress(RuntimeError, ValueError):  # another rank is gone already
            end_process()


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective says that another rank has gone, or has not come in PATIENCE."""
    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "socket", "gloo")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


# ============================================================ ranks


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


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


def all_largest(*numbers: int) -> list[int]:
    """The largest over all ranks of each number; no device is waited for."""
    if not _control:
        return list(numbers)
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_control[0])
    return largest.tolist()


def meet() -> None:
    """Wait for every rank, or for none where one is gone: for the end."""
    if _control:
        with contextlib.suppress(RuntimeError):
            dist.barrier(group=_control[0])


def wait_for_all() -> None:
    """Wait for ranks whose shares of the work may take hours more or less: by a store that all ask now and then."""
    if not _control:
        return
    store = dist.distributed_c10d._get_default_store()
    name = f"share-{len(_waits)}"
    _waits.append(name)
    store.add(name, 1)
    while store.add(name, 0) < world_size():
        time.sleep(0.2)
    meet()


def agree(facts: Mapping[str, object]) -> None:
    """Compare what ranks must have in common, before they compute anything together.

    Raises:
        UserError: on every rank, naming the first facts that differ.
    """
    if not _control:
        return
    mine = (socket.gethostname(), {name: str(value) for name, value in facts.items() if name not in MAY_DIFFER})
    everyone: list = [None] * world_size()
    dist.all_gather_object(everyone, mine, group=_control[0])
    (first_host, first), *others = everyone
    for number, (host, theirs) in enumerate(others, start=1):
        apart = [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]
        if apart:
            shown = "; ".join(
                f"{name} is {theirs.get(name)} on rank {number} ({host}), {first.get(name)} on rank 0 ({first_host})"
                for name in apart[:3]
            )
            more = f"; and {len(apart) - 3} more" if len(apart) > 3 else ""
            raise UserError(f"{shown}{more}: the ranks of a run must be started alike, or two jobs share an endpoint")


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
