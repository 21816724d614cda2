"""One step of training, from views in the network's units to the figures that are logged."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FIGURES = (
    *("loss_patch", "loss_neighbor", "loss", "accuracy_patch", "accuracy_neighbor"),
    *("accuracy_fresh", "alignment", "uniformity", "queue_own", "queue_age"),  # DrasCLR.probe's
)


class LocationTable(NamedTuple):
    """Where each location and its neighbours lie, on the model's device: a step only slices it."""

    locations: torch.Tensor  # (L, 3), normalised
    neighbors: torch.Tensor  # (L, k, 3)

    @classmethod
    def of(cls, normalized: np.ndarray, neighbors: np.ndarray, device: torch.device) -> "LocationTable":
        """From (L, 3) normalised locations and (L, k) indices of neighbours."""
        locations = torch.from_numpy(normalized).to(device)  # (L, 3)
        return cls(locations, locations[torch.from_numpy(neighbors).to(device)])  # (L, k, 3)


def compute_losses(
    model: nn.Module,
    location: int,
    views: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    table: LocationTable,
    beta: float,
    bf16: bool = False,
    subjects: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to descend, CE(patch) + beta CE(neighbour), and the step's figures in the order of FIGURES.

    Args:
        model: DrasCLR, in DistributedDataParallel where there is a process group.
        location: index l that the whole batch shares.
        views: query and key (B, 1, 32, 32, 32), neighbours (B, k, 32, 32, 32).
        table: on the model's device.
        beta: weight of the neighbour loss; 0 leaves it out, as in the warm-up.
        bf16: compute the encoders in bfloat16.
        subjects: (B,) numbers of the batch's subjects, on the model's device.
    """
    query, key, neighbors = views
    loc = table.locations[location : location + 1]  # (1, 3): one location for the whole batch
    neighbor_loc = table.neighbors[location : location + 1]  # (1, k, 3)
    with torch.autocast(query.device.type, torch.bfloat16, enabled=bf16):
        inputs = (location, [query, loc], [key, loc], [neighbors, neighbor_loc], subjects)
        logits_pch, logits_ngb, labels = model(*inputs)
    loss_pch = F.cross_entropy(logits_pch, labels)
    loss_ngb = F.cross_entropy(logits_ngb, labels)
    loss = loss_pch + beta * loss_ngb if beta else loss_pch
    with torch.no_grad():
        accuracies = [(logits.argmax(dim=1) == labels).float().mean() * 100 for logits in (logits_pch, logits_ngb)]
        probe = getattr(model, "module", model).probe
        figures = torch.stack([loss_pch, loss_ngb, loss, *accuracies, *(probe[name] for name in FIGURES[5:])])  # (10,)
    return loss, figures


OPTIMIZERS = ("sgd", "adamw")


def make_optimizer(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, name: str = "sgd"
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS over every parameter, the frozen key encoder's too: the published checkpoints list all 164.

    ``momentum`` is SGD's, and AdamW's first beta.
    """
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, (momentum, 0.999), weight_decay=weight_decay, foreach=True)
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, foreach=True)


class Descent:
    """Back-propagation, and a step of the optimiser for every ``accumulate`` losses, of their mean gradient.

    The key encoder moves with the query encoder: not in the batches between.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int = 1):
        self.model, self.optimizer, self.accumulate = model, optimizer, accumulate
        self.waiting = 0  # losses whose gradients no step has taken

    def __call__(self, loss: torch.Tensor, last: bool = False) -> bool:
        """Whether the optimiser took a step; ``last`` has it take one whatever it waits for, as at an epoch's end."""
        if not self.waiting:
            self.optimizer.zero_grad(set_to_none=True)
        (loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self.waiting += 1
        stepped = last or self.waiting == self.accumulate
        if stepped:
            self.optimizer.step()
            self.waiting = 0
        self.model.keys_follow = stepped
        return stepped


def effective_rank(representations: torch.Tensor) -> float:
    """How many directions representations (n, rep_dim) spread over: exp of the entropy of their variances.

    After Roy and Vetterli (2007), of the covariance; 1 where they lie on a line, at most n - 1.
    """
    centred = representations.detach().float().cpu()
    if not torch.isfinite(centred).all():
        return float("nan")  # which no decomposition takes; the loss tells
    centred = centred - centred.mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    share = variances / variances.sum().clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))
