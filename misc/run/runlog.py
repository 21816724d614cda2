"""What a run tells of itself: log.jsonl, TensorBoard curves, a progress bar or printed lines, behind one object."""

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
from misc.run.rewind import rewind_curves, rewind_log

NEAR_CHANCE = 1.2  # times chance; below it an epoch's accuracy against fresh keys tells of no learning


class DivergedError(UserError):
    """The loss or the weights are not finite."""


class Sums(NamedTuple):
    """What a run that goes on within an epoch needs of its meters; means over the ranks, so of any number of them."""

    totals: torch.Tensor  # (n,) float64, over the epoch's steps so far
    since: torch.Tensor  # (n,) float32, of those that no reading has told
    steps: int  # how many these are


class Meters:
    """Means of a step's statistics over all ranks: of the steps since the last reading, and of an epoch's.

    Statistics stay on the device until they are read, so that a step does not wait for it; so does the number of steps
    before the first whose statistics were not finite.

    Args:
        names: of the statistics, in order.
        device: where they are computed.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = tuple(names)
        self._since = torch.zeros(len(names), device=device)
        self._finite = torch.zeros(2, device=device)  # whether all were so far; how many were
        self.steps = 0  # since the last reading
        self.last_count = 0  # steps that the last reading was over
        self.finite_steps = 0  # of these, before the first that was not finite
        self._epoch = torch.zeros(len(names), dtype=torch.float64)

    def start_epoch(self, totals: torch.Tensor | Sums | None = None) -> None:
        """Begin an epoch, with the sums of the steps that a stopped run has done.

        Raises:
            UserError: they are of other statistics.
        """
        sums = totals if isinstance(totals, Sums) or totals is None else Sums(totals, torch.zeros_like(totals), 0)
        if sums is not None and sums.totals.shape != self._epoch.shape:
            raise UserError(
                f"the checkpoint is from within an epoch and sums {len(sums.totals)} statistics, this code has "
                f"{len(self.names)}: give --start-epoch with its finished epochs, to begin that epoch again"
            )
        self._clear()
        self._epoch = torch.zeros_like(self._epoch)
        if sums is not None:
            self._epoch = sums.totals - sums.since.double()
            self._since += sums.since.to(self._since)
            self.steps, self._finite[1] = sums.steps, sums.steps

    def _clear(self) -> None:
        self._since.zero_()
        self._finite[0], self._finite[1] = 1, 0
        self.steps = 0

    def add(self, statistics: torch.Tensor) -> None:
        """One step's statistics, (n,), of this rank."""
        self._since += statistics
        self._finite[0] *= torch.isfinite(statistics).all()
        self._finite[1] += self._finite[0]
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading; every rank must call it. Waits for the device."""
        reduced = process.all_reduce_mean(self._since.clone()).cpu()  # (n,)
        self._epoch = self._epoch + reduced
        mean = (reduced / self.steps).tolist()
        self.finite_steps = int(self._finite[1])
        self.last_count = self.steps
        self._clear()
        return dict(zip(self.names, mean))

    def sums(self) -> Sums:
        """For a checkpoint within an epoch; every rank must call it. Waits for the device."""
        since = process.all_reduce_mean(self._since.clone()).cpu()
        return Sums(self._epoch + since, since, self.steps)

    def totals(self) -> torch.Tensor:
        """Sums over the epoch so far, (n,) float64, over all ranks; every rank must call it."""
        return self.sums().totals

    def epoch_means(self, steps: int) -> dict[str, float]:
        """Means over an epoch of so many steps."""
        return dict(zip(self.names, (self._epoch / steps).tolist()))


def _curves(folder: str) -> Any:
    """tensorboard_logger's Logger, able to write pictures: its own way calls a function that SciPy dropped in 2018."""
    from PIL import Image
    from tensorboard_logger import Logger
    from tensorboard_logger.tf_protobuf import summary_pb2

    class Curves(Logger):
        def _image_summary(self, name, images, step=None):
            values = []
            for index, image in enumerate(images):
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, format="png")
                picture = dict(encoded_image_string=stream.getvalue(), height=image.shape[0], width=image.shape[1])
                values.append(dict(tag=f"{name}/{index}", image=picture))
            return summary_pb2.Summary(value=values)

    return Curves(folder, flush_secs=10)


