"""One training step as train.py composes it, for timing."""

from collections.abc import Iterator

import torch
from torch import nn

from data.augment import Augmentation
from data.dataset import PatchBatch, PatchDataset
from data.loader import make_loader
from data.locations import normalize_locations
from data.sampler import LocationBatchSampler
from data.store import PatchStore
from data.views import Views, step_views
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.step import Descent, LocationTable, TrainingStep, make_optimizer


class TimedStep:
    """Reading, views and a step of training: the functions that train.py calls, in its order."""

    def __init__(self, store: PatchStore, batch: int, K: int, device: torch.device, bf16: bool, workers: int = 0):
        torch.manual_seed(0)
        self.device, self.store = device, store
        dataset = PatchDataset(store, 2)
        self.sampler = LocationBatchSampler(store.num_subjects, store.num_locations, batch, seed=0)
        self.loader = make_loader(dataset, self.sampler, workers, pin_memory=device.type == "cuda")
        table = LocationTable.of(normalize_locations(store.locations), dataset.neighbors, device)
        self.augmentation = Augmentation("agc")
        self.model = DrasCLR(Encoder, store.num_locations, 128, 128, 8, 1, K, 0.999, 0.2, True).to(device).train()
        self.step = TrainingStep(self.model, table, bf16)
        self.descend = Descent(make_optimizer(self.model, 0.01, 0.9, 1e-4))
        self.batches = self._forever()

    def _forever(self) -> Iterator[PatchBatch]:
        epoch = 0
        while True:
            self.sampler.set_epoch(epoch, 0)
            yield from self.loader
            epoch += 1

    def views(self, batch: PatchBatch) -> Views:
        return step_views(batch, self.augmentation, 0, range(1), self.device)

    def loss(self, location: int, views: Views) -> torch.Tensor:
        return self.step(location, views, 1.0).loss

    def where(self, location: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The location, (1, 3), and its neighbours', (1, k, 3)."""
        return tuple(table[location : location + 1] for table in self.step.table)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.batches)
            self.descend(self.loss(batch.location, self.views(batch)))


def trained_encoder(device: torch.device) -> Encoder:
    """In eval mode, with statistics as after training and not the identity."""
    torch.manual_seed(0)
    encoder = Encoder(128, 128, 8, 1).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.01, 0.1)
    return encoder.to(device)
