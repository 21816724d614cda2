"""When a run saves: every so many epochs and minutes, and when a signal asks it to stop."""

import time
from collections.abc import Callable
from pathlib import Path

from misc import process
from misc.command import StopRequest
from misc.experiment import Experiment
from misc.runlog import Meters


class Saver:
    """Saves on the first rank, and leaves there where a signal asked for it; other ranks do nothing.

    Args:
        save: writes the run's state: save(path, finished epochs, steps of the next, their sums).
        experiment: where to.
        stop: set by a signal.
        epochs: of the run; the last one is always saved.
        every: epochs between checkpoints.
        minutes: between saves within an epoch; 0 for none.
    """

    def __init__(
        self,
        save: Callable[..., None],
        experiment: Experiment,
        stop: StopRequest,
        epochs: int,
        every: int,
        minutes: float,
    ):
        self.save, self.experiment, self.stop = save, experiment, stop
        self.epochs, self.every, self.minutes = epochs, every, minutes
        self.saved_at = time.monotonic()

    def after_step(self, epoch: int, done: int, meters: Meters) -> None:
        """Save ``done`` steps of an epoch under way, when it is time or a signal came."""
        due = self.minutes and time.monotonic() - self.saved_at > 60 * self.minutes
        if process.rank() or not (due or self.stop.number):
            return
        path: Path = self.experiment.unfinished
        self.save(path, epoch, done, meters.totals())
        self.saved_at = time.monotonic()
        if self.stop.number:
            print(f"stopped by {self.stop.name}; saved {path}, go on with --resume auto")
            self.stop.leave()

    def after_epoch(self, finished: int) -> None:
        """Save ``finished`` epochs, as often as asked, at the end, and when a signal came."""
        last = finished == self.epochs
        if process.rank() or not (finished % self.every == 0 or last or self.stop.number):
            return
        self.save(self.experiment.checkpoint(finished), finished)
        self.experiment.unfinished.unlink(missing_ok=True)
        self.saved_at = time.monotonic()

    def leave_if_asked(self) -> None:
        """End this process where a signal came; what is done is saved and told."""
        if self.stop.number and process.rank() == 0:
            print(f"stopped by {self.stop.name}; go on with --resume auto")
            self.stop.leave()
