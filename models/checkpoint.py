"""Checkpoints in the published format: write them atomically, read them safely, load them strictly."""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misc.command import UserError
from misc.experiment import describe_checkpoints
from misc.files import hash_file, write_atomically

# ============================================================ files


class CheckpointError(UserError):
    """Raised if a checkpoint is missing or unreadable, or does not fit the model; the message says what to do."""


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: after a crash, the file is either the old one or the new one."""
    write_atomically(path, lambda stream: torch.save(dict(checkpoint), stream))


def read_checkpoint(path: Path, tensors: bool = True) -> dict[str, Any]:
    """Read a checkpoint, or a bare state dict, onto the CPU without running any code from the file.

    Args:
        path: path of the file.
        tensors: False leaves the tensors on the disk until their values are used, and reads only the other
            entries, which takes milliseconds for any file size. Files from torch before 1.6 are always read completely.

    Returns:
        The entries of the checkpoint. A bare state dict is returned as {'state_dict': ...}.

    Raises:
        CheckpointError: the file does not exist, or ``weights_only=True`` cannot load it as a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        beside = describe_checkpoints(path.parent)
        raise CheckpointError(f"no checkpoint at {path}{f'; {beside}' if beside else ''}")
    try:
        mapped = not tensors and zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types of errors for a file that is not a checkpoint
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_explain_read_error(path, error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    content = dict(content)
    if "state_dict" not in content:
        if not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise CheckpointError(
                f"{path} has no 'state_dict' and is not a bare state dict; its first keys are {sorted(content)[:5]}"
            )
        content = {"state_dict": content}
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: its 'state_dict' is a {type(state).__name__}, not a mapping of weights")
    other = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise CheckpointError(
            f"{path}: its 'state_dict' has an entry {other!r} of type {type(state[other]).__name__}, not a tensor"
        )
    return content


def check_sha256(path: Path, wanted: str | None) -> None:
    """Raise CheckpointError if the SHA-256 of a file does not start with the digits in ``wanted``."""
    if not wanted:
        return
    if not re.fullmatch("[0-9a-f]{8,64}", wanted.lower()):
        raise CheckpointError(
            f"--sha256 {wanted} is not a SHA-256; give the first 8 to 64 hexadecimal digits that sha256sum prints"
        )
    if Path(path).is_file() and not (found := hash_file(path)).startswith(wanted.lower()):
        raise CheckpointError(
            f"{path} has the SHA-256 {found[: max(12, len(wanted))]}, not --sha256 {wanted}: the file is damaged or "
            "is not the expected one"
        )


def read_progress(path: Path) -> tuple[int, int]:
    """Read the number of finished epochs, and of finished steps in the next epoch. Raises CheckpointError."""
    content = read_checkpoint(path, tensors=False)
    return find_epoch_and_step(content, path)


def read_config(path: Path) -> dict[str, Any]:
    """Return the training settings in a checkpoint, or {} if it has none. Raises CheckpointError."""
    return read_checkpoint(path, tensors=False).get("config") or {}


def verify_checkpoint(path: Path) -> tuple[int, int]:
    """Verify a checkpoint's checksums and return what :func:`read_progress` returns. Raises CheckpointError.

    torch.load does not verify checksums, so it would load changed tensor values without an error.
    """
    place = read_progress(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                damaged = error
        if damaged:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: it is damaged ({damaged})")
    return place


def find_epoch_and_step(content: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return a checkpoint's number of finished epochs, and its number of finished steps in the next epoch.

    For a bare state dict, the epoch is the first number in the file name, or 0 if the name has no number.

    Raises:
        CheckpointError: the epoch or the step is negative or not an integer.
    """
    number = re.search(r"(\d+)", Path(path).name)
    epoch = content["epoch"] if "epoch" in content else int(number[1]) if number else 0
    found = {"epoch": epoch, "step": content.get("step", 0)}
    for name, value in found.items():
        if not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{path}: its '{name}' is {value!r}, not a number of finished {name}s")
    return found["epoch"], found["step"]


def _explain_read_error(path: Path, error: Exception) -> str:
    """Return the probable reason why torch cannot read a file, based on its first bytes and torch's error."""
    with open(path, "rb") as stream:
        start = stream.read(8)
    if not start.startswith((b"PK\x03\x04", b"\x80")):  # neither a zip file nor a pickle from torch before 1.6
        return f"torch.save did not write this file, which begins with {start!r}" if start else "it is empty"
    if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
        return "it holds objects other than tensors and plain values, which are not loaded because they can run code"
    return "it is cut short or damaged; copy it again, or use an earlier checkpoint"


# ============================================================ keys and shapes


def strip_module_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the prefix ``module.`` of DistributedDataParallel from every key that has it."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def add_module_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the prefix ``module.`` to every key, as in the published checkpoints."""
    return {"module." + key: value for key, value in strip_module_prefix(state).items()}


def load_strict(model: nn.Module, state: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Load a state dict that has exactly the keys and shapes of the model.

    Raises:
        CheckpointError: a key is missing or unknown, or a shape differs. The message names the first key that differs.
    """
    wanted = model.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise CheckpointError(
                f"{source} lacks {key} of shape {tuple(tensor.shape)}; it is a checkpoint of another model"
            )
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{source} has {key} of shape {tuple(state[key].shape)}, but the model needs {tuple(tensor.shape)}; "
                "use the store and the flags that the checkpoint was trained with (see configs.json next to it)"
            )
    extra = next((key for key in state if key not in wanted), None)
    if extra is not None:
        raise CheckpointError(
            f"{source} has {extra} of shape {tuple(state[extra].shape)}, which the model does not have; it is a "
            "checkpoint of another model"
        )
    model.load_state_dict(state, strict=True)


def export_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state in the published format, with the settings foreach and fused set to None."""
    state = optimizer.state_dict()
    groups = [{**group, "foreach": None, "fused": None} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: Path) -> None:
    """Load the optimiser's state but keep this process's foreach and fused settings. Raises CheckpointError."""
    ours = optimizer.param_groups[0]
    implementation = {name: ours[name] for name in ("foreach", "fused", "capturable") if name in ours}
    try:
        # Set foreach, fused and capturable before loading, because they determine the device of the step counts.
        optimizer.load_state_dict(
            {**state, "param_groups": [{**group, **implementation} for group in state["param_groups"]]}
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{source}: its optimizer state belongs to another model ({error})") from error


# ============================================================ checks before use

LARGEST = 1e15  # largest valid value in a checkpoint; sums of squares in BatchNorm must not overflow float32


def find_nonfinite_or_huge_tensor(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is not finite or exceeds LARGEST, or None.

    The function synchronises with the device only once.
    """
    names = [name for name, value in tensors.items() if value.is_floating_point() and value.numel()]
    if not names:
        return None
    largest = torch.stack([torch.linalg.vector_norm(tensors[name].detach(), torch.inf).float() for name in names])
    sound = (largest <= LARGEST).tolist()  # False for NaN
    return next((name for name, good in zip(names, sound) if not good), None)


def refuse_nonfinite_or_huge_tensors(tensors: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Raise CheckpointError if a tensor has a value that is not finite or exceeds LARGEST."""
    unsound = find_nonfinite_or_huge_tensor(tensors)
    if unsound is not None:
        raise CheckpointError(
            f"{source} has values in {unsound} that are not finite or exceed {LARGEST:.0e}; use an earlier checkpoint"
        )


def check_same_location_table(
    checkpoint: Mapping[str, Any], checkpoint_path: Path | str, num_locations: int, fingerprint: str, store_root: object
) -> str:
    """Check that a store has the table of locations that the checkpoint was trained on.

    Args:
        checkpoint: entries of the checkpoint.
        checkpoint_path: file of the checkpoint, for messages.
        num_locations: number of locations in the store's table.
        fingerprint: fingerprint of the store's table, which distinguishes it from other tables of the same length.
        store_root: folder of the store, for messages.

    Returns:
        A note if the checkpoint does not record its table, otherwise "". The published weights do not record
        their location table.

    Raises:
        CheckpointError: the checkpoint was trained on another location table.
    """
    queue = strip_module_prefix(checkpoint["state_dict"]).get("queue")
    advice = "cut the patches at the locations that the checkpoint was trained on (its atlas_patch_loc.npy)"
    if queue is not None and queue.shape[-1] != num_locations:
        raise CheckpointError(
            f"{checkpoint_path} was trained on {queue.shape[-1]} locations, "
            f"but --root-dir {store_root} has {num_locations}; {advice}"
        )
    own = (checkpoint.get("config") or {}).get("location_table")
    if own is None:
        return (
            f"{checkpoint_path} does not record its table of locations; "
            f"make sure that {store_root} has the same {num_locations} locations"
        )
    if own != fingerprint:
        raise CheckpointError(
            f"{checkpoint_path} was trained on a different table of locations (fingerprint {own}) than "
            f"--root-dir {store_root} (fingerprint {fingerprint}); {advice}"
        )
    return ""


# ============================================================ query encoder


def extract_query_encoder(content: Mapping[str, Any], source: Path | str) -> dict[str, torch.Tensor]:
    """Return the entries of ``encoder_q``, and remove the prefix ``encoder_q.`` from their keys.

    Raises:
        CheckpointError: the checkpoint has no entry of ``encoder_q``.
    """
    state = strip_module_prefix(content["state_dict"])
    prefix = "encoder_q."
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not encoder:
        raise CheckpointError(f"{source} has no key that starts with {prefix}, so it is not a DrasCLR checkpoint")
    return encoder


def infer_encoder_sizes(state: Mapping[str, torch.Tensor], source: Path | str) -> dict[str, Any]:
    """Infer the arguments of Encoder, and ``mlp``, from the shapes in an encoder's state dict.

    Raises:
        CheckpointError: a required key is missing or has the wrong number of dimensions.
    """
    mlp = "fc.2.weight" in state
    projection = "fc.2.weight" if mlp else "fc.weight"
    ranks = {"conv4.weight": 6, "conv4._routing_fn.fc.weight": 2, projection: 2}
    for key, rank in ranks.items():
        if key not in state or state[key].dim() != rank:
            raise CheckpointError(
                f"{source} has no encoder_q.{key} with {rank} dimensions, so it is not a DrasCLR checkpoint"
            )
    return {
        "rep_dim": state["conv4.weight"].shape[1],
        "moco_dim": state[projection].shape[0],
        "num_experts": state["conv4.weight"].shape[0],
        "num_coordinates": state["conv4._routing_fn.fc.weight"].shape[1] // 3,
        "mlp": mlp,
    }


def build_query_encoder(
    base_encoder: Callable[..., nn.Module], content: Mapping[str, Any], source: Path | str
) -> tuple[nn.Module, dict]:
    """Build an encoder in eval mode with the sizes and weights of a checkpoint. Return the encoder and its sizes."""
    state = extract_query_encoder(content, source)
    refuse_nonfinite_or_huge_tensors(state, source)
    sizes = infer_encoder_sizes(state, source)
    encoder = base_encoder(**{key: value for key, value in sizes.items() if key != "mlp"})
    if sizes["mlp"]:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    load_strict(encoder, state, source)
    return encoder.eval(), sizes
