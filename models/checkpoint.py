"""Checkpoints in the published format: saved whole, read safely, loaded strictly."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misc.command import UserError
from misc.experiment import listed
from misc.files import file_hash, write_whole

# ============================================================ files


class CheckpointError(UserError):
    """A checkpoint is missing, unreadable or of another shape; the message says what to do."""


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """A crash leaves the old file or the new one, never half."""
    write_whole(path, lambda stream: torch.save(dict(checkpoint), stream))


def read_checkpoint(path: Path, tensors: bool = True) -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict, onto the CPU without running any code in it.

    Args:
        path: of the file.
        tensors: False leaves the tensors on the disk until their values are looked at: what stands
            beside them is read in milliseconds, whatever the size. Files of torch before 1.6 have no such way.

    Returns:
        The checkpoint's entries; a bare state dict comes back as {'state_dict': ...}.

    Raises:
        CheckpointError: no such file, or not a checkpoint that ``weights_only=True`` loads.
    """
    path = Path(path)
    if not path.is_file():
        beside = listed(path.parent)
        raise CheckpointError(f"no checkpoint at {path}{f'; {beside}' if beside else ''}")
    try:
        mapped = not tensors and zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a file that is none
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_why_unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    content = dict(content)
    if "state_dict" not in content:
        if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise CheckpointError(
                f"{path} has no 'state_dict' and is not a bare state dict; keys: {sorted(content)[:5]}"
            )
        content = {"state_dict": content}
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: its 'state_dict' is a {type(state).__name__}, no table of weights")
    other = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise CheckpointError(
            f"{path}: its 'state_dict' has an entry {other!r} of type {type(state[other]).__name__}, no tensor"
        )
    return content


def check_sum(path: Path, wanted: str | None) -> None:
    """Raise CheckpointError unless a file's SHA-256 is the wanted one, of which the first digits suffice."""
    if not wanted:
        return
    if not re.fullmatch("[0-9a-f]{8,64}", wanted.lower()):
        raise CheckpointError(f"--sha256 {wanted}: 8 to 64 hexadecimal digits, as sha256sum prints them")
    if Path(path).is_file() and not (found := file_hash(path)).startswith(wanted.lower()):
        raise CheckpointError(
            f"{path} has the SHA-256 {found[: max(12, len(wanted))]}, not --sha256 {wanted}: it is damaged, or another "
            "file"
        )


def progress(path: Path) -> tuple[int, int]:
    """How far a checkpoint got: finished epochs, and steps of the next. Raises CheckpointError."""
    content = read_checkpoint(path, tensors=False)
    return position(content, path)


def read_config(path: Path) -> dict[str, Any]:
    """The settings that a checkpoint was trained with; empty if it does not say. Raises CheckpointError."""
    return read_checkpoint(path, tensors=False).get("config") or {}


