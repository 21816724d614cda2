"""File names and rules of an experiment folder, ssl_exp/NAME. The file names of a store are in data/layout.py."""

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
from misc.files import describe_process_host_and_time, remove_old_partial_files, try_lock, write_json

CODE = Path(__file__).resolve().parent.parent
METHOD = ("*.py", "misc/**/*.py", "data/*.py", "models/**/*.py")  # source files that training and extraction use
HOME = Path("ssl_exp")  # parent folder of all experiments, relative to the current folder
UNFINISHED = "checkpoint_patch_unfinished.pth.tar"  # checkpoint within an epoch
CHECKPOINT_PATTERN = re.compile(r"checkpoint_patch_(\d{4,})\.pth\.tar")


class ExperimentError(UserError):
    """Raised if an experiment folder is in use, has checkpoints, or lacks a file; the message says what to do."""


def checkpoint_name(epoch: int) -> str:
    """Return the name of the checkpoint after ``epoch`` finished epochs."""
    return f"checkpoint_patch_{epoch:04d}.pth.tar"


def describe_checkpoints(folder: Path) -> str:
    """List the checkpoints in a folder for a message; return an empty string if there are none."""
    there = sorted(path.name for path in folder.glob("*.pth.tar")) if folder.is_dir() else []
    return f"{folder} has {', '.join(there)}" if there else ""


