"""A step's report: a row a subject, what each output was made from, and claims on outputs under way."""

import os
from typing import Any

import pandas as pd

from data.layout import StoreLayout
from misc.files import locked, write_text

STAGES = ("segment_lung", "register", "patchify_images")  # that a subject goes through, by their reports
STAMPS = ("method", "atlas", "image_stamp")  # columns of a report that tell what an output was made from


def previous_figures(layout: StoreLayout, script: str) -> dict[str, dict[str, str]]:
    """The last report's rows by sid, to tell with which settings an output was made."""
    path = layout.report(script)
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError):
        return {}
    return {row["sid"]: row for row in table.to_dict("records")} if "sid" in table.columns else {}


def failed_before(layout: StoreLayout, script: str) -> dict[str, str]:
    """Why subjects failed in the last run of a stage before ``script``, by sid."""
    before = STAGES[: STAGES.index(script)] if script in STAGES else STAGES
    failed: dict[str, str] = {}
    for stage in before:
        for sid, row in previous_figures(layout, stage).items():
            if row.get("status") == "failed":
                failed.setdefault(sid, f"{stage}: {row.get('message', '')}")
    return failed


def claim(layout: StoreLayout, script: str, sid: str) -> None:
    """Note, before a subject's outputs are touched, that they are this step's and not the user's own.

    The report says so from its next writing on; a run that is killed before that leaves the note, and
    the next one makes the outputs again.
    """
    folder = layout.claims(script)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sid).touch()


def unclaim(layout: StoreLayout, script: str, sids: list[str]) -> None:
    """The report tells of these subjects now."""
    for sid in sids:
        (layout.claims(script) / sid).unlink(missing_ok=True)


def claimed(layout: StoreLayout, script: str) -> dict[str, dict[str, str]]:
    """Stamps, of nothing that is there, for subjects that a run was killed at."""
    folder = layout.claims(script)
    sids = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    return {sid: dict.fromkeys(STAMPS, "interrupted") for sid in sids}


def stamps_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a failed subject's row keeps of the one before: what is left of its output is ours, not the user's own."""
    return {name: row[name] for name in STAMPS if row.get(name)}


def write_report(layout: StoreLayout, script: str, rows: dict[str, dict[str, Any]]) -> None:
    """Put this run's rows into the report; subjects that it has not reached, or does not have, keep theirs."""
    path = layout.report(script)
    with locked(layout.report_lock(script)):  # two runs may share a store, each with its table
        merged = {**previous_figures(layout, script), **rows}
        table = pd.DataFrame([merged[sid] for sid in sorted(merged)], dtype=object)  # whole numbers stay whole
        first = ["sid", "status", "seconds", "message"]
        table = table[first + [name for name in table.columns if name not in first]]
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
