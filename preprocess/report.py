"""Read and write the report of a stage, with one row per subject. Mark unfinished outputs with in-progress files."""

import os
from typing import Any

import pandas as pd

from data.layout import StoreLayout
from misc.files import wait_for_lock, write_text

STAGES = ("segment_lung", "register", "patchify_images")  # stages with a report, in the order of processing
STAMPS = ("method", "atlas", "image_stamp")  # report columns that identify what an output was made from


def read_previous_rows(layout: StoreLayout, script: str) -> dict[str, dict[str, str]]:
    """Return the rows of the last report by sid; the rows show which settings an output was made with."""
    path = layout.report_path(script)
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError):
        return {}
    return {row["sid"]: row for row in table.to_dict("records")} if "sid" in table.columns else {}


def find_earlier_failures(layout: StoreLayout, script: str) -> dict[str, str]:
    """Find the subjects that failed in the last run of any stage before ``script``, and map each sid to the reason."""
    before = STAGES[: STAGES.index(script)] if script in STAGES else STAGES
    failed: dict[str, str] = {}
    for stage in before:
        for sid, row in read_previous_rows(layout, stage).items():
            if row.get("status") == "failed":
                failed.setdefault(sid, f"{stage}: {row.get('message', '')}")
    return failed


def write_in_progress_file(layout: StoreLayout, script: str, sid: str) -> None:
    """Record that this stage, and not the user, makes a subject's outputs; call this before changing any file.

    The in-progress file is empty, and is removed after the report has been updated. If a run is killed before it has
    updated the report, the in-progress file stays, and the next run makes the outputs again.
    """
    folder = layout.subjects_in_progress_dir(script)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sid).touch()


def remove_in_progress_files(layout: StoreLayout, script: str, sids: list[str]) -> None:
    """Remove the in-progress files of subjects that are now in the report."""
    for sid in sids:
        (layout.subjects_in_progress_dir(script) / sid).unlink(missing_ok=True)


def make_interrupted_subject_stamps(layout: StoreLayout, script: str) -> dict[str, dict[str, str]]:
    """For each subject with an in-progress file from an interrupted run, return stamps that do not match any output."""
    folder = layout.subjects_in_progress_dir(script)
    sids = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    return {sid: dict.fromkeys(STAMPS, "interrupted") for sid in sids}


def select_provenance_columns(report_row: dict[str, Any]) -> dict[str, Any]:
    """Return the stamp columns (STAMPS) of a failed subject's last report row.

    The stamps in the report show that a leftover output was made by this stage, and not by the user.
    """
    return {name: report_row[name] for name in STAMPS if report_row.get(name)}


def write_report(layout: StoreLayout, script: str, rows: dict[str, dict[str, Any]]) -> None:
    """Merge the rows of this run into the report; subjects not processed in this run keep their old rows."""
    path = layout.report_path(script)
    with wait_for_lock(layout.report_lock(script)):  # two runs with different tables may share a store
        merged = {**read_previous_rows(layout, script), **rows}
        table = pd.DataFrame([merged[sid] for sid in sorted(merged)], dtype=object)  # object keeps integers
        first = ["sid", "status", "seconds", "message"]
        table = table[first + [name for name in table.columns if name not in first]]
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
