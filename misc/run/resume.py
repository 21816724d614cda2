"""Report the settings that a resumed run changes, and refuse changes that are not possible."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from misc.command import UserError

WITHOUT_NOTE = (
    *("resume", "init_from", "exp_name", "root_dir", "start_epoch", "no_progress", "keep", "patience"),
    "neighbor_pass",  # determined by --beta
)
SETS_STEPS = (
    "batch_size",
    "seed",
    "num_subjects",
    "accumulate",
    "location_order",
    "batch_by",
)  # settings that determine the steps of an epoch
NOT_FLAGS = {
    "num_subjects": "number of subjects",
    "store_version": "version of the store",
    "location_table": "location table",
    "world_size": "number of ranks",
}
CONSEQUENCES = {  # effects of a changed setting that are not clear from the name of the setting
    "epochs": "so the learning rates of the cosine schedule change",
    "store_version": "so the run continues with different patches or subjects",
    "world_size": "which gives the same results up to rounding",
    "bn_groups": "so BatchNorm computes its statistics over different samples",
}


class ResumeError(UserError):
    """Raised if a run cannot resume or start from a checkpoint; the message names the flag to change."""


def did_encode_neighbors(checkpoint_settings: Mapping[str, Any]) -> bool:
    """Return whether the run that wrote a checkpoint encoded neighbours.

    Checkpoints without the entry neighbor_pass, such as the published ones, are from runs that encoded neighbours.
    """
    return checkpoint_settings.get("neighbor_pass", True)


def needs_neighbors(beta: float, checkpoint_settings: Mapping[str, Any] | None) -> bool:
    """Return whether neighbours are read and encoded at every step.

    A new run with --beta 0 does not need neighbours. A run that started with neighbours continues to encode them,
    because neighbours contribute to its BatchNorm statistics.

    Args:
        beta: the value of --beta; a warm-up does not change it.
        checkpoint_settings: settings of the checkpoint that the run resumes from, None for a new run.
    """
    return beta > 0 or (checkpoint_settings is not None and did_encode_neighbors(checkpoint_settings))


def note_setting_changes(
    checkpoint_settings: Mapping[str, Any],
    new_settings: Mapping[str, Any],
    checkpoint_path: Path,
    checkpoint_position: tuple[int, int],
    starts_new_epoch: bool,
    say: Callable[[str], None],
) -> None:
    """Report which settings a resumed run changes.

    Args:
        checkpoint_settings: settings of the checkpoint.
        new_settings: settings of the resumed run.
        checkpoint_path: the checkpoint.
        checkpoint_position: number of finished epochs, and number of finished steps in the next epoch, when saved.
        starts_new_epoch: whether the run starts at the beginning of an epoch instead of within an unfinished epoch.
        say: function that prints a line.

    Raises:
        ResumeError: a changed setting would alter the steps of the unfinished epoch, or --optimizer differs.
    """
    epoch, step = checkpoint_position
    changed = [
        name
        for name in checkpoint_settings
        if new_settings.get(name, checkpoint_settings[name]) != checkpoint_settings[name]
    ]
    for name in changed:
        unused = name == "k_neighbors" and not new_settings["neighbor_pass"]
        if name not in WITHOUT_NOTE and not unused:
            shown = f"the {NOT_FLAGS[name]}" if name in NOT_FLAGS else f"--{name.replace('_', '-')}"
            consequence = f", {CONSEQUENCES[name]}" if name in CONSEQUENCES else ""
            say(
                f"note: {shown} was {checkpoint_settings[name]} in {checkpoint_path.name} "
                f"and is now {new_settings[name]}{consequence}"
            )
    had_pass, has_pass = did_encode_neighbors(checkpoint_settings), new_settings["neighbor_pass"]
    if has_pass and not new_settings["beta"]:
        say(f"note: --beta is 0, but {checkpoint_path.name} was trained with neighbours, so they are still encoded")
    if has_pass and not had_pass:
        say("note: from now on, neighbours also contribute to the BatchNorm statistics")
    steps = f" and {step} steps" if step else ""
    say(f"resuming from {checkpoint_path} after {epoch} epochs{steps}")
    if "optimizer" in changed:
        raise ResumeError(
            f"{checkpoint_path} holds the state of --optimizer {checkpoint_settings['optimizer']}; "
            "use this optimiser to resume"
        )
    if has_pass and not had_pass and step and not starts_new_epoch:
        raise ResumeError(
            f"{checkpoint_path} was saved partway through an epoch trained without neighbours; use --beta 0, "
            f"or --start-epoch {epoch} to start that epoch again"
        )
    for name in SETS_STEPS:
        if name in changed and step and not starts_new_epoch:
            raise ResumeError(
                f"{checkpoint_path} was saved partway through an epoch with {name} {checkpoint_settings[name]}; "
                f"the rest of this epoch cannot use {new_settings[name]}. Use the old value, "
                f"or --start-epoch {epoch} to start that epoch again"
            )


def refuse_other_encoder(source: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ResumeError if the encoder in ``source`` differs in size from this run's; the message names the flag."""
    for name in ("rep_dim", "num_experts"):
        if theirs[name] != ours[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ResumeError(
                f"--init-from {source} has {flag} {theirs[name]}, but this run has {ours[name]}; "
                f"use {flag} {theirs[name]}"
            )


def describe_initialization(source: Path, epochs: int, with_projection: bool, queue: tuple[int, int] | None) -> str:
    """Describe in one line what --init-from loads, from the fields of models.state.Started."""
    projection = "also loaded" if with_projection else "not loaded, because its size differs"
    left = f" (the checkpoint's queue of {queue[0]} locations with {queue[1]} keys each is not loaded)" if queue else ""
    return (
        f"starting from the encoder of {source} after {epochs} epochs, projection {projection}; queue and optimiser "
        f"start fresh{left}"
    )
