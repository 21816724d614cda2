"""Build the training step of train.py with any sizes, and time several jobs alternately."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.augment import Augmentation
from data.dataset import PatchBatch, PatchDataset
from data.device import BatchCarrier, ResidentPatches
from data.loader import iterate_batches, make_loader
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.views import StepDraws, StepViews
from misc import process
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.fast.graph import RecordedStep
from models.step import Descent, Inputs, LocationTable, TrainingStep, WholeStep, make_optimizer
from tools.dev.gpu_lab.store import FileStore

PRECISIONS = ("bf16", "tf32", "float32")


class Sizes(NamedTuple):
    """Sizes of the measurements. The defaults of batch, groups, K and neighbors are the published values."""

    batch: int = 128
    groups: int = 4
    locations: int = 64
    subjects: int = 512
    K: int = 4096
    neighbors: int = 2
    steps: int = 40  # steps per timing
    rounds: int = 5
    curve: int = 200  # steps per loss curve
    workers: int = 12


QUICK = Sizes(steps=15, rounds=3, curve=60, locations=24)
TINY = Sizes(4, 2, 6, 8, 8, 2, 2, 2, 4, 0)  # for a run on a CPU, which only checks that the script works


class Run:
    """A training run at one precision, with the same parts as in train.py: loader, device, views, step, optimiser."""

    def __init__(self, store: FileStore, sizes: Sizes, device: torch.device, precision: str, **options: Any):
        """Build all parts.

        ``options`` may contain ``recorded`` (replay the step as a CUDA graph; default on a GPU), ``resident`` (keep the
        patches on the device; off by default) and ``dense`` (see StepViews).
        """
        on_gpu = device.type == "cuda"
        process.set_arithmetic(precision == "tf32", deterministic=False)
        torch.manual_seed(0)
        groups = range(sizes.groups)
        draws = StepDraws(Augmentation("agc"), 0, groups)
        dataset = PatchDataset(store, sizes.neighbors, draws)
        resident = None
        if options.get("resident", False):
            resident = ResidentPatches(store, dataset.neighbors, device, store.num_locations)
            dataset.read = False
        self.sampler = LocationBatchSampler(store.num_subjects, store.num_locations, sizes.batch, seed=0)
        self.loader = make_loader(dataset, self.sampler, sizes.workers, pin_memory=on_gpu)
        table = LocationTable.from_arrays(normalize_locations(store.locations), dataset.neighbors, device)
        self.model = DrasCLR(
            Encoder, store.num_locations, 128, 128, 8, 1, sizes.K, 0.999, 0.2, True, bn_groups=sizes.groups
        ).to(device)
        self.views = StepViews(draws, device, options.get("dense"))
        step = TrainingStep(self.model, table, precision == "bf16").train()
        self.whole = WholeStep(self.views, step, Descent(make_optimizer(self.model, 0.01, 0.9, 1e-4)))
        self.step = RecordedStep(self.whole, self.views.generators) if options.get("recorded", on_gpu) else self.whole
        self.carrier, self.batches = BatchCarrier(device, resident), self._iterate_batches_forever()

    def _iterate_batches_forever(self) -> Iterator[PatchBatch]:
        epoch = 0
        while True:
            self.sampler.set_epoch(epoch)
            yield from iterate_batches(self.loader)
            epoch += 1

    def make_inputs(self, batch: PatchBatch) -> Inputs:
        self.views.seed_noise(batch.epoch, batch.location, batch.step)
        return Inputs(*self.carrier(batch))

    def run_steps(self, steps: int) -> list[torch.Tensor]:
        """Run some steps. Return the statistics of each step, on the device."""
        found = []
        for _ in range(steps):
            found.append(self.step(self.make_inputs(next(self.batches)), 1.0).outcome.statistics.clone())
        return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def time_in_turns(jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1) -> dict:
    """Time every job once per round. Return the median, smallest and largest time of each job in seconds."""
    for work in jobs.values():
        for _ in range(warm_up):
            work()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, work in jobs.items():
            times[name].append(time_seconds(work, device))
    return {name: summarize_by_median_and_range(values) for name, values in times.items()}


def summarize_by_median_and_range(values: Sequence[float], digits: int = 7) -> dict[str, float]:
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def convert_to_rates(times: dict[str, dict[str, float]], amount: float) -> dict[str, dict[str, float]]:
    """Convert times in seconds for ``amount`` items to items per second."""
    return {
        name: {
            "median": round(amount / value["median"], 1),
            "low": round(amount / value["high"], 1),
            "high": round(amount / value["low"], 1),
        }
        for name, value in times.items()
    }


def write_result(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
