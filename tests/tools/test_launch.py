"""The launcher of ranks: one line for what the user can mend, torchrun's report for the rest."""

import os
import sys

import pytest

from tools import launch

from ..conftest import ROOT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--root-dir {}/store is no patch store: it has no atlas_patch_loc.npy"),
        (("--moco-k", 100), "--moco-k 100 is not a multiple of --batch-size 128"),
        (("--lr", "fast"), "argument --lr: invalid float value: 'fast'"),
    ],
)
def test_an_error_of_the_user_is_one_line_of_the_first_rank(tmp_path, run, flags, message):
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
    monkeypatch.setattr(launch, "usable_cores", lambda: 12)
    for ranks, given, wanted in (("1", None, None), ("4", None, "3"), ("24", None, "1"), ("4", "5", "5")):
        monkeypatch.setattr(sys, "argv", ["launch.py", "--nproc-per-node", ranks, "train.py"])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        launch.share_cores()
        assert os.environ.get("OMP_NUM_THREADS") == wanted
