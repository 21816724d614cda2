"""Save checkpoints of a run: at intervals of epochs and minutes, and when a signal asks a rank to stop."""

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
    """Saves checkpoints on rank 0, and ends all ranks if one rank received a stop signal.

    All ranks must call the methods of their Saver at the same steps.

    Args:
        state: object that writes the state of the run. ``state.save`` takes the path, the number of finished epochs,
            the number of finished steps in the next epoch, and the sums of the statistics over these steps.
            ``state.aside`` is None, or takes the arguments of ``state.save``, copies the state and returns a function
            that writes the copy. A thread calls this function while training continues. Without this thread, a slow
            disk would stall training for seconds, because a queue of the published size takes 1.2 GB. After a stop
            signal and after the last epoch, the main thread writes the checkpoint.
        experiment: the experiment folder to save to.
        stop: records the stop signals that this rank receives.
        epochs: number of epochs of the run; the last epoch is always saved.
        epochs_between_saves: epochs between checkpoints.
        minutes_between_saves: minutes between saves within an epoch; 0 for none.
        checkpoints_to_keep: number of latest epoch checkpoints to keep; 0 for all.
        latest_checkpoint: the checkpoint that the run resumes from.
    """

    def __init__(
        self,
        state: Any,
        experiment: Experiment,
        stop: StopRequest,
        epochs: int,
        epochs_between_saves: int,
        minutes_between_saves: float,
        checkpoints_to_keep: int = 0,
        latest_checkpoint: Path | None = None,
    ):
        self.state, self.experiment, self.stop = state, experiment, stop
        self._writing: tuple[threading.Thread, list[OSError]] | None = None  # the writing thread and its errors
        self.epochs, self.every = epochs, epochs_between_saves
        self.minutes, self.keep = minutes_between_saves, checkpoints_to_keep
        self.good = latest_checkpoint  # the latest saved checkpoint
        self.agreed = 0  # stop signal that any rank had received by the end of the last epoch; 0 for none
        self.saved_at = time.monotonic()

    def save_after_step(self, epoch: int, steps_done: int, meters: Meters) -> None:
        """Save after ``steps_done`` steps of an unfinished epoch, if a save is due or any rank received a signal."""
        due = self.minutes and time.monotonic() - self.saved_at > 60 * self.minutes
        stopped, due = process.all_reduce_max(self.stop.number, int(bool(due) and not process.rank()))
        if not (due or stopped):  # a signal that arrives from now on is handled after the next step
            return
        path, sums = self.experiment.checkpoint_of_unfinished_epoch, meters.compute_sums_for_checkpoint()
        saved = self._save_checkpoint(path, epoch, steps_done, sums, wait_until_written=bool(stopped))
        if stopped:
            self.stop.number = stopped
            told = f"saved {path}" if saved else f"not saved, {self.describe_last_checkpoint()}"
            self.end_all_ranks(f"stopped by {self.stop.signal_name}; {told}, continue with --resume auto")

    def save_after_epoch(self, finished: int) -> None:
        """Save after an epoch if a checkpoint is due, if it was the last epoch, or if a rank received a stop signal.

        ``finished`` is the number of finished epochs.

        Raises:
            UserError: the disk is full after the last epoch.
        """
        last = finished == self.epochs
        (self.agreed,) = process.all_reduce_max(self.stop.number)
        if finished % self.every == 0 or last or self.agreed:
            self._save_checkpoint(
                self.experiment.checkpoint(finished),
                finished,
                fail_if_disk_full=last,
                wait_until_written=last or bool(self.agreed),
                on_saved=self.remove_replaced_checkpoints,
            )

    def exit_if_stopped(self) -> None:
        """End this process after a stop signal, with a message that names the last checkpoint."""
        if self.agreed:
            self.stop.number = self.agreed
            self.end_all_ranks(
                f"stopped by {self.stop.signal_name}; {self.describe_last_checkpoint()}, continue with --resume auto"
            )

    def check_finite(
        self, epoch: int, steps_done: int, location: int, statistics: Mapping[str, float], meters: Meters
    ) -> None:
        """Raise DivergedError on every rank if one of the ``statistics`` is not finite."""
        if all(map(math.isfinite, statistics.values())):
            return
        self.wait_for_writing()
        (worse,) = process.all_reduce_max(meters.last_count - meters.finite_steps)
        first = steps_done - max(worse - 1, 0)
        raise DivergedError(
            f"the loss is not finite at epoch {epoch + 1}, step {first}; {self.describe_last_checkpoint()}. "
            "Continue with --resume auto and a lower --lr, or check the store for damaged patches at location "
            f"{location}"
        )

    def describe_last_checkpoint(self) -> str:
        return f"the last good checkpoint is {self.good}" if self.good else "there is no earlier checkpoint"

    def _save_checkpoint(
        self,
        path: Path,
        *state_arguments: Any,
        fail_if_disk_full: bool = False,
        wait_until_written: bool = False,
        on_saved: Callable[[], None] = lambda: None,
    ) -> bool:
        """Save on rank 0. Return whether the checkpoint exists or a thread is writing it.

        If the disk is full, print a warning and continue, unless ``fail_if_disk_full`` is set. ``on_saved`` is called
        after the checkpoint has been written.
        """
        self.saved_at = time.monotonic()
        if process.rank():
            return True
        self.wait_for_writing()
        try:
            if not self.state.aside or wait_until_written:
                self.state.save(path, *state_arguments)
            else:
                self._write_in_thread(self.state.aside(path, *state_arguments), path, on_saved)
                return True
        except DivergedError as error:
            raise DivergedError(
                f"{error}; {self.describe_last_checkpoint()}. Continue with --resume auto and a lower --lr"
            ) from None
        except OSError as error:
            if fail_if_disk_full and error.errno in DISK_IS_FULL:
                words = f"cannot save ({error}), {self.describe_last_checkpoint()}"
                raise UserError(f"{words}; free some disk space and continue with --resume auto") from error
            self.warn_disk_full(error)
            return False
        self.record_saved_checkpoint(path, on_saved)
        return True

    def _write_in_thread(self, write: Callable[[], None], path: Path, on_saved: Callable[[], None]) -> None:
        wrong: list[OSError] = []

        def write_and_record_checkpoint() -> None:
            try:
                write()
                self.record_saved_checkpoint(path, on_saved)
            except OSError as error:
                wrong.append(error)

        thread = threading.Thread(target=write_and_record_checkpoint, name=f"save {path.name}")
        self._writing = (thread, wrong)
        thread.start()

    def wait_for_writing(self) -> None:
        """Wait for the thread that writes a checkpoint. Raise any OSError of the thread, unless the disk was full."""
        if self._writing:
            thread, wrong = self._writing
            self._writing = None
            thread.join()
            for error in wrong:
                self.warn_disk_full(error)

    def record_saved_checkpoint(self, path: Path, after_saving: Callable[[], None]) -> None:
        self.good = path
        after_saving()

    def remove_replaced_checkpoints(self) -> None:
        """Remove the checkpoints that the new epoch checkpoint replaces."""
        self.experiment.checkpoint_of_unfinished_epoch.unlink(missing_ok=True)
        self.experiment.remove_old_checkpoints(self.keep)

    def warn_disk_full(self, error: OSError) -> None:
        """Print a warning for a full disk, and raise any other error."""
        if error.errno not in DISK_IS_FULL:
            raise error
        print(
            f"warning: cannot save ({error}), please free some disk space; the run continues, "
            f"{self.describe_last_checkpoint()}",
            flush=True,
        )

    def end_all_ranks(self, message: str) -> None:
        """End all ranks together. A launcher ends all ranks as soon as one rank exits, even while rank 0 saves."""
        process.wait_for_ranks_before_exit()
        if process.rank() == 0:
            print(message)
        self.stop.exit_with_signal_status()
