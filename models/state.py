"""Save the state of a run to a checkpoint, and restore it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from misc.run.resume import refuse_other_encoder
from misc.run.runlog import DivergedError, Sums
from models.checkpoint import (
    add_module_prefix,
    check_same_location_table,
    export_optimizer_state,
    extract_query_encoder,
    find_epoch_and_step,
    find_nonfinite_or_huge_tensor,
    infer_encoder_sizes,
    load_optimizer,
    load_strict,
    read_checkpoint,
    refuse_nonfinite_or_huge_tensors,
    save_checkpoint,
    strip_module_prefix,
)


class Restored(NamedTuple):
    """Training position and settings that a checkpoint contains in addition to tensors."""

    epoch: int  # finished epochs
    step: int  # finished steps of the current epoch
    sums: Sums | None  # sums of the statistics over the finished steps of this epoch
    config: dict[str, Any]  # training settings
    note: str = ""  # note for the user, for example that the checkpoint does not record its table of locations


class Started(NamedTuple):
    """Description of the checkpoint that a new run took its encoder from."""

    epochs: int  # epochs that the encoder was trained for
    with_projection: bool  # whether the projection was loaded too
    queue: tuple[int, int] | None  # size of the checkpoint's queue, which is not loaded: locations, keys per location


class TrainingState:
    """Complete state of a run: weights, queue, optimiser, random number generators and position.

    A run that restores this state gives the same result as an uninterrupted run.

    Args:
        model: the DrasCLR model, without a DistributedDataParallel wrapper.
        optimizer: optimiser of the model's parameters.
        device: device of the model and the optimiser.
        arch: name of the architecture, which the published format records.
        settings: settings to save in the checkpoint, so that a resumed run can report changes. ``location_table``,
            ``store_version`` and ``root_dir`` identify the data.
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

    def save(self, path: Path, epoch: int, step: int = 0, sums: Sums | None = None) -> None:
        """Write the state after ``epoch`` finished epochs and ``step`` steps of the next epoch.

        Raises:
            DivergedError: a tensor has values that are not finite or are too large. Nothing is written.
        """
        save_checkpoint(path, self._make_checkpoint_content(epoch, step, sums))

    @property
    def aside(self) -> Callable[..., Callable[[], None]] | None:
        """The function :meth:`copy_for_saving`, or None on a CPU, where a copy of the queue would take 1.2 GB."""
        return self.copy_for_saving if self.device.type == "cuda" else None

    def copy_for_saving(self, path: Path, epoch: int, step: int = 0, sums: Sums | None = None) -> Callable[[], None]:
        """Copy the state to host memory and return a function that writes the copy. Raises DivergedError."""
        copied = copy_to_host(self._make_checkpoint_content(epoch, step, sums))
        return lambda: save_checkpoint(path, copied)

    def _make_checkpoint_content(self, epoch: int, step: int, sums: Sums | None) -> dict[str, Any]:
        weights, optimizer = add_module_prefix(self.model.state_dict()), export_optimizer_state(self.optimizer)
        kept = {f"optimizer {i} {k}": v for i, entry in optimizer["state"].items() for k, v in entry.items()}
        tensors = {name: value for name, value in {**weights, **kept}.items() if isinstance(value, torch.Tensor)}
        unsound = find_nonfinite_or_huge_tensor(tensors)
        if unsound is not None:
            where = f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"
            raise DivergedError(
                f"at {where}, {unsound} has values that are too large or not finite, so the training state is not saved"
            )
        checkpoint = {
            "epoch": epoch,
            "arch": self.arch,
            "state_dict": weights,
            "optimizer": optimizer,
            "step": step,
            "totals": torch.zeros(0, dtype=torch.float64) if sums is None else sums.totals,
            "rng_state": torch.get_rng_state(),
            "config": self.settings,
            "queue_origin": self.model.export_key_subjects_and_steps(),
        }
        if sums is not None:
            checkpoint["since_print"] = {"sums": sums.since, "steps": sums.steps}
        if self.device.type == "cuda":
            checkpoint["cuda_rng_state"] = torch.cuda.get_rng_state(self.device)
        return checkpoint

    def restore(self, path: Path) -> Restored:
        """Restore the state from a checkpoint. If the checkpoint has only weights, only the weights change.

        Raises:
            CheckpointError: the checkpoint is unreadable or not finite, or it belongs to a different model or a
                different table of locations.
        """
        content, settings = read_checkpoint(path), self.settings
        state, config = strip_module_prefix(content["state_dict"]), content.get("config") or {}
        table, root = settings.get("location_table", ""), settings.get("root_dir", "")
        note = check_same_location_table(content, path, self.model.num_locs, table, root)
        load_strict(self.model, state, path)
        refuse_nonfinite_or_huge_tensors(self.model.state_dict(), path)
        if "optimizer" in content:
            load_optimizer(self.optimizer, content["optimizer"], path)
        if "queue_origin" in content:  # published checkpoints do not record which subject a key comes from
            self.model.restore_key_subjects_and_steps(content["queue_origin"])
            if config.get("store_version") != settings.get("store_version"):
                self.model.queue_subject.fill_(-1)  # the saved row numbers of subjects belong to a different store
        if "rng_state" in content:
            torch.set_rng_state(content["rng_state"])
            if self.device.type == "cuda" and "cuda_rng_state" in content:
                torch.cuda.set_rng_state(content["cuda_rng_state"], self.device)
        epoch, step = int(content.get("epoch", 0)), int(content.get("step", 0))
        sums = None
        if step and content.get("totals") is not None:
            window = content.get("since_print") or {"sums": torch.zeros_like(content["totals"]), "steps": 0}
            sums = Sums(content["totals"], window["sums"], int(window["steps"]))
        return Restored(epoch, step, sums, config, note)


def copy_to_host(value: Any) -> Any:
    """Copy nested lists and dicts of tensors and plain values to host memory. Tensors keep their strides."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copy_to_host(entry) for key, entry in value.items()}
    return [copy_to_host(entry) for entry in value] if isinstance(value, list) else value


def load_initial_weights(model: nn.Module, path: Path) -> Started:
    """Load the query encoder of a checkpoint into both encoders of ``model``.

    The queue, the optimiser and the position (epoch, step) stay as in a new run.

    The checkpoint and ``model`` must have convolutions of the same shapes. A projection (``fc``) of a different size
    is not loaded, because the projection belongs to the loss and not to the representation.

    Raises:
        CheckpointError: the checkpoint is unreadable or has values that are not finite.
        ResumeError: the checkpoint's encoder and the model differ in size; the message names a flag to change.
    """
    content = read_checkpoint(path)
    state = extract_query_encoder(content, path)
    refuse_nonfinite_or_huge_tensors(state, path)
    own = model.encoder_q.state_dict()
    refuse_other_encoder(path, infer_encoder_sizes(state, path), infer_encoder_sizes(own, "this run"))
    projection, own_projection = (
        {key: value for key, value in encoder.items() if key.startswith("fc.")} for encoder in (state, own)
    )
    fits = {key: value.shape for key, value in projection.items()} == {
        key: value.shape for key, value in own_projection.items()
    }
    if not fits:
        state = {key: value for key, value in state.items() if key not in projection} | own_projection
    load_strict(model.encoder_q, state, path)
    model.encoder_k.load_state_dict(model.encoder_q.state_dict())
    queue = strip_module_prefix(content["state_dict"]).get("queue")  # (dim, K, L)
    return Started(
        find_epoch_and_step(content, path)[0], fits, None if queue is None else (queue.shape[2], queue.shape[1])
    )
