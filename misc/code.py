"""Which code runs: the commit, and what tells its sources from others."""

import hashlib
import subprocess
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent
METHOD = ("*.py", "misc/*.py", "data/*.py", "models/**/*.py")  # what training and extraction run


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
