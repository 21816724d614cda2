"""Test the launcher of ranks: errors that users can fix take one line; all others show torchrun's report."""

import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tools import launch

from ..conftest import ROOT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--root-dir {}/store is not a patch store: it has no atlas_patch_loc.npy"),
        (("--lr", "fast"), "argument --lr: invalid float value: 'fast'"),
    ],
)
def test_a_user_error_is_printed_once_in_one_line(tmp_path, run, flags, message):
    (tmp_path / "store").mkdir()
    more = ("--root-dir", "store", "--exp-name", "new", "--device", "cpu", *flags)
    command = ("--standalone", "--nproc-per-node", 2, ROOT / "train.py", *more)
    result = run("tools/launch.py", *command, cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message.format(tmp_path)}")
    assert len(result.stderr.splitlines()) == 1


def test_any_other_failure_is_reported_by_torchrun(tmp_path, run):
    (tmp_path / "fails.py").write_text("raise RuntimeError('not foreseen')\n")
    result = run("tools/launch.py", "--standalone", "--nproc-per-node", 1, "fails.py", cwd=tmp_path, check=False)
    assert result.returncode == 1
    for words in ("not foreseen", "fails.py FAILED", "exitcode  : 1"):
        assert words in result.stderr


def test_cores_are_divided_among_the_ranks(monkeypatch):
    monkeypatch.setattr(launch, "count_usable_cores", lambda: 12)
    for ranks, given, wanted in (("1", None, None), ("4", None, "3"), ("24", None, "1"), ("4", "5", "5")):
        monkeypatch.setattr(sys, "argv", ["launch.py", "--nproc-per-node", ranks, "train.py"])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        launch.limit_threads_per_rank()
        assert os.environ.get("OMP_NUM_THREADS") == wanted


def make_failures(*codes):
    return {rank: SimpleNamespace(exitcode=code, timestamp=when) for when, (rank, code) in enumerate(codes)}


@pytest.mark.parametrize(
    ("codes", "status", "line"),
    [
        (((1, -9), (0, 75)), 137, "rank 1 was ended by SIGKILL, usually because memory ran out"),
        (((0, 75), (1, -7)), 135, "rank 1 was ended by SIGBUS, usually because /dev/shm is full"),
        (((0, 143), (1, 143)), 143, ""),
        (((1, 138), (0, -15)), 138, ""),
        (((0, 2), (1, -15)), 2, ""),
        (((0, -15), (1, -15)), 143, ""),
        (((0, 75), (1, 75)), 75, "a rank on another machine was lost"),
        (((0, 75), (1, 1)), None, ""),
    ],
)
def test_one_line_explains_how_the_ranks_ended(codes, status, line, capsys):
    assert launch.report_rank_failures(make_failures(*codes)) == status
    told = capsys.readouterr().err
    assert line in told and len(told.splitlines()) == bool(line)


def flags_of_two_nodes(port, job, node):
    more = ["--nnodes", "2", "--node-rank", node, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    return [*more, "--rdzv-id", job, "--nproc-per-node", "1", "train.py"]


def test_a_taken_endpoint_is_reported_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    flags, store = launch.open_rendezvous(flags_of_two_nodes(29941, "a", "0"))
    assert flags[0] == "--rdzv-conf=is_host=false" and store is not None
    assert launch.open_rendezvous(flags_of_two_nodes(29941, "a", "1"))[1] is not None
    for job, node, words in (
        ("b", "0", "is in use by another job"),
        ("b", "1", "belongs to another job (id a, not b)"),
    ):
        with pytest.raises(SystemExit) as left:
            launch.open_rendezvous(flags_of_two_nodes(29941, job, node))
        told = capsys.readouterr().err
        assert left.value.code == 2 and words in told and len(told.splitlines()) == 1


def test_flags_override_the_defaults(monkeypatch):
    # Pretend that no signal is ignored, even if the tests run under nohup.
    monkeypatch.setattr(launch, "should_handle_signal", lambda number: True)
    flags = launch.add_default_torchrun_flags(
        ["--standalone", "--nproc-per-node", "2", "train.py", "--local-addr", "x"]
    )
    assert "--local-addr=127.0.0.1" in flags and any("SIGUSR1" in flag and "SIGHUP" in flag for flag in flags)
    assert launch.add_default_torchrun_flags(["--standalone", "--local_addr", "h", "train.py"])[-3:-1] == [
        "--local_addr",
        "h",
    ]
    assert not any(
        "127" in flag for flag in launch.add_default_torchrun_flags(["--standalone", "--local_addr", "h", "train.py"])
    )
    monkeypatch.setattr(launch, "should_handle_signal", lambda number: number != signal.SIGHUP)
    assert not any("SIGHUP" in flag for flag in launch.add_default_torchrun_flags(["train.py"]))


@pytest.mark.slow
def test_an_unresolvable_host_name_does_not_matter(tmp_path):
    """A container's host name often does not resolve, so --standalone uses the loopback address."""
    own_name = ["unshare", "-u", "sh", "-c"]
    if subprocess.run([*own_name, "hostname no-such-name"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not give a process a host name of its own")
    (tmp_path / "meet.py").write_text(
        "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "print(f'rank {dist.get_rank()}\\n', end='', flush=True)\n"
    )
    launch = [sys.executable, ROOT / "tools" / "launch.py", "--standalone", "--nproc-per-node", 2, tmp_path / "meet.py"]
    words = " ".join(shlex.quote(str(part)) for part in launch)
    done = subprocess.run(
        [*own_name, f"hostname no-such-name && exec {words}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0", "rank 1"]