def intact(path: Path) -> tuple[int, int]:
    """:func:`progress` of a checkpoint that is read from start to end. Raises CheckpointError where it is damaged.

    torch compares no checksum, and would take a tensor of another value for what was saved.
    """
    place = progress(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                damaged = error
        if damaged:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: it is damaged ({damaged})")
    return place


def position(content: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Finished epochs, and steps of the next; of a bare state dict the number in its name, else 0.

    Raises:
        CheckpointError: they are no whole numbers from 0.
    """
    number = re.search(r"(\d+)", Path(path).name)
    epoch = content["epoch"] if "epoch" in content else int(number[1]) if number else 0
    found = {"epoch": epoch, "step": content.get("step", 0)}
    for name, value in found.items():
        if not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{path}: its '{name}' is {value!r}, no number of {name}s that are finished")
    return found["epoch"], found["step"]


def _why_unreadable(path: Path, error: Exception) -> str:
    """torch's own messages speak of its readers; the file's first bytes tell the cause."""
    with open(path, "rb") as stream:
        start = stream.read(8)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # a zip, or the pickle of torch before 1.6
        return f"torch.save did not write it, it begins with {start!r}" if start else "it is empty"
    if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
        return "it holds other objects than tensors and plain values, and none of them are loaded from a file"
    return "it is cut short or damaged; copy it again, or go on from an earlier one"


# ============================================================ keys and shapes


def strip_module(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the ``module.`` that DistributedDataParallel puts before every key, where it is there."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def add_module(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published checkpoints' keys: each starts with ``module.``."""
    return {"module." + key: value for key, value in strip_module(state).items()}


def load_strict(model: nn.Module, state: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Load every key or raise: no key missing, none left over, every shape equal.

    Raises:
        CheckpointError: names the first key that is wrong, and both shapes.
    """
    wanted = model.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise CheckpointError(f"{source} lacks {key} of shape {tuple(tensor.shape)}; it is of another model")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{source} has {key} of shape {tuple(state[key].shape)}, the model of shape {tuple(tensor.shape)}; "
                "give the flags that the checkpoint was trained with (configs.json beside it) and its store"
            )
    extra = next((key for key in state if key not in wanted), None)
    if extra is not None:
        raise CheckpointError(f"{source} has {extra} of shape {tuple(state[extra].shape)}, which the model lacks")
    model.load_state_dict(state, strict=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state as published: which implementation runs is this machine's matter."""
    state = optimizer.state_dict()
    groups = [{**group, "foreach": None, "fused": None} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: Path) -> None:
    """Load momentum buffers and the group; keep this process's implementation. Raises CheckpointError."""
    ours = optimizer.param_groups[0]
    implementation = {name: ours[name] for name in ("foreach", "fused", "capturable") if name in ours}
    try:
        # First, because they decide on which device a step count is kept.
        optimizer.load_state_dict(
            {**state, "param_groups": [{**group, **implementation} for group in state["param_groups"]]}
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: its optimizer state is of another model ({error})") from error


# ============================================================ whether it may be used

LARGEST = 1e15  # of a sound value: float32 cannot hold the squares of larger ones, which BatchNorm takes next


def first_unsound(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or past LARGEST. Waits for the device once."""
    names = [name for name, value in tensors.items() if value.is_floating_point() and value.numel()]
    if not names:
        return None
    largest = torch.stack([torch.linalg.vector_norm(tensors[name].detach(), torch.inf).float() for name in names])
    sound = (largest <= LARGEST).tolist()  # False for NaN
    return next((name for name, good in zip(names, sound) if not good), None)


def refuse_unsound(tensors: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Raise CheckpointError where a tensor of a file is not sound."""
    unsound = first_unsound(tensors)
    if unsound is not None:
        raise CheckpointError(
            f"{source} has values in {unsound} that are not finite, or beyond {LARGEST:.0e}; take an earlier checkpoint"
        )


def check_table(content: Mapping[str, Any], source: Path | str, count: int, fingerprint: str, root: object) -> str:
    """Refuse a table of locations that is not the checkpoint's own.

    Args:
        content: the checkpoint's.
        source: its file.
        count, fingerprint: locations of the table, and what tells it from another of as many.
        root: the patch store that it is of, for the message.

    Returns:
        A note where the checkpoint does not tell its table (published weights do not), else nothing.

    Raises:
        CheckpointError: it was trained on another table.
    """
    queue = strip_module(content["state_dict"]).get("queue")
    advice = "patches must be cut at the checkpoint's own table of locations (atlas_patch_loc.npy)"
    if queue is not None and queue.shape[-1] != count:
        raise CheckpointError(
            f"{source} was trained on {queue.shape[-1]} locations, --root-dir {root} has {count}; {advice}"
        )
    own = (content.get("config") or {}).get("location_table")
    if own is None:
        return f"{source} does not tell its table of locations: that {root}'s {count} are the same is for you to know"
    if own != fingerprint:
        raise CheckpointError(
            f"{source} was trained on another table of locations than --root-dir {root} has (fingerprint {own}, there "
            f"{fingerprint}); {advice}"
        )
    return ""


# ============================================================ the encoder alone


def query_encoder_state(content: Mapping[str, Any], source: Path | str) -> dict[str, torch.Tensor]:
    """The entries of ``encoder_q`` alone, without its prefix.

    Raises:
        CheckpointError: there are none.
    """
    state = strip_module(content["state_dict"])
    prefix = "encoder_q."
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not encoder:
        raise CheckpointError(f"{source} has no key that starts with {prefix}; it is no DrasCLR checkpoint")
    return encoder


def encoder_sizes(state: Mapping[str, torch.Tensor], source: Path | str) -> dict[str, Any]:
    """Arguments of Encoder, and ``mlp``, read off the shapes of an encoder's own state dict.

    Raises:
        CheckpointError: a key that tells a size is missing or of the wrong rank.
    """
    mlp = "fc.2.weight" in state
    projection = "fc.2.weight" if mlp else "fc.weight"
    ranks = {"conv4.weight": 6, "conv4._routing_fn.fc.weight": 2, projection: 2}
    for key, rank in ranks.items():
        if key not in state or state[key].dim() != rank:
            raise CheckpointError(f"{source} has no encoder_q.{key} of {rank} dimensions; it is no DrasCLR checkpoint")
    return {
        "rep_dim": state["conv4.weight"].shape[1],
        "moco_dim": state[projection].shape[0],
        "num_experts": state["conv4.weight"].shape[0],
        "num_coordinates": state["conv4._routing_fn.fc.weight"].shape[1] // 3,
        "mlp": mlp,
    }


def build_query_encoder(base_encoder, content: Mapping[str, Any], source: Path | str) -> tuple[nn.Module, dict]:
    """An encoder of the checkpoint's own sizes with its weights, in eval mode; and those sizes."""
    state = query_encoder_state(content, source)
    refuse_unsound(state, source)
    sizes = encoder_sizes(state, source)
    encoder = base_encoder(**{key: value for key, value in sizes.items() if key != "mlp"})
    if sizes["mlp"]:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    load_strict(encoder, state, source)
    return encoder.eval(), sizes
