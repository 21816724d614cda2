"""Test that files are written completely or not at all, and that a lock belongs to one process."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from misc.command import UserError
from misc.files import (
    LEFTOVER_SECONDS,
    check_writable,
    hash_file,
    hold_lock_or_raise,
    make_array_header,
    remove_old_partial_files,
    save_array,
    try_lock,
    wait_for_lock,
    write_atomically,
    write_json,
    write_text,
    write_via_temporary_path,
)

from ..conftest import ROOT


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    target = tmp_path / "new folder" / "a.txt"

    def look(stream):
        stream.write(b"half")
        assert not target.exists()
        stream.write(b" and whole")

    write_atomically(target, look)
    assert target.read_bytes() == b"half and whole" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_keeps_only_the_old_file(tmp_path, error):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail(stream):
        stream.write(b"new")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, fail)
    with pytest.raises(type(error)), write_via_temporary_path(target) as aside:
        aside.write_bytes(b"new")
        raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_other_writers_get_a_path_with_the_same_suffix(tmp_path):
    target = tmp_path / "deep" / "x.nii.gz"
    with write_via_temporary_path(target) as aside:
        assert aside.name == target.name and aside != target
        aside.write_bytes(b"content")
        assert not target.exists()
    assert target.read_bytes() == b"content" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("way", ["stream", "path"])
def test_a_full_disk_error_names_the_file(tmp_path, way):
    """A file-size limit simulates a full disk."""
    code = (
        "import resource, signal, sys\nfrom misc.files import write_via_temporary_path, write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "def big(stream):\n    stream.write(bytes(10000))\n    stream.flush()\n"
        "try:\n"
        "    if sys.argv[2] == 'stream':\n        write_atomically(sys.argv[1], big)\n"
        "    else:\n"
        "        with write_via_temporary_path(sys.argv[1]) as aside, open(aside, 'wb') as stream:\n"
        "            big(stream)\n"
        "except OSError as error:\n    print(error)\n"
    )
    target = tmp_path / "f.bin"
    command = [sys.executable, "-c", code, str(target), way]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert str(target) in result.stdout and "File too large" in result.stdout, result
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096 and signal.getsignal(signal.SIGXFSZ) is not None


def test_arrays_texts_and_json(tmp_path):
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    save_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), array)
    write_json(tmp_path / "j.json", {"a": 1})
    assert (tmp_path / "j.json").read_text() == '{\n  "a": 1\n}\n'
    (tmp_path / "b.npy").write_bytes(make_array_header((2, 3), np.dtype(np.int16)) + array.tobytes())
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()


def test_old_leftovers_are_removed(tmp_path):
    for name in (".a.7.partial", ".b.8.partial", "a"):
        (tmp_path / name).touch()
    (tmp_path / ".partial-x").mkdir()
    for name in (".a.7.partial", ".partial-x", "a"):
        os.utime(tmp_path / name, (0, time.time() - LEFTOVER_SECONDS - 5))
    remove_old_partial_files(tmp_path, tmp_path / "not there")
    assert {path.name for path in tmp_path.iterdir()} == {".b.8.partial", "a"}


HOLD = (
    "import sys\nfrom misc.files import try_lock\n"
    "with open(sys.argv[1], 'a') as stream:\n    print(try_lock(stream), flush=True)\n    sys.stdin.read()\n"
)


def test_a_lock_belongs_to_one_process_and_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with open(path, "a") as stream:
        assert not try_lock(stream)
        holder.kill()
        holder.communicate()
        assert try_lock(stream)
    with wait_for_lock(tmp_path / "sub" / "other"):
        assert (tmp_path / "sub" / "other").exists()


def test_a_held_lock_names_its_holder(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom misc.files import hold_lock_or_raise\n"
        "with hold_lock_or_raise(Path(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    path = tmp_path / "new" / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    message = f"the folder is in use by process {holder.pid} on .*; wait until it ends"
    with pytest.raises(UserError, match=message), hold_lock_or_raise(path, "the folder"):
        pass
    holder.kill()
    holder.communicate()
    with hold_lock_or_raise(path, "the folder"):
        assert str(os.getpid()) in path.read_text()
    assert not path.exists()


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_unwritable_folders_are_refused_before_any_work(tmp_path):
    check_writable(tmp_path / "new" / "deep", "--out-dir")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(UserError, match="--out-dir: cannot write to "):
            check_writable(path, "--out-dir")
