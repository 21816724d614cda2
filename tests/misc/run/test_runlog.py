"""Test the means of a run's statistics, and the run's log."""

import json
import os

import pytest
import torch

from misc.command import UserError
from misc.run.runlog import Meters, RunLog


def test_means_since_the_last_read_and_over_the_epoch():
    meters = Meters(("loss", "accuracy"), torch.device("cpu"))
    meters.start_epoch(torch.tensor([6.0, 60.0], dtype=torch.float64))  # sums over two steps before training stopped
    for loss in (1.0, 2.0, 5.0):
        meters.add_statistics(torch.tensor([loss, 10 * loss]))
        if loss == 2.0:
            assert meters.steps == 2 and meters.compute_means_and_reset() == {"loss": 1.5, "accuracy": 15.0}
    assert meters.compute_epoch_statistic_sums().tolist() == [14.0, 140.0]  # includes unread steps
    meters.compute_means_and_reset()
    assert meters.epoch_means(5) == {"loss": 2.8, "accuracy": 28.0}
    meters.start_epoch()
    assert meters.compute_epoch_statistic_sums().tolist() == [0.0, 0.0]


def test_sums_of_other_statistics_are_refused():
    with pytest.raises(UserError, match="has 5 statistics, but this version of the code records 2"):
        Meters(("loss", "accuracy"), torch.device("cpu")).start_epoch(torch.zeros(5, dtype=torch.float64))


def test_sums_survive_a_stop():
    """A resumed run logs the same means over steps and over the epoch as an uninterrupted run."""
    figures = torch.rand(7, 2)
    whole, first, second = (Meters(("loss", "accuracy"), torch.device("cpu")) for _ in range(3))
    whole.start_epoch()
    first.start_epoch()
    told = []
    for meters, steps in ((whole, range(7)), (first, range(5))):
        for step in steps:
            meters.add_statistics(figures[step])
            if step == 2:
                told.append(meters.compute_means_and_reset())
    second.start_epoch(first.compute_sums_for_checkpoint())
    for step in (5, 6):
        second.add_statistics(figures[step])
    assert (
        second.compute_means_and_reset() == whole.compute_means_and_reset()
        and second.last_count == 4
        and told[0] == told[1]
    )
    assert second.epoch_means(7) == pytest.approx(whole.epoch_means(7), rel=1e-12)


def test_the_first_non_finite_step_is_known():
    meters = Meters(("loss",), torch.device("cpu"))
    meters.start_epoch()
    for loss in (1.0, float("nan"), 2.0):
        meters.add_statistics(torch.tensor([loss]))
    meters.compute_means_and_reset()
    assert (meters.last_count, meters.finite_steps) == (3, 1)


def test_a_log_on_a_full_disk_is_written_later(tmp_path, capsys, monkeypatch):
    with open(tmp_path / "log.jsonl", "a") as stream:
        log = RunLog(stream, tmp_path, 1, 1, 2, True)
        write = os.write
        monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log._write_log_line({"kind": "step", "epoch": 1})
        log._write_log_line({"kind": "step", "epoch": 2})
        monkeypatch.setattr(os, "write", write)
        log._write_log_line({"kind": "step", "epoch": 3})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().out.count("cannot write the log") == 1
