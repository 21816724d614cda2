"""What a run that goes on from a checkpoint changes, in words: notes, and refusals that name the flag."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from misc.command import UserError

WITHOUT_NOTE = (
    *("resume", "init_from", "exp_name", "root_dir", "start_epoch", "no_progress", "keep", "patience"),
    "neighbor_pass",  # which --beta decides
)
SETS_STEPS = (
    "batch_size",
    "seed",
    "num_subjects",
    "accumulate",
    "location_order",
    "batch_by",
)  # what an epoch's steps are
NOT_FLAGS = {
    "num_subjects": "number of subjects",
    "store_version": "store's version",
    "location_table": "table of locations",
    "world_size": "number of ranks",
}
CONSEQUENCES = {  # of a change, if the flag's name does not say it
    "epochs": "so the cosine's rates are others",
    "store_version": "so it goes on with other patches or other subjects",
    "world_size": "which computes the same to rounding",
    "bn_groups": "so BatchNorm takes its statistics over other samples",
}


class ResumeError(UserError):
    """A run cannot go on from, or start from, a checkpoint; the message says which flag would let it."""


def had_neighbor_pass(before: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's run encoded neighbours; checkpoints that do not say, published ones too, always did."""
    return before.get("neighbor_pass", True)


def has_neighbor_pass(beta: float, before: Mapping[str, Any] | None) -> bool:
    """Whether neighbours are read and encoded at every step.

    --beta 0 needs none. A run that began with them keeps them, because its BatchNorm statistics come from them too.

    Args:
        beta: the flag's value; a warm-up does not change it.
        before: settings of the checkpoint that the run goes on from, None for a new run.
    """
    return beta > 0 or (before is not None and had_neighbor_pass(before))


def note_changes(
    before: Mapping[str, Any],
    settings: Mapping[str, Any],
    source: Path,
    place: tuple[int, int],
    begins_anew: bool,
    say: Callable[[str], None],
) -> None:
    """Report which settings a resumed run changes.

    Args:
        before: settings of the checkpoint.
        settings: of the run that goes on.
        source: the checkpoint.
        place: its finished epochs, and steps of the next.
        begins_anew: the run starts an epoch of its own choice, not within the one under way.
        say: prints a line.

    Raises:
        ResumeError: the steps or the optimiser would be others.
    """
    epoch, step = place
    changed = [name for name in before if settings.get(name, before[name]) != before[name]]
    for name in changed:
        unused = name == "k_neighbors" and not settings["neighbor_pass"]
        if name not in WITHOUT_NOTE and not unused:
            shown = f"the {NOT_FLAGS[name]}" if name in NOT_FLAGS else f"--{name.replace('_', '-')}"
            consequence = f", {CONSEQUENCES[name]}" if name in CONSEQUENCES else ""
            say(f"note: {shown} was {before[name]} in {source.name} and is {settings[name]} now{consequence}")
    had_pass, has_pass = had_neighbor_pass(before), settings["neighbor_pass"]
    if has_pass and not settings["beta"]:
        say(f"note: --beta is 0, but {source.name} was trained with the neighbours' pass, which is kept")
    if has_pass and not had_pass:
        say("note: BatchNorm's statistics come from neighbours too from here on")
    steps = f" and {step} steps" if step else ""
    say(f"resuming from {source}: {epoch} epochs done{steps}")
    if "optimizer" in changed:
        raise ResumeError(f"{source} holds the state of --optimizer {before['optimizer']}; give the same to go on")
    if has_pass and not had_pass and step and not begins_anew:
        raise ResumeError(
            f"{source} is from within an epoch without neighbours (--beta 0); give --beta 0, or --start-epoch {epoch} "
            "to begin that epoch again"
        )
    for name in SETS_STEPS:
        if name in changed and step and not begins_anew:
            raise ResumeError(
                f"{source} is from within an epoch with {name} {before[name]}, now it is {settings[name]}: "
                f"its steps are others; give the same, or --start-epoch {epoch} to begin that epoch again"
            )


def refuse_other_encoder(source: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ResumeError if an encoder's sizes are not this run's; names the flag."""
    for name in ("rep_dim", "num_experts"):
        if theirs[name] != ours[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ResumeError(
                f"--init-from {source} has {flag} {theirs[name]}, this run {ours[name]}; give {flag} {theirs[name]}"
            )


def describe_start(source: Path, epochs: int, with_projection: bool, queue: tuple[int, int] | None) -> str:
    """One line on what --init-from takes: models.state.Started in words."""
    projection = "too" if with_projection else "left out, which has another size"
    left = f" (its {queue[0]} locations and {queue[1]} keys each are not taken)" if queue else ""
    return (
        f"starting from the encoder of {source}, {epochs} epochs, its projection {projection}; queue and optimiser "
        f"begin anew{left}"
    )
