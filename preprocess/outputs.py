"""Decide whether the existing output of a stage is kept or made again; all stages follow the same rule.

An output without a row in the stage's report is the user's own. It is checked and kept regardless of its age; only
--overwrite replaces it.

An output with a row in the report was made by the stage. It is kept if its stamps match the current inputs and
settings, no input is newer, and it is complete. Otherwise it is removed and made again, so that a subject with inputs
that have become bad does not continue with old output.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.layout import StoreLayout
from preprocess.report import STAMPS, claim
from preprocess.scan import EarlierFailure, ScanError

FAILED_BEFORE = "failed_before"  # key added to a subject's last row: why an earlier stage of this run failed


class Skip(Exception):
    """Raised by a stage if its output exists and is verified; carries the values for the report."""

    def __init__(self, figures: dict[str, Any] | None = None):
        super().__init__("already done")
        self.figures = figures or {}


def file_stamp(path: str, series: str = "") -> str:
    """Return a stamp that identifies a version of a file or folder by size and modification time of its files.

    The stamp also depends on ``series``, because another series in the same folder is another scan.
    """
    if series:
        return f"{file_stamp(path)}-{hashlib.sha256(series.encode()).hexdigest()[:8]}"
    if os.path.isdir(path):
        files = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
        text = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in files)
        return f"{len(files)}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:16]}"  # names may not be valid UTF-8
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _read_change_time(path: Path) -> int:
    """Return when a file was last changed, in ns.

    The change time limits the modification time, which lies in the future if a machine with a fast clock wrote it.
    """
    status = path.stat()
    return min(status.st_mtime_ns, status.st_ctime_ns)


class Output:
    """The output of one stage for one subject.

    Args:
        layout: paths of the store.
        script: name of the stage's script.
        sid: the subject.
        previous: the subject's row in the last report; empty if there is none.
        targets: files that make up the output.
        stamps: report columns that identify what the output is made from.
        inputs: files that must not be newer than an output made by this stage.
        pictures: additional files that this stage makes; a user's own output may lack them.

    Raises:
        ValueError: a stamp is not in STAMPS, so the report would not keep it.
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
            raise ValueError(f"stamps {sorted(unknown)} would be lost after a failure; add them to STAMPS in report.py")
        self.ours = any(previous.get(name) for name in stamps)

    def _matches_inputs(self) -> bool:
        """Whether an output made by this stage matches its inputs by stamps and age."""
        if any(self.previous.get(name) != value for name, value in self.stamps.items()):
            return False
        oldest = min(target.stat().st_mtime_ns for target in self.targets)
        return all(path.is_file() and _read_change_time(path) <= oldest for path in self.inputs)

    def keep(self, verify: Callable[[], dict[str, Any]], overwrite: bool = False) -> None:
        """Return if the output must be made, and raise Skip if it exists and can be kept.

        Args:
            verify: raises ScanError unless the output is complete; returns values for the report.
            overwrite: make the output again in any case.

        Raises:
            Skip: the output is kept.
            ScanError: the user's own output is incomplete.
            EarlierFailure: an earlier stage failed the subject; output made by this stage is removed.
        """
        if reason := self.previous.get(FAILED_BEFORE):
            self.begin()
            raise EarlierFailure(reason)
        if overwrite or not all(target.is_file() for target in self.targets):
            return
        if self.ours and not (self._matches_inputs() and all(path.is_file() for path in self.pictures)):
            return
        try:
            figures = verify()
        except ScanError:
            if not self.ours:
                raise
        else:
            raise Skip({**figures, **(self.stamps if self.ours else {})})

    def begin(self) -> None:
        """Claim the output and remove the files that this stage made before."""
        claim(self.layout, self.script, self.sid)
        if self.ours:
            for path in (*self.targets, *self.pictures):
                path.unlink(missing_ok=True)

    def earlier(self, *names: str) -> dict[str, str]:
        """Return values from the last report, for an output that is kept."""
        return {name: self.previous[name] for name in names if name in self.previous}
