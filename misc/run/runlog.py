"""The log of a training run: log.jsonl, TensorBoard curves, and a progress bar or printed lines."""

import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from misc import process
from misc.command import UserError
from misc.progress import progress_bar
from misc.run.rewind import rewind_log, truncate_tensorboard_curves

NEAR_CHANCE = 1.2  # warn if an epoch's accuracy against fresh keys is below this multiple of chance level


class DivergedError(UserError):
    """Raised if the loss or the weights are not finite."""


class Sums(NamedTuple):
    """Sums of statistics, for resuming within an epoch.

    The mean over ranks is stored, so a resumed run may use a different number of ranks.
    """

    totals: torch.Tensor  # (n,) float64, sums over the steps of the epoch so far
    since: torch.Tensor  # (n,) float32, sums over the steps since the last call of compute_means_and_reset()
    steps: int  # number of steps since the last call of compute_means_and_reset()


class Meters:
    """Averages training statistics over all ranks, both for a whole epoch and since the last reset.

    The statistics stay on the device until they are read, so that a step does not wait for the device. The
    number of steps before the first non-finite statistic is also counted on the device.

    Args:
        statistic_names: names of the statistics, in order.
        device: device that computes the statistics.
    """

    def __init__(self, statistic_names: Sequence[str], device: torch.device):
        self.names = tuple(statistic_names)
        self._since = torch.zeros(len(statistic_names), device=device)
        # whether all steps were finite (1 or 0), and the number of steps before the first non-finite step
        self._finite = torch.zeros(2, device=device)
        self.steps = 0  # number of steps since the last call of compute_means_and_reset()
        self.last_count = 0  # number of steps over which compute_means_and_reset() last averaged
        self.finite_steps = 0  # how many of the last_count steps came before the first non-finite step
        self._epoch = torch.zeros(len(statistic_names), dtype=torch.float64)

    def start_epoch(self, totals: torch.Tensor | Sums | None = None) -> None:
        """Start an epoch, optionally with the sums from an interrupted run.

        Raises:
            UserError: the number of sums differs from the number of statistics.
        """
        sums = totals if isinstance(totals, Sums) or totals is None else Sums(totals, torch.zeros_like(totals), 0)
        if sums is not None and sums.totals.shape != self._epoch.shape:
            raise UserError(
                f"the checkpoint was saved partway through an epoch and has {len(sums.totals)} statistics, but this "
                f"version of the code records {len(self.names)}. To start that epoch again, set --start-epoch to the "
                "number of finished epochs"
            )
        self._clear_recent_sums()
        self._epoch = torch.zeros_like(self._epoch)
        if sums is not None:
            self._epoch = sums.totals - sums.since.double()
            self._since += sums.since.to(self._since)
            self.steps, self._finite[1] = sums.steps, sums.steps

    def _clear_recent_sums(self) -> None:
        self._since.zero_()
        self._finite[0], self._finite[1] = 1, 0
        self.steps = 0

    def add_statistics(self, statistics: torch.Tensor) -> None:
        """Add the statistics (n,) of one step on this rank."""
        self._since += statistics
        self._finite[0] *= torch.isfinite(statistics).all()
        self._finite[1] += self._finite[0]
        self.steps += 1

    def compute_means_and_reset(self) -> dict[str, float]:
        """Return the mean of each statistic since the last call.

        Every rank must call this method, which waits for the device.
        """
        reduced = process.all_reduce_mean(self._since.clone()).cpu()  # (n,)
        self._epoch = self._epoch + reduced
        mean = (reduced / self.steps).tolist()
        self.finite_steps = int(self._finite[1])
        self.last_count = self.steps
        self._clear_recent_sums()
        return dict(zip(self.names, mean))

    def compute_sums_for_checkpoint(self) -> Sums:
        """Return the sums of the statistics for a checkpoint within an epoch.

        Every rank must call this method, which waits for the device.
        """
        since = process.all_reduce_mean(self._since.clone()).cpu()
        return Sums(self._epoch + since, since, self.steps)

    def compute_epoch_statistic_sums(self) -> torch.Tensor:
        """Return the sums over the epoch so far, (n,) float64, averaged over ranks. All ranks must call this method."""
        return self.compute_sums_for_checkpoint().totals

    def epoch_means(self, steps: int) -> dict[str, float]:
        """Return the mean of each statistic over an epoch of ``steps`` steps."""
        return dict(zip(self.names, (self._epoch / steps).tolist()))


