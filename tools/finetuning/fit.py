"""Train the head, and optionally the encoder, until the validation loss stops improving."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.store import PatchStore
from data.views import convert_hu_to_input
from models.frozen import FrozenLocations, count_layer_features
from tools.evaluation.vectors import Standardization
from tools.finetuning.network import Head, freeze_other_layers
from tools.finetuning.tasks import Split, Task

HEAD_RATE, FITTED_HEAD_RATE, ENCODER_RATE, DECAY = 1e-2, 1e-3, 1e-4, 1e-2
ROUNDS = {"frozen": 300, "last": 15, "all": 15}  # maximum number of passes over the training labels
PATIENCE = {"frozen": 30, "last": 4, "all": 4}  # stop after this many rounds without a better validation loss
PATIENTS_AT_ONCE, PATCHES_AT_ONCE = 4, 16  # subjects per training step of the encoder, and patches per subject


class Fitted(NamedTuple):
    """The head and encoder after the best pass over the training labels, and their predictions."""

    head: Head
    encoder: nn.Module
    predicted: np.ndarray  # predictions for the test labels, (n,) or (n, classes)
    rounds: int
    validation_loss: float
    standardization: Standardization | None = None  # how the head's input is standardised; None for mean vectors


class Data:
    """The patches and locations of a store, with methods to read and to encode patches."""

    def __init__(self, store: PatchStore, locations: torch.Tensor):
        self.store, self.locations = store, locations

    @torch.no_grad()
    def encode(self, encoder: nn.Module, rows: np.ndarray, layers: bool = False) -> torch.Tensor:
        """Encode all patches of n subjects. Return the representations (n, L, rep_dim), or layer features (n, L, W)."""
        frozen, found = FrozenLocations(encoder.eval(), self.locations), []
        for location in range(len(self.locations)):
            patches = torch.from_numpy(self.store.read(location, rows)).to(self.locations.device)
            encoded = frozen[location](patches, convert_hu_to_input, layers)
            found.append((encoded[:, -count_layer_features(encoder) :] if layers else encoded).cpu())
        return torch.stack(found, dim=1)

    def read_patches(self, rows: np.ndarray, location_indices: np.ndarray) -> torch.Tensor:
        """Read the patches of some subjects at some locations as network input: (locations x rows, 1, 32, 32, 32)."""
        patches = np.concatenate([self.store.read(int(place), rows) for place in location_indices])
        return convert_hu_to_input(torch.from_numpy(patches).to(self.locations.device), torch.float32)


def count_outputs(task: Task) -> int:
    return len(task.classes) if task.kind == "class" else 1


class Scaled(NamedTuple):
    """Targets for the loss: class numbers, or numbers standardised with the mean and SD of training labels."""

    target: torch.Tensor
    mean: float
    sd: float
    weights: torch.Tensor | None  # weight of each class; None unless labels are classes

    @classmethod
    def from_task(cls, task: Task, train_label_indices: np.ndarray) -> "Scaled":
        if task.kind == "class":
            counts = np.bincount(task.target[train_label_indices].astype(int), minlength=len(task.classes))
            weights = torch.tensor(
                len(train_label_indices) / np.maximum(counts, 1) / len(task.classes), dtype=torch.float32
            )
            return cls(torch.from_numpy(task.target.astype(np.int64)), 0.0, 1.0, weights)
        mean, sd = float(task.target[train_label_indices].mean()), float(task.target[train_label_indices].std()) or 1.0
        return cls(torch.from_numpy(((task.target - mean) / sd).astype(np.float32)), mean, sd, None)

    def compute_loss(self, outputs: torch.Tensor, label_indices: np.ndarray) -> torch.Tensor:
        """Return the cross-entropy or mean squared error of outputs (n, outputs) for the labels ``label_indices``."""
        wanted = self.target[label_indices].to(outputs.device)
        if self.weights is not None:
            return F.cross_entropy(outputs, wanted, self.weights.to(outputs.device))
        return F.mse_loss(outputs[:, 0], wanted)

    def to_label_unit(self, outputs: torch.Tensor) -> np.ndarray:
        """Convert outputs (n, outputs) to the unit of the label, (n,), or to probabilities (n, classes)."""
        if self.weights is not None:
            return torch.softmax(outputs, dim=1).double().numpy()
        return outputs[:, 0].double().numpy() * self.sd + self.mean


def fine_tune_and_predict(
    task: Task,
    split: Split,
    data: Data,
    encoder: nn.Module,
    layers: str,
    pooling: str,
    seed: int,
    precomputed_features: torch.Tensor | None = None,
    vector_kind: str = "mean",
) -> Fitted:
    """Train on ``split.train``, stop when ``split.validation`` no longer improves, and predict ``split.test``.

    The head is fitted first, with a fixed encoder, because an untrained head would distort the pre-trained encoder
    (Kumar et al., ICLR 2022). Unless ``layers`` is "frozen", a second phase trains head and encoder. The result of
    the second phase is kept only if it improves the validation loss.

    Args:
        task: the labels.
        split: training, validation and test labels.
        data: patches and locations.
        encoder: the pre-trained encoder; its weights change in place unless ``layers`` is "frozen".
        layers: one of LAYERS in tools.finetuning.network.
        pooling: one of POOLINGS in tools.finetuning.network.
        seed: random seed for the weights of the head and for the order of the training labels.
        precomputed_features: (N, L, rep_dim) representations from the encoder before fine-tuning; None to compute them.
            For the vector kind "layers", this argument contains the summaries of the encoder's layers, (N, L, W).
        vector_kind: one of VECTORS in tools.evaluation.vectors. Vectors other than "mean" require
            ``precomputed_features``, ``layers`` = "frozen" and ``pooling`` = "mean".
    """
    torch.manual_seed(seed)
    parameters = freeze_other_layers(encoder, layers)
    scaled = Scaled.from_task(task, split.train)
    device = data.locations.device

    standardization = None
    if vector_kind != "mean":
        standardization = Standardization.fit(
            vector_kind, precomputed_features.numpy(), np.unique(task.rows[split.train])
        )
        precomputed_features = torch.from_numpy(
            standardization.compute_patient_vectors(precomputed_features.numpy())
        ).float()[:, None]  # (N, 1, 2 D)

    def compute_representations(label_indices: np.ndarray, ignore_precomputed: bool) -> torch.Tensor:
        """Return h (n, patches, rep_dim) for each label: of all patches of the subject, or of the labelled patch."""
        rows, inverse = np.unique(task.rows[label_indices], return_inverse=True)
        h = (
            data.encode(encoder, rows)
            if ignore_precomputed or precomputed_features is None
            else precomputed_features[torch.from_numpy(rows)]
        )
        h = h[torch.from_numpy(inverse)]  # (n, L, rep_dim)
        return (
            h if task.places is None else h[torch.arange(len(h)), torch.from_numpy(task.places[label_indices])][:, None]
        )

    train_h = compute_representations(split.train, ignore_precomputed=False)
    head = Head(train_h.shape[-1], count_outputs(task), pooling)
    head.store_standardization(train_h)
    head.to(device)
    validation_h = compute_representations(split.validation, ignore_precomputed=False)

    def compute_validation_loss(h: torch.Tensor) -> float:
        with torch.no_grad():
            return float(scaled.compute_loss(head(h.to(device)), split.validation))

    optimizer = torch.optim.AdamW(head.parameters(), lr=HEAD_RATE, weight_decay=DECAY)

    def train_head_step_and_validate() -> float:
        optimizer.zero_grad(set_to_none=True)
        scaled.compute_loss(head(train_h.to(device)), split.train).backward()
        optimizer.step()
        return compute_validation_loss(validation_h)

    best_loss, rounds = _train_until_no_better(train_head_step_and_validate, (head,), "frozen", float("inf"))
    if parameters:
        groups = [{"params": head.parameters(), "lr": FITTED_HEAD_RATE}, {"params": parameters, "lr": ENCODER_RATE}]
        descent = torch.optim.AdamW(groups, weight_decay=DECAY)
        rng = np.random.default_rng([seed, 11])

        def train_encoder_and_validate() -> float:
            _train_encoder_round(task, split.train, data, encoder, head, scaled, descent, rng)
            return compute_validation_loss(compute_representations(split.validation, ignore_precomputed=True))

        best_loss, rounds = _train_until_no_better(train_encoder_and_validate, (head, encoder), layers, best_loss)
    with torch.no_grad():
        outputs = head(compute_representations(split.test, ignore_precomputed=bool(parameters)).to(device)).cpu()
    return Fitted(head, encoder, scaled.to_label_unit(outputs), rounds, best_loss, standardization)


def _train_until_no_better(
    one_round: Callable[[], float], models: Sequence[nn.Module], layers: str, best_loss: float
) -> tuple[float, int]:
    """Run rounds until the validation loss stops improving, then restore ``models`` to their best state.

    Args:
        one_round: function that trains for one round and returns the validation loss.
        models: the trained models.
        layers: one of LAYERS; selects the limits in ROUNDS and PATIENCE.
        best_loss: validation loss before the first round.

    Returns:
        The best loss (``best_loss`` if no round improved it) and the number of rounds.
    """
    best = [copy.deepcopy(model.state_dict()) for model in models]
    waited = rounds = 0
    while rounds < ROUNDS[layers] and waited < PATIENCE[layers]:
        rounds += 1
        loss = one_round()
        if loss < best_loss:
            best, best_loss, waited = [copy.deepcopy(model.state_dict()) for model in models], loss, 0
        else:
            waited += 1
    for model, state in zip(models, best):
        model.load_state_dict(state)
    return best_loss, rounds


def _train_encoder_round(
    task: Task,
    train_indices: np.ndarray,
    data: Data,
    encoder: nn.Module,
    head: Head,
    scaled: Scaled,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> None:
    """Train on every training label once, with a few subjects or patches per step and fixed BatchNorm statistics."""
    encoder.eval()
    if task.places is None:
        steps = np.array_split(rng.permutation(train_indices), -(-len(train_indices) // PATIENTS_AT_ONCE))
    else:  # patch labels: each step uses patches of one location, so that they share the same kernels
        steps = []
        for place in np.unique(task.places[train_indices]):
            own = rng.permutation(train_indices[task.places[train_indices] == place])
            steps += np.array_split(own, -(-len(own) // (PATIENTS_AT_ONCE * PATCHES_AT_ONCE)))
        rng.shuffle(steps)
    for numbers in steps:
        if task.places is None:
            count = min(PATCHES_AT_ONCE, len(data.locations))
            places = np.sort(rng.choice(len(data.locations), count, replace=False))
        else:
            places = task.places[numbers[:1]]
        x = data.read_patches(task.rows[numbers], places)  # (locations x n, 1, 32, 32, 32)
        h = encoder(x, data.locations[torch.from_numpy(places)])[1]
        h = h.view(len(places), len(numbers), -1).transpose(0, 1)  # (n, locations, rep_dim)
        optimizer.zero_grad(set_to_none=True)
        scaled.compute_loss(head(h), numbers).backward()
        optimizer.step()
