"""Checkpoints in the published format: written aside and renamed, read safely, loaded strictly."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable or of another shape; the message says what to do."""


def checkpoint_name(epoch: int) -> str:
    """File name after ``epoch`` finished epochs."""
    return f"checkpoint_patch_{epoch:04d}.pth.tar"


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write aside, flush to the disk, rename: a crash leaves the old file or the new one, never half."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as stream:
        torch.save(dict(checkpoint), stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict, onto the CPU without running any code in it.

    Returns:
        The checkpoint's entries; a bare state dict comes back as {'state_dict': ...}.

    Raises:
        CheckpointError: no such file, or not a checkpoint that ``weights_only=True`` loads.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.pth.tar")) if path.parent.is_dir() else []
        listed = f"; {path.parent} has {', '.join(beside)}" if beside else ""
        raise CheckpointError(f"no checkpoint at {path}{listed}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
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
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """torch's own messages speak of its readers; the file's first bytes tell the cause."""
    with open(path, "rb") as stream:
        start = stream.read(8)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # a zip, or the pickle of torch before 1.6
        return f"torch.save did not write it, it begins with {start!r}" if start else "it is empty"
    if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
        return "it holds other objects than tensors and plain values, and none of them are loaded from a file"
    return "it is cut short or damaged; copy it again, or go on from an earlier one"


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
    sizes = encoder_sizes(state, source)
    encoder = base_encoder(**{key: value for key, value in sizes.items() if key != "mlp"})
    if sizes["mlp"]:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    load_strict(encoder, state, source)
    return encoder.eval(), sizes