def make_curve_logger(folder: str) -> Any:
    """Return a tensorboard_logger Logger that can write pictures.

    The unmodified Logger of tensorboard_logger calls a function that SciPy has removed.
    """
    from PIL import Image
    from tensorboard_logger import Logger
    from tensorboard_logger.tf_protobuf import summary_pb2

    class Curves(Logger):
        def _image_summary(self, name: str, images: Sequence[np.ndarray], step: int | None = None):
            values = []
            for index, image in enumerate(images):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, format="png")
                picture = dict(encoded_image_string=stream.getvalue(), height=image.shape[0], width=image.shape[1])
                values.append(dict(tag=f"{name}/{index}", image=picture))
            return summary_pb2.Summary(value=values)

    return Curves(folder, flush_secs=10)


class RunLog:
    """Writes the statistics of a run. Every rank has a RunLog, but only rank 0 writes.

    Args:
        stream: the open log.jsonl on rank 0; None on other ranks.
        folder: folder of the TensorBoard curves.
        epochs: number of epochs in the run.
        steps: number of steps per epoch.
        batch_size: samples per step over all ranks, to compute samples per second.
        no_progress: print lines of statistics instead of drawing a progress bar.
    """

    def __init__(self, stream: TextIO | None, folder: Any, epochs: int, steps: int, batch_size: int, no_progress: bool):
        self.chance_fresh = 100 / batch_size  # %; chance of picking the positive key out of all keys of the step
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self._stream, self._curves, self._bar = stream, None, None
        self._no_progress, self._pictured = no_progress, False
        self._window_start = self._epoch_start = time.perf_counter()
        self._offset, self._unwritten, self._full = 0, b"", False
        self._folder = Path(folder)
        if stream is not None:
            self._curves = make_curve_logger(str(folder))

    def rewind_to(self, epoch: int, step: int, source: Path | None) -> None:
        """Remove from the logs what an earlier run wrote after the position where this run continues.

        Args:
            epoch, step: number of finished epochs, and number of finished steps in the next epoch.
            source: the checkpoint in this folder that the run resumes from; None for a new run, which empties the logs.
        """
        if not self.is_writer:
            return
        aside = self._folder / f"superseded-{time.strftime('%Y%m%d-%H%M%S')}-log.jsonl"
        counts = rewind_log(self._stream, (epoch, step) if source else (0, 0), aside)
        told = truncate_tensorboard_curves(self._folder, counts)
        # If earlier epochs had more steps, shift the step numbers so that the curves continue after their last point.
        self._offset = max(0, told - (step + self.steps * epoch))
        if source:
            self._write_log_line({"kind": "resume", "epoch": epoch, "step": step, "from": source.name})

    @property
    def is_writer(self) -> bool:
        return self._stream is not None

    def start_epoch(self, epoch: int, steps_done: int) -> None:
        """Start epoch ``epoch`` (counted from 0) after ``steps_done`` of its steps."""
        self._window_start = self._epoch_start = time.perf_counter()
        self._bar = progress_bar(
            self._no_progress or not self.is_writer,
            total=self.steps,
            initial=steps_done,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            unit="step",
        )

    def record_step(self, make_input_picture: Callable[[], np.ndarray] | None = None) -> None:
        """Record that a step is done.

        ``make_input_picture`` returns the step's input as an image, (H, W, 3) uint8. Only the first image of a run is
        logged.
        """
        self._bar.update()
        if self._pictured or make_input_picture is None or not self.is_writer:
            return
        self._pictured = True
        try:
            self._curves.log_images("train/views", [make_input_picture()], step=0)
        except (ImportError, RuntimeError) as error:  # torchvision may be missing or may not match torch
            print(f"note: no picture of the views in TensorBoard, because torchvision does not work ({error})")

    def log_step(
        self,
        epoch: int,
        step: int,
        location: int,
        averaged_steps: int,
        means: Mapping[str, float],
        learning_rate: float,
    ) -> None:
        """Log the means of the last ``averaged_steps`` steps up to ``step`` of ``epoch`` (both counted from 0)."""
        seconds = time.perf_counter() - self._window_start
        self._window_start = time.perf_counter()
        if not self.is_writer:
            return
        speed = averaged_steps * self.batch_size / seconds
        statistics = {**means, "chance_fresh": self.chance_fresh, "lr": learning_rate, "samples_per_s": speed}
        self._write_log_line({"kind": "step", "epoch": epoch + 1, "step": step, "location": location, **statistics})
        for name, value in statistics.items():
            self.add_curve_point(f"train/{name}", value, step + self.steps * epoch + self._offset)
        self._bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
        if self._bar.disable:
            losses, accuracies = f"loss {means['loss']:.4f}", f"accuracy {means['accuracy_patch']:.1f} %"
            if "loss_neighbor" in means:
                losses += f" (patch {means['loss_patch']:.4f}, neighbour {means['loss_neighbor']:.4f})"
                accuracies += f" {means['accuracy_neighbor']:.1f} %"
            print(
                f"epoch {epoch + 1} [{step}/{self.steps}] location {location}  {losses}  {accuracies}, "
                f"fresh {means['accuracy_fresh']:.1f} % (chance {self.chance_fresh:.1f} %)  {speed:.1f} samples/s"
            )

    def log_epoch(self, epoch: int, means: Mapping[str, float], rate: float) -> None:
        """Log the means of the finished epoch ``epoch`` (counted from 0)."""
        self.close_bar()
        if not self.is_writer:
            return
        seconds = time.perf_counter() - self._epoch_start
        chance = {"chance_fresh": self.chance_fresh}
        self._write_log_line({"kind": "epoch", "epoch": epoch + 1, **means, **chance, "lr": rate, "seconds": seconds})
        for name in ("loss", "accuracy_fresh"):
            self.add_curve_point(f"epoch/{name}", means[name], epoch + 1)
        accuracies = f"accuracy {means['accuracy_patch']:.1f} %"
        if "accuracy_neighbor" in means:
            accuracies += f" (patch) {means['accuracy_neighbor']:.1f} % (neighbour)"
        print(
            f"epoch {epoch + 1}/{self.epochs}: loss {means['loss']:.4f}, {accuracies}, against fresh keys "
            f"{means['accuracy_fresh']:.1f} % (chance {self.chance_fresh:.1f} %), {seconds:.0f} s"
        )
        if means["accuracy_fresh"] < NEAR_CHANCE * self.chance_fresh:
            print(
                "warning: the accuracy against fresh keys is at chance level, so the network has not learnt anything "
                "about the patches yet. Train for more epochs, or try a smaller --translate, --negatives batch or a "
                "higher --lr"
            )

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        self.close_bar()
        if self._stream is not None:
            self._stream.close()

    def add_curve_point(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve. If the disk is full, print a warning and leave the point out."""
        try:
            self._curves.log_value(name, value, step)
        except OSError as error:
            self.warn_disk_full(error)

    def _write_log_line(self, record: dict[str, Any]) -> None:
        """Write one JSON line with six significant digits. If the disk is full, the line is kept in memory."""
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        self._unwritten += json.dumps(rounded).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._stream.fileno(), self._unwritten) :]
        except OSError as error:
            self.warn_disk_full(error)

    def warn_disk_full(self, error: OSError) -> None:
        if not self._full:
            print(
                f"warning: cannot write the log ({error}); the run continues, please free some disk space", flush=True
            )
        self._full = True
