"""Write files atomically (temporary file, flush, rename), and lock files between processes."""

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

LEFTOVER_SECONDS = 3600  # a partial file older than this belongs to a killed run


@contextlib.contextmanager
def add_file_name_to_errors(path: Path) -> Iterator[None]:
    """Add this file's name to a system error without a file name, for example if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:  # torch's archive writer raises RuntimeError with the system error as context
        cause = error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write`` with a temporary file next to ``path``, flush it to disk and rename it to ``path``.

    After a crash there is either the old or the new file, never a partial one. An error leaves no temporary file.

    Raises:
        OSError: the file cannot be written. If the error has no file name, ``path`` is added.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with add_file_name_to_errors(path):
            with open(aside, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_via_temporary_path(path: str | os.PathLike) -> Iterator[Path]:
    """Provide a temporary path with the file name of ``path``, for writers that open files themselves.

    The temporary path is in a new folder next to ``path``. When the ``with`` block ends, the file is moved to ``path``;
    after an error, the file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with add_file_name_to_errors(path), tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        yield aside
        with open(aside, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, path)


def check_writable(folder: Path, flag: str) -> None:
    """Raise UserError if a folder cannot be created or written to. Nothing is created yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{flag}: cannot write to {there} ({error.strerror}); choose another folder") from None


def make_safe_name(text: str) -> str:
    """Turn a user's name into a safe file name: unsafe characters become _, and a hash keeps changed names distinct."""
    safe = re.sub(r"[^\w.+=@,-]", "_", text).lstrip(".")[:100]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Save an array as a .npy file, atomically."""
    write_atomically(path, lambda stream: np.save(stream, array, allow_pickle=False))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file, atomically."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write an indented JSON file, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def make_array_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header bytes of a .npy file, for a file that is written in pieces."""
    stream = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def read_array_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, Fortran order and dtype of a .npy file; the stream is left at the start of the data.

    Error messages complete a sentence that begins with "the file is".

    Raises:
        ValueError: the file is not a .npy file, holds Python objects, or has fewer bytes than its header says. np.load
            could run code stored in Python objects, or allocate memory for data that a truncated file lacks.
    """
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as a Python literal and may raise any error
        raise ValueError("not a complete .npy file") from error
    if dtype.hasobject:
        raise ValueError("the file holds Python objects, not numbers")
    start = stream.tell()
    there, wanted = stream.seek(0, os.SEEK_END) - start, math.prod(shape) * dtype.itemsize
    stream.seek(start)
    if min(shape, default=0) < 0 or there < wanted:
        raise ValueError(f"truncated: the file has {start + there} of {start + wanted} bytes")
    return shape, fortran, dtype


def load_array(path: str | os.PathLike, mapped: bool = False) -> np.ndarray:
    """Load a .npy file of numbers or text; ``mapped`` memory-maps the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as in :func:`read_array_header`.
    """
    with open(path, "rb") as stream:
        read_array_header(stream)
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def remove_old_partial_files(*folders: Path) -> None:
    """Remove old partial files and folders that killed runs left behind."""
    for folder in folders:
        for path in (*folder.glob(".partial-*"), *folder.glob(".*.partial")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def prepare_resumable_folder(folder: Path, key: str) -> None:
    """Make or empty a folder for partial results, but keep the results of an interrupted run with the same ``key``."""
    note = folder / "key.txt"
    if note.is_file() and note.read_text(encoding="utf-8") == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(note, key)


def is_utf8(path: str | os.PathLike) -> bool:
    """Return whether a path is valid UTF-8. On Linux, files from old archives may have names in another encoding."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def try_lock(stream: TextIO) -> bool:
    """Lock an open file until it is closed or this process ends. Return False if another process holds the lock.

    On a file system without locks, return True without locking. Child processes do not inherit the lock.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike this lock, a flock would be inherited by workers
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        note_missing_locks(stream.name, error)
    return True


_noted: set[str] = set()  # reasons for missing lock support that have already been printed


def note_missing_locks(path: str, error: OSError) -> None:
    """Print a note once if a file system does not support locks, for example NFS mounted with nolock."""
    reason = error.strerror or str(error)
    if reason not in _noted:
        _noted.add(reason)
        where = os.path.dirname(path)
        text = f"note: {where} does not support file locks ({reason}); do not let two programs use it at the same time"
        print(text, file=sys.stderr, flush=True)


def hash_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def describe_process_host_and_time() -> str:
    """Describe this process for messages of other processes: process id, host and time."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextlib.contextmanager
def hold_lock_or_raise(path: Path, resource_name: str) -> Iterator[None]:
    """Hold a lock file during a block and remove it at the end.

    Args:
        path: the lock file; it is created if missing.
        resource_name: name of the locked resource, with which the error message begins.

    Raises:
        UserError: another process holds the lock; the message names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+", encoding="utf-8") as stream:
            if not try_lock(stream):
                stream.seek(0)
                raise UserError(
                    f"{resource_name} is in use by {stream.read().strip() or 'another process'}; wait until it ends"
                )
            try:
                if not os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                    continue  # another process has removed the file in the meantime
            except FileNotFoundError:
                continue
            stream.truncate(0)
            stream.write(describe_process_host_and_time())
            stream.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Wait for a lock on a file, and hold the lock during a ``with`` block. The file is created if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX)
        except OSError as error:
            note_missing_locks(str(path), error)
        yield
