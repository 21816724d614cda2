"""Test when a run saves, and how the run handles a failed save."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from misc.command import StopRequest, UserError
from misc.experiment import Experiment
from misc.run.runlog import DivergedError, Meters
from misc.run.saver import Saver

from ...conftest import ROOT


def raise_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")


def saver_of(tmp_path, save, aside=None, **more):
    state = SimpleNamespace(save=save, aside=aside)
    return Saver(
        state, Experiment(tmp_path), StopRequest(), epochs=3, epochs_between_saves=1, minutes_between_saves=1e-9, **more
    )


def meters():
    made = Meters(("loss",), torch.device("cpu"))
    made.start_epoch()
    made.add_statistics(torch.ones(1))
    return made


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, capsys):
    saver = saver_of(tmp_path, raise_full, latest_checkpoint=tmp_path / "c_0001")
    saver.save_after_step(1, 2, meters())
    saver.save_after_epoch(2)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and all("warning: cannot save" in line and "c_0001" in line for line in told)
    with pytest.raises(UserError, match=r"cannot save \(.*No space left.*continue with --resume auto"):
        saver.save_after_epoch(3)  # a failed save after the last epoch is an error, because no other save follows


def test_a_background_save_writes_the_state_at_its_start(tmp_path, capsys):
    """Training continues while a slow disk writes a checkpoint.

    A background write must finish before the next save starts, and before a stopped or completed run exits.
    """
    state, free, done = {"step": 0}, threading.Event(), []

    def aside(path, *_):
        copied = dict(state)

        def write():
            assert free.wait(10)
            path.write_text(str(copied["step"]))
            done.append(path.name)

        return write

    def at_once(path, *_):
        path.write_text(str(state["step"]))
        done.append(path.name)

    saver = saver_of(tmp_path, at_once, aside=aside, checkpoints_to_keep=2)
    (tmp_path / "checkpoint_patch_0001.pth.tar").write_text("old")
    state["step"] = 5
    saver.save_after_step(0, 5, meters())
    state["step"] = 6  # training continues during the write
    assert not done and saver.good is None
    free.set()
    saver.save_after_epoch(2)
    saver.wait_for_writing()
    assert done == ["checkpoint_patch_unfinished.pth.tar", "checkpoint_patch_0002.pth.tar"]
    assert not (tmp_path / done[0]).exists() and saver.good.read_text() == "6"
    free.clear()
    saver.save_after_epoch(3)  # the last epoch is saved immediately
    assert done[-1] == "checkpoint_patch_0003.pth.tar"
    assert sorted(path.name[17:21] for path in tmp_path.iterdir()) == ["0002", "0003"]
    assert capsys.readouterr().out == ""


def test_the_next_save_reports_a_failed_background_save(tmp_path, capsys):
    saver = saver_of(tmp_path, raise_full, aside=lambda *_: raise_full, latest_checkpoint=tmp_path / "c_0001")
    saver.save_after_step(1, 2, meters())
    saver.wait_for_writing()
    assert "warning: cannot save" in capsys.readouterr().out and saver.good.name == "c_0001"

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "x")

    saver.state.aside = lambda *_: broken
    saver.save_after_step(1, 3, meters())
    with pytest.raises(OSError, match="Input/output error"):
        saver.save_after_step(1, 4, meters())


def test_a_non_finite_state_names_the_last_good_one(tmp_path):
    def unsound(*_):
        raise DivergedError("at epoch 2, step 3, w has values that are too large or not finite")

    with pytest.raises(
        DivergedError, match=r"not finite; the last good checkpoint is .*c_0001. Continue .* a lower --lr"
    ):
        saver_of(tmp_path, unsound, latest_checkpoint=tmp_path / "c_0001").save_after_step(1, 3, meters())


def test_the_step_that_diverged_is_named(tmp_path):
    figures = meters()
    figures.add_statistics(torch.full((1,), torch.nan))
    figures.add_statistics(torch.ones(1))
    read = figures.compute_means_and_reset()
    with pytest.raises(DivergedError, match="not finite at epoch 1, step 9; there is no earlier checkpoint"):
        saver_of(tmp_path, raise_full).check_finite(0, 10, 4, read, figures)


def test_torchs_writer_reports_a_full_disk(tmp_path):
    """If the disk is full, the existing checkpoint is kept. A file-size limit simulates the full disk."""
    code = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\nfrom models.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
        "path = Path(sys.argv[1])\nsave_checkpoint(path, {'a': torch.zeros(9)})\n"
        "try:\n    save_checkpoint(path, {'a': torch.zeros(90000), 'b': torch.zeros(90)})\n"
        "except OSError as error:\n    print(error.errno, error, len(torch.load(path)['a']))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.pth.tar")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.startswith(f"{errno.EFBIG} ") and result.stdout.endswith("c.pth.tar' 9\n"), result
    assert len(list(tmp_path.iterdir())) == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 40000 and signal.getsignal(signal.SIGXFSZ) is not None
