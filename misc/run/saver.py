"""When a run saves: every so many epochs and minutes, and when a signal asks any of its ranks to stop."""

import errno
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from misc import process
from misc.command import StopRequest, UserError
from misc.experiment import Experiment
from misc.run.runlog import DivergedError, Meters

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Saver:
    """Saves on the first rank, when all ranks have agreed to; ends them all where one was asked to stop.

    Every rank must call its methods, at the same steps.

    Args:
        state: save(path, finished epochs, steps of the next, their sums) writes the run's state. ``aside`` is None or
            takes the same, copies the state and returns what writes the copy, which a thread then does while training
            goes on: the queue of published sizes is 1.2 GB, and a slow disk would stall a step for seconds. A stop and
            the last epoch are saved at once in any case.
        experiment: where to.
        stop: set by a signal to this rank.
        epochs: of the run; the last one is always saved.
        every: epochs between checkpoints.
        minutes: between saves within an epoch; 0 for none.
        keep: finished epochs' checkpoints to keep; 0 for all.
        good: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        state: Any,
        experiment: Experiment,
        stop: StopRequest,
        epochs: int,
        every: int,
        minutes: float,
        keep: int = 0,
        good: Path | None = None,
    ):
        self.state, self.experiment, self.stop = state, experiment, stop
        self._writing: tuple[threading.Thread, list[OSError]] | None = None  # and what went wrong
        self.epochs, self.every, self.minutes, self.keep = epochs, every, minutes, keep
        self.good = good  # the last that was saved
        self.agreed = 0  # the signal that all ranks knew of at the last epoch's end
        self.saved_at = time.monotonic()

    def after_step(self, epoch: int, done: int, meters: Meters) -> None:
        """Save ``done`` steps of an epoch under way, when it is time or a signal came to any rank."""
        due = self.minutes and time.monotonic() - self.saved_at > 60 * self.minutes
        stopped, due = process.all_largest(self.stop.number, int(bool(due) and not process.rank()))
        if not (due or stopped):  # a signal that came meanwhile is for the next step: other ranks do not know of it
            return
        path, sums = self.experiment.unfinished, meters.sums()
        saved = self._save(path, epoch, done, sums, now=bool(stopped))
        if stopped:
            self.stop.number = stopped
            told = f"saved {path}" if saved else f"not saved, {self._last()}"
            self._leave(f"stopped by {self.stop.name}; {told}, go on with --resume auto")

    def after_epoch(self, finished: int) -> None:
        """Save ``finished`` epochs, as often as asked, at the end, and when a signal came.

        Raises:
            UserError: there is no room, and no later epoch to save again.
        """
        last = finished == self.epochs
        (self.agreed,) = process.all_largest(self.stop.number)
        if finished % self.every == 0 or last or self.agreed:
            now = last or bool(self.agreed)
            self._save(self.experiment.checkpoint(finished), finished, must=last, now=now, then=self._tidy)

    def leave_if_asked(self) -> None:
        """End this process where a signal came; what is done is saved and told."""
        if self.agreed:
            self.stop.number = self.agreed
            self._leave(f"stopped by {self.stop.name}; {self._last()}, go on with --resume auto")

    def check(self, epoch: int, done: int, location: int, statistics: Mapping[str, float], meters: Meters) -> None:
        """Raise DivergedError, on every rank, where a statistic that was just read is not finite."""
        if all(map(math.isfinite, statistics.values())):
            return
        self._finish()
        (worse,) = process.all_largest(meters.last_count - meters.finite_steps)
        first = done - max(worse - 1, 0)
        raise DivergedError(
            f"the loss is not finite at epoch {epoch + 1}, step {first}; {self._last()}: go on from there by --resume "
            f"auto with a lower --lr, or check the store for damaged patches at location {location}"
        )

    def _last(self) -> str:
        return f"the last good state is {self.good}" if self.good else "nothing was saved before"

    def _save(
        self, path: Path, *what: Any, must: bool = False, now: bool = False, then: Callable[[], None] = lambda: None
    ) -> bool:
        """On the first rank, whether it is there, or will be when a thread has written it.

        A full disk is told, and the run goes on unless it ``must`` be saved. ``then`` is called when it is there.
        """
        self.saved_at = time.monotonic()
        if process.rank():
            return True
        self._finish()
        try:
            if not self.state.aside or now:
                self.state.save(path, *what)
            else:
                self._write_aside(self.state.aside(path, *what), path, then)
                return True
        except DivergedError as error:
            raise DivergedError(
                f"{error}; {self._last()}: go on from there by --resume auto with a lower --lr"
            ) from None
        except OSError as error:
            if must and error.errno in DISK_IS_FULL:
                words = f"no room to save ({error}), {self._last()}"
                raise UserError(f"{words}: make room, and go on with --resume auto") from error
            self._warn(error)
            return False
        self._saved(path, then)
        return True

    def _write_aside(self, write: Callable[[], None], path: Path, then: Callable[[], None]) -> None:
        wrong: list[OSError] = []

        def work() -> None:
            try:
                write()
                self._saved(path, then)
            except OSError as error:
                wrong.append(error)

        thread = threading.Thread(target=work, name=f"save {path.name}")
        self._writing = (thread, wrong)
        thread.start()

    def _finish(self) -> None:
        """Wait for what is being written. Raises OSError where it was something else than a full disk."""
        if self._writing:
            thread, wrong = self._writing
            self._writing = None
            thread.join()
            for error in wrong:
                self._warn(error)

    def _saved(self, path: Path, then: Callable[[], None]) -> None:
        self.good = path
        then()

    def _tidy(self) -> None:
        """What an epoch's checkpoint makes superfluous."""
        self.experiment.unfinished.unlink(missing_ok=True)
        self.experiment.keep_latest(self.keep)

    def _warn(self, error: OSError) -> None:
        """Tell of a full disk; raise anything else."""
        if error.errno not in DISK_IS_FULL:
            raise error
        print(f"warning: no room to save ({error}); the run goes on, {self._last()}: make room", flush=True)

    def _leave(self, message: str) -> None:
        """All ranks together: a launcher ends the others when one has gone, and the first takes its time to save."""
        process.meet()
        if process.rank() == 0:
            print(message)
        self.stop.leave()
