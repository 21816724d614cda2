"""One process of a run: its device, its process group and collectives.

The collectives do nothing in a single process, so callers need no separate code for that case.
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

from misc.command import LOST, UserError, exit_at_once, print_error, request_signal_on_parent_exit

# torch 2.14 renamed all_gather_into_tensor to all_gather_single.
_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


PATIENCE = 30.0  # minutes that a rank waits for another rank; enough for a slow save or a batch from a slow disk
FEWEST_FILES = 256  # smallest accepted limit on open files; patch files take up to 128, and worker batches take more
SLOWER = 1.5  # a slowdown above this factor is reported for --amp bf16
MORE = 3.0  # minutes that a collective waits beyond --patience, so that misc/run/watch.py can report the hanging rank
# Paths may differ between ranks if the files have the same contents.
MAY_DIFFER = ("root_dir", "subjects", "batch_table", "no_progress")
_waits: list[str] = []  # one name for each call of wait_for_slow_ranks so far
_control: list = []  # the CPU process group for short messages between ranks; empty for a single process


class DeviceError(UserError):
    """Raised if the machine cannot provide the requested device or processes; the message says what to do."""


# ============================================================ device and process group


def set_up_process(device: str, timeout_minutes: float = PATIENCE) -> torch.device:
    """Choose the device of this process, set float32 arithmetic and, under torchrun, join the process group.

    The group uses NCCL on GPUs and Gloo on CPUs. A single process without torchrun does not need a process group.

    Args:
        device: ``auto`` (a GPU if available), ``cuda`` or ``cpu``.
        timeout_minutes: minutes that a rank waits for another rank.

    Returns:
        The device.

    Raises:
        DeviceError: there is no GPU, or there are fewer GPUs than processes on this machine.
        UserError: the limit on open files is too low.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank = find_local_rank(gpus)
    if device == "cuda" and gpus == 0:
        raise DeviceError("--device cuda: this machine has no usable GPU; use --device cpu or auto")
    use_gpu = gpus > 0 and device != "cpu"
    if use_gpu and local_world_size() > gpus:
        raise DeviceError(
            f"{local_world_size()} processes were started on this machine, which has {gpus} GPUs; start one per GPU"
        )
    if use_gpu:
        torch.cuda.set_device(local_rank)
        chosen = torch.device("cuda", local_rank)
    else:
        chosen = torch.device("cpu")
    set_arithmetic(tf32=False, deterministic=False)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < FEWEST_FILES:
        raise UserError(f"this process may open only {most} files (ulimit -n); raise the limit to {FEWEST_FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if "RANK" in os.environ and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            request_signal_on_parent_exit(signal.SIGTERM)
        try:
            more = {"device_id": chosen} if use_gpu else {}
            longest = timedelta(minutes=timeout_minutes + MORE)
            dist.init_process_group("nccl" if use_gpu else "gloo", timeout=longest, **more)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise DeviceError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not reach the other ranks at {where}: "
                f"{str(error).splitlines()[0][:200]}; check MASTER_ADDR, MASTER_PORT and that all ranks were started"
            ) from error
        _control[:] = [dist.new_group(backend="gloo", timeout=longest)] if dist.get_world_size() > 1 else []
    return chosen


def set_arithmetic(tf32: bool, deterministic: bool) -> None:
    """Set precision and reproducibility of GPU computations. Results on a CPU are always reproducible to the byte.

    By default, torch enables TF32 for convolutions.

    Args:
        tf32: compute float32 products in TF32.
        deterministic: use slower, reproducible algorithms; torch warns about operations that have no such algorithm.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads this variable at its first use
        torch.use_deterministic_algorithms(True, warn_only=True)


def find_gpu_matmul_precision() -> str:
    """Return the current precision of float32 products on GPUs: ``float32`` or ``tf32``."""
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "float32"


def measure_bf16_slowdown(device: torch.device) -> float:
    """Measure how many times slower a convolution is in bfloat16 than in float32.

    Return 0 if bfloat16 does not slow down training: on a GPU, or if the slowdown is at most SLOWER. CPUs without
    bfloat16 arithmetic emulate it. The measurement takes about 0.2 s.
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


