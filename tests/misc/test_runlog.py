"""Means of a run's figures."""

import pytest
import torch

from misc.command import UserError
from misc.runlog import Meters


def test_means_since_the_last_reading_and_over_the_epoch():
    meters = Meters(("loss", "accuracy"), torch.device("cpu"))
    meters.start_epoch(torch.tensor([6.0, 60.0], dtype=torch.float64))  # two steps of a stopped run
    for loss in (1.0, 2.0, 5.0):
        meters.add(torch.tensor([loss, 10 * loss]))
        if loss == 2.0:
            assert meters.steps == 2 and meters.read() == {"loss": 1.5, "accuracy": 15.0}
    assert meters.totals().tolist() == [14.0, 140.0]  # what was not read yet too
    meters.read()
    assert meters.epoch_means(5) == {"loss": 2.8, "accuracy": 28.0}
    meters.start_epoch()
    assert meters.totals().tolist() == [0.0, 0.0]


def test_sums_of_other_figures_are_told_in_a_sentence():
    with pytest.raises(UserError, match="sums 5 figures, this code has 2: give --start-epoch"):
        Meters(("loss", "accuracy"), torch.device("cpu")).start_epoch(torch.zeros(5, dtype=torch.float64))
