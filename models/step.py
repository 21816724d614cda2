"""One training step, from raw patches to the loss, the logged statistics and the updated weights."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from misc.sizes import OPTIMIZERS
from models import probe
from models.builder import DrasCLR

STATISTICS = ("loss_patch", "loss_neighbor", "loss", "accuracy_patch", "accuracy_neighbor", *probe.STATISTICS)
OF_NEIGHBORS = ("loss_neighbor", "accuracy_neighbor")


def statistic_names(neighbors: bool) -> tuple[str, ...]:
    """Return the names of a step's statistics in order.

    If ``neighbors`` is False, the statistics of the neighbour task are left out.
    """
    return tuple(name for name in STATISTICS if neighbors or name not in OF_NEIGHBORS)


class LocationTable(NamedTuple):
    """Coordinates of all locations and of their neighbours, kept on the model's device and indexed in every step."""

    locations: torch.Tensor  # (L, 3), normalised
    neighbors: torch.Tensor  # (L, k, 3)

    @classmethod
    def from_arrays(cls, normalized: np.ndarray, neighbors: np.ndarray, device: torch.device) -> "LocationTable":
        """Build a location table from (L, 3) normalised locations and (L, k) indices of neighbours; k may be 0."""
        locations = torch.from_numpy(normalized).to(device)  # (L, 3)
        return cls(locations, locations[torch.from_numpy(neighbors).to(device)])  # (L, k, 3)


class Outcome(NamedTuple):
    """Results of :class:`TrainingStep`."""

    loss: torch.Tensor  # (), to minimise
    statistics: torch.Tensor  # (n,), in the order of statistic_names
    representation: torch.Tensor  # (B, rep_dim), h of the patches


class TrainingStep(nn.Module):
    """Compute the loss from the views. DistributedDataParallel wraps this module if there is a process group.

    Args:
        model: the DrasCLR model.
        table: coordinates of the locations, on the model's device.
        bf16: run the encoders in bfloat16.
    """

    def __init__(self, model: DrasCLR, table: LocationTable, bf16: bool = False):
        super().__init__()
        self.model, self.table, self.bf16 = model, table, bf16

    def forward(
        self,
        location: int | torch.Tensor,
        views: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        beta: float,
        subjects: torch.Tensor | None = None,
        move_keys: bool = True,
    ) -> Outcome:
        """Compute CE(patch) + beta CE(neighbour) and the statistics of the step. CE is the cross-entropy.

        Args:
            location: index l of the location that the whole batch shares, as an int or as a (1,) tensor on the
                model's device.
            views: query and key (B, 1, 32, 32, 32), neighbours (B, k, 32, 32, 32) or None.
            beta: weight of the neighbour loss; 0 leaves out this loss, for example during the warm-up.
            subjects: (B,) row numbers of the batch's subjects, on the model's device.
            move_keys: see :meth:`DrasCLR.step`.
        """
        query, key, neighbors = views
        where = torch.as_tensor(location, device=query.device).reshape(1)
        loc = self.table.locations[where]  # (1, 3): one location for the whole batch
        ngb_q = None if neighbors is None else [neighbors, self.table.neighbors[where]]  # (1, k, 3)
        with torch.autocast(query.device.type, torch.bfloat16, enabled=self.bf16):
            step = self.model.step(where, [query, loc], [key, loc], ngb_q, subjects, move_keys)

        loss = loss_pch = F.cross_entropy(step.logits_pch, step.labels)
        statistics = {
            "loss_patch": loss_pch,
            "accuracy_patch": compute_contrastive_accuracy(step.logits_pch),
            **step.statistics,
        }
        if step.logits_ngb is not None:
            loss_ngb = F.cross_entropy(step.logits_ngb, step.labels)
            statistics |= {
                "loss_neighbor": loss_ngb,
                "accuracy_neighbor": compute_contrastive_accuracy(step.logits_ngb),
            }
            if beta:
                loss = loss_pch + beta * loss_ngb
        statistics["loss"] = loss
        names = statistic_names(neighbors is not None)
        return Outcome(loss, torch.stack([statistics[name].detach() for name in names]), step.representation)


def compute_contrastive_accuracy(logits: torch.Tensor) -> torch.Tensor:
    """Return the percentage of rows in which the positive key (column 0) has the largest logit: (B, n) -> ()."""
    return 100 * (logits.argmax(dim=1) == 0).float().mean()


def make_optimizer(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, name: str = "sgd"
) -> torch.optim.Optimizer:
    """Create an optimiser for all parameters of the model.

    The frozen key encoder is included, because the published checkpoints list all 164 parameters of both encoders.
    ``momentum`` is the momentum of SGD, or the first beta of AdamW.

    Raises:
        ValueError: ``name`` is not in OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}")
    on_gpu = next(model.parameters()).device.type == "cuda"
    # On a GPU, use the fused kernel, which reads the learning rate from the device.
    # Every replay of a CUDA graph with the fused kernel uses the current learning rate.
    kind = {"fused": True} if on_gpu else {"foreach": True}
    if name == "adamw":
        betas = (momentum, 0.999)
        return torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=weight_decay, capturable=on_gpu, **kind)
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, **kind)


class Descent:
    """Back-propagate each loss, and update the weights with the mean gradient of every ``accumulate`` losses."""

    def __init__(self, optimizer: torch.optim.Optimizer, accumulate: int = 1):
        self.optimizer, self.accumulate = optimizer, accumulate
        self.waiting = 0  # number of losses back-propagated since the last optimiser step

    def __call__(self, loss: torch.Tensor, force_update: bool = False) -> bool:
        """Back-propagate one loss and return whether the optimiser took a step.

        ``force_update`` forces an optimiser step, for example at the end of an epoch.
        """
        if not self.waiting:
            self.optimizer.zero_grad(set_to_none=True)
        (loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self.waiting += 1
        stepped = force_update or self.waiting == self.accumulate
        if stepped:
            self.waiting = 0
            self.optimizer.step()
        return stepped


class Inputs(NamedTuple):
    """Input tensors of one step, on the model's device."""

    location: torch.Tensor  # (1,) int64
    patches: torch.Tensor  # (B, 32, 32, 32) HU
    neighbors: torch.Tensor | None  # (B, k, 32, 32, 32) HU
    draws: torch.Tensor  # random parameters of the augmentation
    subjects: torch.Tensor | None  # (B,) int64


class Done(NamedTuple):
    """Results of :class:`WholeStep`."""

    views: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    outcome: Outcome
    stepped: bool  # whether the optimiser took a step


class WholeStep:
    """One step from raw patches to new weights: make views, compute the loss, back-propagate, update.

    Args:
        make_views: turns patches, neighbours and random parameters into views.
        training_step: a TrainingStep, possibly wrapped in DistributedDataParallel.
        descend: back-propagates the loss and updates the parameters of ``training_step``.
    """

    def __init__(self, make_views: Callable[..., tuple], training_step: nn.Module, descend: Descent):
        self.make_views, self.training_step, self.descend = make_views, training_step, descend
        self._move_keys = True  # update the key encoder only after the optimiser has changed the query encoder

    def __call__(self, inputs: Inputs, beta: float, force_update: bool = False) -> Done:
        """Run one step. :class:`TrainingStep` describes ``beta``, and :class:`Descent` describes ``force_update``."""
        views = self.make_views(inputs.patches, inputs.neighbors, inputs.draws)
        outcome = self.training_step(inputs.location, views, beta, inputs.subjects, self._move_keys)
        stepped = self._move_keys = self.descend(outcome.loss, force_update)
        return Done(views, outcome._replace(loss=outcome.loss.detach()), stepped)