def find_local_rank(gpus: int) -> int:
    """Return the local rank, which numbers the processes on a machine.

    torchrun sets LOCAL_RANK. If another launcher sets only RANK and WORLD_SIZE (Kubeflow's operators start one
    process per pod), the ranks on a machine are assumed to be consecutive.

    Raises:
        DeviceError: environment variables that are needed to join several processes are missing or wrong.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        several = next(
            (name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if read_environment_number(name, 1) > 1), None
        )
        if several:
            raise DeviceError(
                f"{several} is {os.environ[several]}, but RANK and WORLD_SIZE are not set, so each process would "
                "train alone; run python tools/launch.py once on each machine instead"
            )
        return 0
    missing = [name for name in names if not given[name]]
    if missing:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise DeviceError(
            f"{there} is set without {', '.join(missing)}, so this process cannot find the other ranks. Set the "
            "missing variables, start with tools/launch.py, or unset RANK and WORLD_SIZE to train alone"
        )
    rank, world = read_environment_number("RANK", -1), read_environment_number("WORLD_SIZE", -1)
    if not 0 <= rank < world or not 0 < read_environment_number("MASTER_PORT", -1) < 65536:
        raise DeviceError(
            f"RANK={given['RANK']} WORLD_SIZE={given['WORLD_SIZE']} MASTER_PORT={given['MASTER_PORT']}: RANK must be "
            "a whole number from 0 to WORLD_SIZE - 1, and MASTER_PORT a whole number from 1 to 65535"
        )
    return read_environment_number("LOCAL_RANK", -1) if os.environ.get("LOCAL_RANK") else rank % max(1, gpus)


def read_environment_number(name: str, default: int) -> int:
    """Read an environment variable as a whole number; return ``default`` for any other value."""
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def leave_process_group() -> None:
    """Leave the process group if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def join_process_group(device: str, patience: float = PATIENCE) -> Iterator[torch.device]:
    """Call :func:`set_up_process`, and :func:`leave_process_group` at the end of the ``with`` block.

    If another rank is lost, this process exits at once with status LOST; the launcher reports the reason.
    """
    try:
        yield set_up_process(device, patience)
    except RuntimeError as error:
        if world_size() == 1 or not is_lost_rank(error):
            raise
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            print_error(f"another rank was lost; see the output of that rank ({str(error).splitlines()[0][:200]})")
        exit_at_once(LOST)
    finally:
        with contextlib.suppress(RuntimeError, ValueError):  # another rank may already have exited
            leave_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether the error of a collective means that another rank is gone or has timed out."""
    words = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "nccl", "socket", "gloo")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


# ============================================================ ranks


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return max(1, read_environment_number("LOCAL_WORLD_SIZE", 1))


@torch.no_grad()
def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the rows of all ranks in rank order: (n, ...) on each rank -> (world * n, ...).

    No gradient flows through this function. All ranks must pass tensors of the same shape.
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
    """Average a tensor over the ranks in place, and return it."""
    world = world_size()
    if world > 1:
        dist.all_reduce(tensor)
        tensor /= world
    return tensor


def all_reduce_max(*numbers: int) -> list[int]:
    """Return the maximum of each number over all ranks, without waiting for a GPU."""
    if not _control:
        return list(numbers)
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_control[0])
    return largest.tolist()


def wait_for_ranks_before_exit() -> None:
    """Wait for all ranks before exit; return at once if a rank is gone."""
    if _control:
        with contextlib.suppress(RuntimeError):
            dist.barrier(group=_control[0])


def wait_for_slow_ranks() -> None:
    """Wait for ranks that may finish hours apart, by polling torch's key-value store instead of using a collective."""
    if not _control:
        return
    store = dist.distributed_c10d._get_default_store()
    name = f"share-{len(_waits)}"
    _waits.append(name)
    store.add(name, 1)
    while store.add(name, 0) < world_size():
        time.sleep(0.2)
    wait_for_ranks_before_exit()


def check_ranks_agree(facts: Mapping[str, object]) -> None:
    """Check that ``facts`` are equal on all ranks, before the ranks compute anything together.

    Raises:
        UserError: an entry of ``facts`` differs between ranks. Every rank raises an error that names up to three
            differing entries.
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
            raise UserError(
                f"{shown}{more}; start all ranks of a run with the same settings, and give each job its "
                "own rendezvous endpoint"
            )


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def wrap_data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model in DistributedDataParallel if there is a process group; otherwise return it unchanged.

    This function copies the model's buffers from rank 0 to all other ranks, once. Training steps do not copy buffers:
    each rank keeps its own BatchNorm statistics, and the queues stay equal because every rank enqueues the same
    gathered keys. By default, torch would broadcast the queue's 1.2 GB at every forward pass.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return model
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    # torch 2.15 renamed the argument broadcast_buffers to forward_sync_buffers.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    keep_buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True, **keep_buffers
    )