class Experiment:
    """Paths inside an experiment folder, and the rules for reading, keeping and replacing its files."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    @classmethod
    def from_name(cls, name: str) -> "Experiment":
        """Return the experiment ssl_exp/NAME. Raises ExperimentError for a path outside ssl_exp/."""
        if not Path(name).name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ExperimentError(f"--exp-name {name!r} must be a folder name inside {HOME}/")
        return cls(HOME / name)

    def checkpoint(self, epoch: int) -> Path:
        return self.folder / checkpoint_name(epoch)

    @property
    def checkpoint_of_unfinished_epoch(self) -> Path:
        return self.folder / UNFINISHED

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def configs_json(self) -> Path:
        return self.folder / "configs.json"

    def features(self, epoch: int, step: int = 0) -> Path:
        """Return the folder of a checkpoint's features. A checkpoint saved within an epoch has a separate folder."""
        return self.folder / "patch_rep" / f"{epoch:04d}{f'_step{step}' if step else ''}"

    def is_in_experiment_folder(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()

    # ------------------------------------------------------------ resuming

    def list_epoch_checkpoints(self) -> dict[int, Path]:
        """Map numbers of finished epochs to the paths of their checkpoints."""
        found = self.folder.glob("checkpoint_patch_*.pth.tar")
        return {int(match[1]): path for path in found if (match := CHECKPOINT_PATTERN.fullmatch(path.name))}

    def find_latest_checkpoint(
        self, progress: Callable[[Path], tuple[int, int]], say: Callable[[str], None] = lambda _: None
    ) -> Path | None:
        """Return the checkpoint with the most steps: that of the unfinished epoch or of the last finished epoch.

        An unreadable checkpoint is reported, and the previous checkpoint is used.

        Args:
            progress: function that returns a checkpoint's number of finished epochs, and its number of finished steps
                in the next epoch. The function raises UserError if the checkpoint is damaged.
            say: function that prints a line.

        Raises:
            ExperimentError: checkpoints exist, but none can be read.
        """
        found: list[tuple[tuple[int, int], Path]] = []
        damaged: list[str] = []
        numbered = self.list_epoch_checkpoints()
        candidates = [self.checkpoint_of_unfinished_epoch] if self.checkpoint_of_unfinished_epoch.is_file() else []
        for path in [*candidates, *(numbered[epoch] for epoch in sorted(numbered, reverse=True))]:
            try:
                found.append((progress(path), path))
            except UserError as error:
                damaged.append(str(error))
                continue
            if path != self.checkpoint_of_unfinished_epoch:
                break  # all earlier checkpoints were saved after fewer training steps
        if damaged and not found:
            raise ExperimentError(f"{damaged[0]}; {self.folder} has no other checkpoint that can be read")
        # If two checkpoints have equal progress, max returns the first, which is the unfinished epoch's checkpoint.
        best = max(found, key=lambda item: item[0])[1] if found else None
        for text in damaged:
            say(f"note: {text}; resuming from {best} instead")
        return best

    def remove_old_checkpoints(self, count: int) -> None:
        """Keep the latest ``count`` checkpoints of finished epochs and checkpoint 0; ``count`` 0 keeps all."""
        numbered = self.list_epoch_checkpoints()
        for epoch in sorted(set(numbered) - {0})[: -count or 0]:
            numbered[epoch].unlink(missing_ok=True)

    def find_resume_checkpoint(
        self,
        resume: str,
        read_progress: Callable[[Path], tuple[int, int]],
        print_note: Callable[[str], None] = lambda _: None,
    ) -> Path | None:
        """Find the checkpoint that --resume selects; None means a new run.

        Args:
            resume: '', auto, the name of a checkpoint in the folder, or a path.
            read_progress, print_note: as in :meth:`find_latest_checkpoint`.

        Raises:
            ExperimentError: the checkpoint does not exist, or the run would overwrite other checkpoints.
        """
        if resume == "auto":
            return self.find_latest_checkpoint(read_progress, print_note)
        occupied = any(self.folder.glob("checkpoint_patch_*.pth.tar"))
        if not resume:
            if occupied:
                raise ExperimentError(
                    f"{self.folder} already has checkpoints; use --resume auto to continue, or another --exp-name"
                )
            return None
        inside = self.folder / resume
        found = inside if inside.is_file() else Path(resume)
        if not found.is_file():
            there = describe_checkpoints(self.folder).removeprefix(str(self.folder))
            raise ExperimentError(
                f"--resume {resume}: no checkpoint with this name in {self.folder}"
                + (f", which{there}" if there else "")
                + ", and no file at this path"
            )
        if occupied and not self.is_in_experiment_folder(found):
            raise ExperimentError(
                f"{self.folder} already has checkpoints, which resuming from {found} would overwrite; "
                "choose another --exp-name"
            )
        return found

    def rename_later_checkpoints(self, resumed: Path, epoch: int) -> list[str]:
        """Rename the checkpoints in this folder that are later than ``resumed``, and return their old names.

        The resumed run will train the epochs of the renamed checkpoints again. --resume auto ignores the renamed
        checkpoints.
        """
        if not self.is_in_experiment_folder(resumed):
            return []
        later = [path for number, path in self.list_epoch_checkpoints().items() if number > epoch]
        if (
            self.checkpoint_of_unfinished_epoch.is_file()
            and self.checkpoint_of_unfinished_epoch.resolve() != resumed.resolve()
        ):
            later.append(self.checkpoint_of_unfinished_epoch)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for path in later:
            path.rename(self.folder / f"superseded-{stamp}-{path.name}")
        return sorted(path.name for path in later)

    def claim_folder(self) -> TextIO:
        """Open and lock log.jsonl, which reserves the folder for this run until the file is closed.

        Raises:
            ExperimentError: another run holds the lock and therefore uses the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        log = open(self.log, "a+", buffering=1)  # noqa: SIM115 (stays open for the whole run)
        if not try_lock(log):
            log.close()
            raise ExperimentError(
                f"{self.folder} is in use by another run{self.describe_owner_process()}; wait until it ends, or use "
                "another --exp-name"
            )
        remove_old_partial_files(self.folder)
        return log

    def describe_owner_process(self) -> str:
        """Describe the process that uses the folder, or return an empty string if configs.json names no process."""
        try:
            return f" ({self.read_config()['process']})"
        except (ExperimentError, KeyError, AttributeError):
            return ""

    # ------------------------------------------------------------ configuration

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Write configs.json with the settings, the commit and the package versions."""
        write_json(
            self.configs_json, {**settings, **collect_environment(), "process": describe_process_host_and_time()}
        )

    def read_config(self) -> EasyDict:
        """Read configs.json; each entry becomes an attribute of the result, as in the published scripts.

        Raises:
            ExperimentError: the file is missing or is not a JSON object.
        """
        try:
            settings = json.loads(self.configs_json.read_text(encoding="utf-8"))
            # ** raises TypeError if the JSON is not an object; EasyDict would accept null.
            return EasyDict({**settings})
        except FileNotFoundError:
            raise ExperimentError(f"{self.configs_json} does not exist") from None
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ExperimentError(f"{self.configs_json} cannot be read as an experiment's settings") from None

    # ------------------------------------------------------------ for extraction

    def find_checkpoint(self, name: str) -> Path:
        """Find a checkpoint by its name in the folder or by its path.

        If the checkpoint does not exist, return its path in the experiment folder. Reading the missing checkpoint later
        raises an error that lists the existing checkpoints.

        Raises:
            ExperimentError: the name does not start with ssl_exp/; only train.py adds this prefix.
        """
        inside = self.folder / name
        for path in (inside, Path(name)):
            if path.is_file():
                return path
        trained = HOME / self.folder
        if not self.folder.exists() and trained.is_dir():
            raise ExperimentError(f"--exp-name {self.folder} is not a folder; use --exp-name {trained}")
        return inside

    def root_dir(self) -> str:
        """Return the patch store used for training. Raises ExperimentError if configs.json does not record it."""
        try:
            root = self.read_config().get("root_dir")
        except ExperimentError as error:
            raise ExperimentError(f"{error}, so the patch store is unknown; give --root-dir") from None
        if not isinstance(root, str):
            raise ExperimentError(f"{self.configs_json} has no entry root_dir; give --root-dir")
        return root


def collect_environment() -> dict[str, Any]:
    """Collect what a run depends on in addition to its flags: commit, package versions and GPU."""
    import numpy as np
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    return {**describe_running_code(), "versions": versions}


# ============================================================ the running code


def read_git_commit() -> str:
    """Return the commit and whether files differ from it, or "unknown" outside a git clone."""
    try:
        git = ["git", "-C", str(CODE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        return commit + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hash_sources() -> str:
    """Return sixteen hexadecimal digits that identify the source files, even without git or a commit."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in METHOD for path in CODE.glob(pattern)}):
        digest.update(str(path.relative_to(CODE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def describe_running_code() -> dict[str, str]:
    """Return the commit and the source hash as entries of a dictionary."""
    return {"git_commit": read_git_commit(), "source_hash": hash_sources()}
