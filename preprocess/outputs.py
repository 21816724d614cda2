"""One rule for every step: is this output ours, of these inputs, and whole?

An output without a row in the step's report is the user's own: it is checked and kept, whatever its age, and
only --overwrite replaces it. One with a row is ours: it is kept while its stamps are those of today's inputs
and settings, no input is newer, and it is whole; else it is removed and made again, so that a subject whose
inputs have become bad does not go on with what it was.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.layout import StoreLayout
from preprocess.report import STAMPS, claim
from preprocess.scan import EarlierFailure, ScanError

FAILED_BEFORE = "failed_before"  # in a subject's row of the last report: why an earlier stage of this run failed it


class Skip(Exception):
    """Raised by a step whose output is there and verified; carries its figures for the report."""

    def __init__(self, figures: dict[str, Any] | None = None):
        super().__init__("done already")
        self.figures = figures or {}


def file_stamp(path: str, series: str = "") -> str:
    """Tells one version of a file from another by size and modification time; of a folder, by its files'.

    Another choice of ``series`` in the same folder is another scan.
    """
    if series:
        return f"{file_stamp(path)}-{hashlib.sha256(series.encode()).hexdigest()[:8]}"
    if os.path.isdir(path):
        files = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
        text = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in files)
        return f"{len(files)}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:16]}"  # a name may be no UTF-8
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _changed_at(path: Path) -> int:
    """When a file was last changed, in ns: copied from a machine with a fast clock it may say a time to come."""
    status = path.stat()
    return min(status.st_mtime_ns, status.st_ctime_ns)


class Output:
    """What a step makes for one subject.

    Args:
        layout: the store's.
        script: the step's name.
        sid: the subject.
        previous: the subject's row in the last report; empty where there is none.
        targets: files that make up the output.
        stamps: what it is made from, as the report will tell.
        inputs: files that must not be newer than an output of ours.
        pictures: further files of ours, which a user's own output need not have.

    Raises:
        ValueError: a stamp that the report does not keep.
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
            raise ValueError(f"stamps {sorted(unknown)} would not outlive a failure: add them to STAMPS in report.py")
        self.ours = any(previous.get(name) for name in stamps)

    def _of_these_inputs(self) -> bool:
        """Of an output of ours: whether its stamps and its age go with the inputs."""
        if any(self.previous.get(name) != value for name, value in self.stamps.items()):
            return False
        oldest = min(target.stat().st_mtime_ns for target in self.targets)
        return all(path.is_file() and _changed_at(path) <= oldest for path in self.inputs)

    def keep(self, verify: Callable[[], dict[str, Any]], overwrite: bool = False) -> None:
        """Raise Skip where the output is there and may stay; ScanError where a user's own is not whole.

        Raise EarlierFailure if an earlier stage failed the subject, whatever lies here; what is ours is removed.

        Args:
            verify: raises ScanError unless the output is whole; returns figures for the report.
            overwrite: whether it is to be made again in any case.
        """
        if reason := self.previous.get(FAILED_BEFORE):
            self.begin()
            raise EarlierFailure(reason)
        if overwrite or not all(target.is_file() for target in self.targets):
            return
        if self.ours and not (self._of_these_inputs() and all(path.is_file() for path in self.pictures)):
            return
        try:
            figures = verify()
        except ScanError:
            if not self.ours:
                raise
        else:
            raise Skip({**figures, **(self.stamps if self.ours else {})})

    def begin(self) -> None:
        """Claim the output, and remove what is there of ours."""
        claim(self.layout, self.script, self.sid)
        if self.ours:
            for path in (*self.targets, *self.pictures):
                path.unlink(missing_ok=True)

    def earlier(self, *names: str) -> dict[str, str]:
        """Figures of the last report, for an output that stays."""
        return {name: self.previous[name] for name in names if name in self.previous}
