"""Names and rules inside an experiment's folder, ssl_exp/NAME, as data/layout.py has them for a store."""

import hashlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from easydict import EasyDict

from misc.command import UserError
from misc.files import remove_leftovers, this_process, try_lock, write_json

CODE = Path(__file__).resolve().parent.parent
METHOD = ("*.py", "misc/**/*.py", "data/*.py", "models/**/*.py")  # what training and extraction run
HOME = Path("ssl_exp")  # of experiments, under the current folder
UNFINISHED = "checkpoint_patch_unfinished.pth.tar"  # of an epoch under way
CHECKPOINT_PATTERN = re.compile(r"checkpoint_patch_(\d{4,})\.pth\.tar")


class ExperimentError(UserError):
    """An experiment's folder is in use, occupied, or lacks something; the message says what to do."""


def checkpoint_name(epoch: int) -> str:
    """File name after ``epoch`` finished epochs."""
    return f"checkpoint_patch_{epoch:04d}.pth.tar"


def listed(folder: Path) -> str:
    """The checkpoints in a folder, for a message; empty where there are none."""
    there = sorted(path.name for path in folder.glob("*.pth.tar")) if folder.is_dir() else []
    return f"{folder} has {', '.join(there)}" if there else ""


class Experiment:
    """Paths inside an experiment's folder, and what may happen to its files."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    @classmethod
    def named(cls, name: str) -> "Experiment":
        """ssl_exp/NAME. Raises ExperimentError for a name that leaves ssl_exp/."""
        if not Path(name).name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ExperimentError(f"--exp-name {name!r}: the name of a folder that goes into {HOME}/")
        return cls(HOME / name)

    def checkpoint(self, epoch: int) -> Path:
        return self.folder / checkpoint_name(epoch)

    @property
    def unfinished(self) -> Path:
        return self.folder / UNFINISHED

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def configs(self) -> Path:
        return self.folder / "configs.json"

    def features(self, epoch: int, step: int = 0) -> Path:
        """Folder of features; those from within an epoch must not overwrite the epoch's."""
        return self.folder / "patch_rep" / f"{epoch:04d}{f'_step{step}' if step else ''}"

    def _own(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()

    # ------------------------------------------------------------ going on

    def numbered(self) -> dict[int, Path]:
        """Checkpoints of finished epochs, by epoch."""
        found = self.folder.glob("checkpoint_patch_*.pth.tar")
        return {int(match[1]): path for path in found if (match := CHECKPOINT_PATTERN.fullmatch(path.name))}

    def latest(
        self, progress: Callable[[Path], tuple[int, int]], say: Callable[[str], None] = lambda _: None
    ) -> Path | None:
        """The checkpoint that is furthest on: an unfinished epoch's, else the highest number.

        One that cannot be read is told, and the one before it taken.

        Args:
            progress: a checkpoint's finished epochs, and steps of the next; raises UserError where it is damaged.
            say: prints a line.

        Raises:
            ExperimentError: there are some, and none can be read.
        """
        found: list[tuple[tuple[int, int], Path]] = []
        damaged: list[str] = []
        numbered = self.numbered()
        candidates = [self.unfinished] if self.unfinished.is_file() else []
        for path in [*candidates, *(numbered[epoch] for epoch in sorted(numbered, reverse=True))]:
            try:
                found.append((progress(path), path))
            except UserError as error:
                damaged.append(str(error))
                continue
            if path != self.unfinished:
                break  # those before it are not so far on
        if damaged and not found:
            raise ExperimentError(f"{damaged[0]}; and {self.folder} has no checkpoint that can be read")
        # Of equal places the unfinished one: it is the first.
        best = max(found, key=lambda item: item[0])[1] if found else None
        for text in damaged:
            say(f"note: {text}; going on from {best}")
        return best

    def keep_latest(self, count: int) -> None:
        """Remove the checkpoints of finished epochs but the latest ``count``; all are kept for 0, and epoch 0's is."""
        numbered = self.numbered()
        for epoch in sorted(set(numbered) - {0})[: -count or 0]:
            numbered[epoch].unlink(missing_ok=True)

    def resume_from(
        self,
        resume: str,
        progress: Callable[[Path], tuple[int, int]],
        say: Callable[[str], None] = lambda _: None,
    ) -> Path | None:
        """What --resume means: '', auto, a name in the folder or a path. None starts anew.

        Raises:
            ExperimentError: there is no such checkpoint, or going on would overwrite other ones.
        """
        if resume == "auto":
            return self.latest(progress, say)
        occupied = any(self.folder.glob("checkpoint_patch_*.pth.tar"))
        if not resume:
            if occupied:
                raise ExperimentError(
                    f"{self.folder} has checkpoints already; give --resume auto to go on, or another --exp-name"
                )
            return None
        inside = self.folder / resume
        found = inside if inside.is_file() else Path(resume)
        if not found.is_file():
            there = listed(self.folder).removeprefix(str(self.folder))
            raise ExperimentError(
                f"--resume {resume}: no checkpoint of that name in {self.folder}"
                + (f", which{there}" if there else "")
                + ", and no file at that path"
            )
        if occupied and not self._own(found):
            raise ExperimentError(
                f"{self.folder} has checkpoints already, which going on from {found} would overwrite; "
                "choose another --exp-name"
            )
        return found

    def set_aside_later(self, resumed: Path, epoch: int) -> list[str]:
        """Rename this folder's checkpoints that are further on than ``resumed``: they will be trained anew.

        Under another name they are kept, and --resume auto does not take them for this run's.
        """
        if not self._own(resumed):
            return []
        later = [path for number, path in self.numbered().items() if number > epoch]
        if self.unfinished.is_file() and self.unfinished.resolve() != resumed.resolve():
            later.append(self.unfinished)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for path in later:
            path.rename(self.folder / f"superseded-{stamp}-{path.name}")
        return sorted(path.name for path in later)

    def claim(self) -> TextIO:
        """log.jsonl, opened for this run alone, until it is closed or the process ends.

        Raises:
            ExperimentError: another run has it, and the folder with it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        log = open(self.log, "a+", buffering=1)  # noqa: SIM115 (open for the whole run)
        if not try_lock(log):
            log.close()
            raise ExperimentError(
                f"{self.folder} is in use by another run{self._whose()}; let it end, or choose another --exp-name"
            )
        remove_leftovers(self.folder)
        return log

    def _whose(self) -> str:
        """Who has the folder, as far as its configuration tells."""
        try:
            return f" ({self.read_config()['process']})"
        except (ExperimentError, KeyError, AttributeError):
            return ""

    # ------------------------------------------------------------ configuration

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """configs.json: the settings, the commit and the versions."""
        write_json(self.configs, {**settings, **environment(), "process": this_process()})

    def read_config(self) -> EasyDict:
        """configs.json with its entries as attributes, as the publication's scripts use theirs.

        Raises:
            ExperimentError: it is missing or no JSON object.
        """
        try:
            settings = json.loads(self.configs.read_text(encoding="utf-8"))
            return EasyDict({**settings})  # raises TypeError for anything but an object; EasyDict takes null for one
        except FileNotFoundError:
            raise ExperimentError(f"{self.configs} is not there") from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ExperimentError(f"{self.configs} cannot be read as an experiment's settings") from None

    # ------------------------------------------------------------ for extraction

    def find_checkpoint(self, name: str) -> Path:
        """A checkpoint's name in the folder, or a path; the reader says what is there where neither exists.

        Raises:
            ExperimentError: the folder is the name in training, without ssl_exp/.
        """
        inside = self.folder / name
        for path in (inside, Path(name)):
            if path.is_file():
                return path
        trained = HOME / self.folder
        if not self.folder.exists() and trained.is_dir():
            raise ExperimentError(
                f"--exp-name {self.folder} is no folder, {trained} is: here it is the folder of the experiment"
            )
        return inside

    def root_dir(self) -> str:
        """The patch store that the experiment was trained on. Raises ExperimentError: give --root-dir."""
        try:
            root = self.read_config().get("root_dir")
        except ExperimentError as error:
            raise ExperimentError(f"{error} to tell the patch store; give --root-dir") from None
        if not isinstance(root, str):
            raise ExperimentError(f"{self.configs} names no root_dir; give --root-dir")
        return root


def environment() -> dict[str, Any]:
    """What a run depends on beside its flags: the commit and the versions."""
    import numpy as np
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    return {**running_code(), "versions": versions}


# ============================================================ the running code


def git_commit() -> str:
    """The commit, and whether files differ from it; unknown where this is no clone."""
    try:
        git = ["git", "-C", str(CODE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        return commit + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source_hash() -> str:
    """Sixteen digits of the sources themselves, which uncommitted changes and copies without git have too."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in METHOD for path in CODE.glob(pattern)}):
        digest.update(str(path.relative_to(CODE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def running_code() -> dict[str, str]:
    """Both, by name."""
    return {"git_commit": git_commit(), "source_hash": source_hash()}
