"""Files that are whole or not there: written aside, flushed, renamed. And locks between processes."""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from misc.command import UserError

LEFTOVER_SECONDS = 3600  # age of a half-written file that no run can be writing any more


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the system that names no file (a full disk, while writing) names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:  # torch's writer of archives: the system's error is what it came upon
        cause = error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write`` with a file beside ``path``, flush it to the disk, rename it.

    A crash leaves the old file or the new one, never half of it; a failure leaves nothing behind.

    Raises:
        OSError: names ``path`` where the system names no file, as when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _named(path):
            with open(aside, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A path of the same name in a folder beside ``path``, for writers that open files themselves.

    What is written there gets its name when the block ends; after an error nothing is left of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path), tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        yield aside
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, path)


def check_writable(folder: Path, flag: str) -> None:
    """Raise UserError, before any work, where a folder cannot be written to, or made; it is not made yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{flag}: nothing can be written to {there}: {error.strerror}") from None


def safe_name(text: str) -> str:
    """A name that a user gave, as a file's: signs that could leave a folder become _, and a number tells it apart."""
    safe = re.sub(r"[^\w.+=@,-]", "_", text).lstrip(".")[:100]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """np.save of a whole file."""
    write_whole(path, lambda stream: np.save(stream, array, allow_pickle=False))


def write_text(path: str | os.PathLike, text: str) -> None:
    """A whole text file in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode()))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """A whole JSON file, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def array_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The first bytes of a .npy file, for one that is written piece by piece."""
    stream = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def read_array_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of a .npy file, whose data the stream is at afterwards.

    Errors go on after "the file is".

    Raises:
        ValueError: it is none; it holds Python objects, which are code; or it has fewer bytes than it says, and reading
            it would take memory for all that it says.
    """
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except OSError:
        raise
    except Exception as error:  # NumPy evaluates the header as Python text, and raises whatever comes of it
        raise ValueError("not a whole .npy file") from error
    if dtype.hasobject:
        raise ValueError("an array of Python objects, not of numbers")
    start = stream.tell()
    there, wanted = stream.seek(0, os.SEEK_END) - start, math.prod(shape) * dtype.itemsize
    stream.seek(start)
    if min(shape, default=0) < 0 or there < wanted:
        raise ValueError(f"truncated: {start + there} bytes of {start + wanted}")
    return shape, fortran, dtype


def load_array(path: str | os.PathLike, mapped: bool = False) -> np.ndarray:
    """A .npy file of numbers or text; mapped, its values stay on the disk. Raises OSError; ValueError as above."""
    with open(path, "rb") as stream:
        read_array_header(stream)
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def remove_leftovers(*folders: Path) -> None:
    """Half-written files and folders of runs that were killed, once they are old."""
    for folder in folders:
        for path in (*folder.glob(".partial-*"), *folder.glob(".*.partial")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def resume_folder(folder: Path, key: str) -> None:
    """Make a folder for pieces of work; keep the pieces in it if a stopped run with the same ``key`` left them."""
    note = folder / "key.txt"
    if note.is_file() and note.read_text(encoding="utf-8") == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(note, key)


def is_utf8(path: str | os.PathLike) -> bool:
    """Whether a path's name is UTF-8; on Linux it may be any bytes, as old archives leave them."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def try_lock(stream: TextIO) -> bool:
    """Lock an open file until it is closed or this process ends; False where another process has it.

    True, without a lock, on a file system that has none. Child processes do not inherit the lock.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which data-loader workers would inherit
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _note_without_locks(stream.name, error)
    return True


_noted: set[str] = set()  # reasons that have been printed


def _note_without_locks(path: str, error: OSError) -> None:
    """Say once that a file system has no locks, as NFS mounted with nolock: work goes on without them."""
    reason = error.strerror or str(error)
    if reason not in _noted:
        _noted.add(reason)
        where = os.path.dirname(path)
        text = f"note: {where} has no file locks ({reason}): start no second program on it meanwhile"
        print(text, file=sys.stderr, flush=True)


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def this_process() -> str:
    """Who is at work, for others to read: the host, the process, since when."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file for a block, and remove it at its end.

    Args:
        path: of the lock, made where it is missing.
        what: is held, to begin a message.

    Raises:
        UserError: another process holds it; says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+", encoding="utf-8") as stream:
            if not try_lock(stream):
                stream.seek(0)
                raise UserError(f"{what} is in use by {stream.read().strip() or 'another process'}; let it end first")
            try:
                if not os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                    continue  # whoever had it has removed it meanwhile
            except FileNotFoundError:
                continue
            stream.truncate(0)
            stream.write(this_process())
            stream.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for a lock file, made where it is missing, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError as error:
            _note_without_locks(str(path), error)
        yield
