"""Decide whether the existing output of a stage is kept or made again; all stages follow the same rule.

If the stage's report has no row for an output, the output is assumed to be the user's own file. The stage checks a
user's output and keeps it regardless of its age; only --overwrite replaces it.

An output with a row in the report was made by the stage. The stage keeps its own output if the output is complete, the
stamps match the current inputs and settings, and no input is newer. An incomplete or outdated output of the stage
is removed and made again. If a subject's inputs become invalid, later stages do not use its old output.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.layout import StoreLayout
from preprocess.report import STAMPS, write_in_progress_file
from preprocess.scan import EarlierFailure, ScanError

FAILED_BEFORE = "failed_before"  # key in a subject's row: why an earlier stage of this run failed


class Skip(Exception):
    """Raised by a stage if its output exists and is verified; carries the values for the report."""

    def __init__(self, report_values: dict[str, Any] | None = None):
        super().__init__("already done")
        self.figures = report_values or {}


def make_file_stamp(path: str, series: str = "") -> str:
    """Return a stamp that identifies a version of a file or folder by the sizes and modification times of its files.

    The stamp also depends on ``series``, because a different series in the same folder is a different scan.
    """
    if series:
        return f"{make_file_stamp(path)}-{hashlib.sha256(series.encode()).hexdigest()[:8]}"
    if os.path.isdir(path):
        files = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
        text = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in files)
        return f"{len(files)}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:16]}"  # file names may be invalid UTF-8
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _read_earlier_of_mtime_and_ctime_ns(path: Path) -> int:
    """Return the time in ns at which a file was last changed.

    The result is the earlier of the file's modification time and change time, because a machine with a fast clock can
    set a modification time in the future.
    """
    status = path.stat()
    return min(status.st_mtime_ns, status.st_ctime_ns)


class Output:
    """The output of one stage for one subject.

    Args:
        layout: paths of the store.
        script: name of the stage's script.
        sid: the subject.
        previous: the subject's row in the last report; empty if the report has no such row.
        targets: files that make up the output.
        stamps: report columns that identify what the output is made from.
        inputs: files that must not be newer than an output made by this stage.
        pictures: additional files that this stage makes; a user's own output may lack them.

    Raises:
        ValueError: a stamp is not in STAMPS, so the report row of a failed subject would lack this stamp.
    """

    def __init__(
        self,
        layout: StoreLayout,
        script: str,
        sid: str,
        previous: dict[str, str],
        targets: Sequence[Path],
        stamps: dict[str, str],
        inputs: Sequence[Path] = (),
        pictures: Sequence[Path] = (),
    ):
        self.layout, self.script, self.sid = layout, script, sid
        self.previous, self.targets, self.stamps = previous, targets, stamps
        self.inputs, self.pictures = inputs, pictures
        if unknown := set(stamps) - set(STAMPS):
            raise ValueError(
                f"report columns {sorted(unknown)} would be lost if a subject fails; "
                "add the names to STAMPS in report.py"
            )
        self.ours = any(previous.get(name) for name in stamps)

    def _was_made_from_current_inputs(self) -> bool:
        """Return whether the stamps of an output made by this stage are current and no input is newer."""
        if any(self.previous.get(name) != value for name, value in self.stamps.items()):
            return False
        oldest = min(target.stat().st_mtime_ns for target in self.targets)
        return all(path.is_file() and _read_earlier_of_mtime_and_ctime_ns(path) <= oldest for path in self.inputs)

    def skip_if_valid(self, verify: Callable[[], dict[str, Any]], overwrite: bool = False) -> None:
        """Return normally if the output must be made, and raise Skip if the existing output can be kept.

        Args:
            verify: function that raises ScanError if the output is incomplete, and returns values for the report.
            overwrite: make the output again in any case.

        Raises:
            Skip: the output is kept.
            ScanError: the existing output is incomplete and is the user's own file.
            EarlierFailure: the subject failed in an earlier stage; output made by this stage is removed.
        """
        if reason := self.previous.get(FAILED_BEFORE):
            self.claim_and_remove_old_files()
            raise EarlierFailure(reason)
        if overwrite or not all(target.is_file() for target in self.targets):
            return
        if self.ours and not (self._was_made_from_current_inputs() and all(path.is_file() for path in self.pictures)):
            return
        try:
            figures = verify()
        except ScanError:
            if not self.ours:
                raise
        else:
            raise Skip({**figures, **(self.stamps if self.ours else {})})

    def claim_and_remove_old_files(self) -> None:
        """Record that this stage makes the output, and remove the files that this stage made before."""
        write_in_progress_file(self.layout, self.script, self.sid)
        if self.ours:
            for path in (*self.targets, *self.pictures):
                path.unlink(missing_ok=True)

    def get_previous_report_columns(self, *names: str) -> dict[str, str]:
        """Return the columns ``names`` of the last report, for an output that is kept."""
        return {name: self.previous[name] for name in names if name in self.previous}
