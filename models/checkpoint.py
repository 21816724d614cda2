"""Checkpoints in the published format: saved whole, read safely, loaded strictly."""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from misc.command import UserError
from misc.experiment import listed
from misc.files import write_whole

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
    return content


def progress(path: Path) -> tuple[int, int]:
    """How far a checkpoint got: finished epochs, and steps of the next. Raises CheckpointError."""
    content = read_checkpoint(path, tensors=False)
    return position(content, path)


def position(content: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Finished epochs, and steps of the next; of a bare state dict the number in its name, else 0."""
    number = re.search(r"(\d+)", Path(path).name)
    epoch = content["epoch"] if "epoch" in content else int(number[1]) if number else 0
    return int(epoch), int(content.get("step", 0))


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


# ============================================================ a run's state


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


class Restored(NamedTuple):
    """What a checkpoint tells beside the tensors that it has filled."""

    epoch: int  # finished
    step: int  # of the epoch under way
    totals: torch.Tensor | None  # sums over these steps of the meters' figures
    config: dict[str, Any]  # the settings that it was trained with


class TrainingState:
    """All that a run needs to go on as if it had not stopped: weights, queue, optimiser, random streams, position.

    Args:
        model: DrasCLR itself, not wrapped.
        optimizer: of its parameters.
        device: where both are.
        arch: a name that the published format keeps.
        settings: kept in the checkpoint, to tell what a resumed run changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        arch: str,
        settings: Mapping[str, Any],
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.arch, self.settings = arch, dict(settings)

    def save(self, path: Path, epoch: int, step: int = 0, totals: torch.Tensor | None = None) -> None:
        """Write the state after ``epoch`` finished epochs and ``step`` steps of the next."""
        checkpoint = {
            "epoch": epoch,
            "arch": self.arch,
            "state_dict": add_module(self.model.state_dict()),
            "optimizer": optimizer_state(self.optimizer),
            "step": step,
            "totals": torch.zeros(0, dtype=torch.float64) if totals is None else totals,
            "rng_state": torch.get_rng_state(),
            "config": self.settings,
            "queue_origin": self.model.queue_origin(),
        }
        if self.device.type == "cuda":
            checkpoint["cuda_rng_state"] = torch.cuda.get_rng_state(self.device)
        save_checkpoint(path, checkpoint)

    def restore(self, path: Path) -> Restored:
        """Read a state back; one of weights alone leaves the rest as it is.

        Raises:
            CheckpointError: unreadable, or of another model.
        """
        content = read_checkpoint(path)
        load_strict(self.model, strip_module(content["state_dict"]), path)
        if "optimizer" in content:
            load_optimizer(self.optimizer, content["optimizer"], path)
        if "queue_origin" in content:  # ours; without it nobody knows whose the queue's keys are
            self.model.load_queue_origin(content["queue_origin"])
        if "rng_state" in content:
            torch.set_rng_state(content["rng_state"])
            if self.device.type == "cuda" and "cuda_rng_state" in content:
                torch.cuda.set_rng_state(content["cuda_rng_state"], self.device)
        epoch, step = int(content.get("epoch", 0)), int(content.get("step", 0))
        totals = content.get("totals")
        return Restored(epoch, step, totals if step else None, content.get("config") or {})


FREE_TO_CHANGE = ("resume", "exp_name", "root_dir", "epochs", "start_epoch", "no_progress")  # without a note
SETS_STEPS = ("batch_size", "seed", "num_subjects", "accumulate", "location_order")  # what an epoch's steps are


def note_changes(
    restored: Restored, settings: Mapping[str, Any], source: Path, begins_anew: bool, say: Callable[[str], None]
) -> None:
    """Tell which settings a resumed run changes.

    Args:
        restored: what ``source`` told.
        settings: of the run that goes on.
        begins_anew: it starts an epoch of its own choice, not within the one under way.
        say: prints a line.

    Raises:
        CheckpointError: the steps or the optimiser would be others.
    """
    before = restored.config
    changed = [name for name in before if settings.get(name, before[name]) != before[name]]
    for name in changed:
        if name not in FREE_TO_CHANGE:
            say(f"note: --{name.replace('_', '-')} was {before[name]} in {source.name} and is {settings[name]} now")
    steps = f" and {restored.step} steps" if restored.step else ""
    say(f"resuming from {source}: {restored.epoch} epochs done{steps}")
    if "optimizer" in changed:
        raise CheckpointError(f"{source} holds the state of --optimizer {before['optimizer']}; give the same to go on")
    for name in SETS_STEPS:
        if name in changed and restored.step and not begins_anew:
            raise CheckpointError(
                f"{source} is from within an epoch with {name} {before[name]}, now it is {settings[name]}: "
                f"its steps are others; give the same, or --start-epoch {restored.epoch} to begin that epoch again"
            )


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
    sizes = encoder_sizes(state, source)
    encoder = base_encoder(**{key: value for key, value in sizes.items() if key != "mlp"})
    if sizes["mlp"]:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    load_strict(encoder, state, source)
    return encoder.eval(), sizes