class RunLog:
    """Where a run's statistics go. Every rank has one; only the first one's writes anything.

    Args:
        stream: log.jsonl, open; None on other ranks.
        folder: of the TensorBoard curves.
        epochs: of the run.
        steps: of an epoch.
        batch_size: over all ranks, for samples a second.
        no_progress: draw no bar; without one, every reading is a printed line.
    """

    def __init__(self, stream: TextIO | None, folder: Any, epochs: int, steps: int, batch_size: int, no_progress: bool):
        self.chance_fresh = 100 / batch_size  # %, of the accuracy against the step's own keys
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self._stream, self._curves, self._bar = stream, None, None
        self._no_progress, self._pictured = no_progress, False
        self._window_start = self._epoch_start = time.perf_counter()
        self._offset, self._unwritten, self._full = 0, b"", False
        self._folder = Path(folder)
        if stream is not None:
            self._curves = _curves(str(folder))

    def go_on(self, epoch: int, step: int, source: Path | None) -> None:
        """Take back what an earlier run told of later steps than ``step`` of epoch ``epoch`` (0 the first).

        Args:
            epoch, step: finished epochs, and steps of the next, from which this run goes on.
            source: the checkpoint that it goes on from, of this folder; None for a run that takes nothing over.
        """
        if not self.speaks:
            return
        aside = self._folder / f"superseded-{time.strftime('%Y%m%d-%H%M%S')}-log.jsonl"
        counts = rewind_log(self._stream, (epoch, step) if source else (0, 0), aside)
        told = rewind_curves(self._folder, counts)
        self._offset = max(0, told - (step + self.steps * epoch))  # epochs were longer before
        if source:
            self._write({"kind": "resume", "epoch": epoch, "step": step, "from": source.name})

    @property
    def speaks(self) -> bool:
        return self._stream is not None

    def start_epoch(self, epoch: int, done: int) -> None:
        """Begin epoch ``epoch`` (0 the first) after ``done`` of its steps."""
        self._window_start = self._epoch_start = time.perf_counter()
        self._bar = progress_bar(
            self._no_progress or not self.speaks,
            total=self.steps,
            initial=done,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            unit="step",
        )

    def advance(self, picture: Callable[[], np.ndarray] | None = None) -> None:
        """One step is done. ``picture`` makes (H, W, 3) uint8 of its input; of a run's first step it is kept."""
        self._bar.update()
        if self._pictured or picture is None or not self.speaks:
            return
        self._pictured = True
        try:
            self._curves.log_images("train/views", [picture()], step=0)
        except (ImportError, RuntimeError) as error:  # a torchvision that does not go with this torch
            print(f"note: no picture of the views in TensorBoard, torchvision cannot be used ({error})")

    def step(self, epoch: int, step: int, location: int, count: int, means: Mapping[str, float], rate: float) -> None:
        """The means of the last ``count`` steps, up to step ``step`` of epoch ``epoch`` (0 the first)."""
        seconds = time.perf_counter() - self._window_start
        self._window_start = time.perf_counter()
        if not self.speaks:
            return
        speed = count * self.batch_size / seconds
        statistics = {**means, "chance_fresh": self.chance_fresh, "lr": rate, "samples_per_s": speed}
        self._write({"kind": "step", "epoch": epoch + 1, "step": step, "location": location, **statistics})
        for name, value in statistics.items():
            self._point(f"train/{name}", value, step + self.steps * epoch + self._offset)
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

    def end_epoch(self, epoch: int, means: Mapping[str, float], rate: float) -> None:
        """The means of epoch ``epoch`` (0 the first), which is done."""
        self.close_bar()
        if not self.speaks:
            return
        seconds = time.perf_counter() - self._epoch_start
        chance = {"chance_fresh": self.chance_fresh}
        self._write({"kind": "epoch", "epoch": epoch + 1, **means, **chance, "lr": rate, "seconds": seconds})
        for name in ("loss", "accuracy_fresh"):
            self._point(f"epoch/{name}", means[name], epoch + 1)
        accuracies = f"accuracy {means['accuracy_patch']:.1f} %"
        if "accuracy_neighbor" in means:
            accuracies += f" (patch) {means['accuracy_neighbor']:.1f} % (neighbour)"
        print(
            f"epoch {epoch + 1}/{self.epochs}: loss {means['loss']:.4f}, {accuracies}, against fresh keys "
            f"{means['accuracy_fresh']:.1f} % (chance {self.chance_fresh:.1f} %), {seconds:.0f} s"
        )
        if means["accuracy_fresh"] < NEAR_CHANCE * self.chance_fresh:
            print(
                "warning: among keys as old as its own, a query finds its key no more often than by chance: nothing is "
                "learnt of the patches yet. Give it more epochs; or a smaller --translate, --negatives batch, a higher "
                "--lr"
            )

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        self.close_bar()
        if self._stream is not None:
            self._stream.close()

    def _point(self, name: str, value: float, step: int) -> None:
        """A point of a curve; lost where the disk is full."""
        try:
            self._curves.log_value(name, value, step)
        except OSError as error:
            self._tell_full(error)

    def _write(self, record: dict[str, Any]) -> None:
        """One JSON line; six digits are more than the numbers mean. Where the disk is full it waits for room."""
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        self._unwritten += json.dumps(rounded).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._stream.fileno(), self._unwritten) :]
        except OSError as error:
            self._tell_full(error)

    def _tell_full(self, error: OSError) -> None:
        if not self._full:
            print(f"warning: no room for the log ({error}); the run goes on: make room", flush=True)
        self._full = True
