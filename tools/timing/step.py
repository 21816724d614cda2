"""The training step of train.py, for timing."""

from collections.abc import Iterator

import torch
from torch import nn

from data.augment import Augmentation
from data.dataset import PatchBatch, PatchDataset
from data.device import BatchCarrier
from data.loader import make_loader
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from data.views import StepDraws, StepViews
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.step import Descent, Done, Inputs, LocationTable, TrainingStep, WholeStep, make_optimizer


class TimedStep:
    """Read a batch, make its views and train for a step, with the same functions in the same order as train.py."""

    def __init__(self, store: PatchStore, batch: int, K: int, device: torch.device, bf16: bool, workers: int = 0):
        torch.manual_seed(0)
        self.device, self.store = device, store
        draws = StepDraws(Augmentation("agc"), 0, range(1))
        dataset = PatchDataset(store, 2, draws)
        self.sampler = LocationBatchSampler(store.num_subjects, store.num_locations, batch, seed=0)
        self.loader = make_loader(dataset, self.sampler, workers, pin_memory=device.type == "cuda")
        table = LocationTable.from_arrays(normalize_locations(store.locations), dataset.neighbors, device)
        self.model = DrasCLR(Encoder, store.num_locations, 128, 128, 8, 1, K, 0.999, 0.2, True).to(device).train()
        self.step = TrainingStep(self.model, table, bf16)
        self.carrier, self.views = BatchCarrier(device), StepViews(draws, device)
        self.descend = Descent(make_optimizer(self.model, 0.01, 0.9, 1e-4))
        self.whole = WholeStep(self.views, self.step, self.descend)
        self.batches = self._iterate_batches_forever()

    def _iterate_batches_forever(self) -> Iterator[PatchBatch]:
        epoch = 0
        while True:
            self.sampler.set_epoch(epoch, 0)
            yield from self.loader
            epoch += 1

    def make_inputs(self, batch: PatchBatch) -> Inputs:
        """Seed the augmentation of a batch, and move the batch to the device."""
        self.views.seed_noise(batch.epoch, batch.location, batch.step)
        return Inputs(*self.carrier(batch))

    def compute_loss(self, inputs: Inputs) -> torch.Tensor:
        views = self.views(inputs.patches, inputs.neighbors, inputs.draws)
        return self.step(inputs.location, views, 1.0, inputs.subjects).loss

    def get_coordinates(self, location: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the coordinates of a location, (1, 3), and of its neighbours, (1, k, 3)."""
        return tuple(table[location : location + 1] for table in self.step.table)

    def run_steps(self, steps: int) -> Done:
        for _ in range(steps):
            done = self.whole(self.make_inputs(next(self.batches)), 1.0)
        return done


def make_encoder(device: torch.device) -> Encoder:
    """Return an encoder in eval mode, with BatchNorm statistics like those of a trained encoder."""
    torch.manual_seed(0)
    encoder = Encoder(128, 128, 8, 1).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.01, 0.1)
    return encoder.to(device)
