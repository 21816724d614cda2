"""The network for fine-tuning: the encoder, pooling over the patches of a subject, and a linear layer."""

import sys
from pathlib import Path

import torch
from torch import nn

from data.locations import table_fingerprint
from data.store import PatchStore
from models.checkpoint import build_query_encoder, check_same_location_table, check_sha256, read_checkpoint
from models.cnn3d import Encoder

POOLINGS = ("mean", "attention")
LAYERS = ("frozen", "last", "all")


def load_encoder(path: str, store: PatchStore, sha256: str | None = None) -> tuple[Encoder, dict]:
    """Load the query encoder of a checkpoint, and return it with a dictionary of its sizes.

    Raises:
        CheckpointError: the file cannot be read, its SHA-256 is not ``sha256``, or the encoder was trained on another
            table of locations.
    """
    check_sha256(Path(path), sha256)
    content = read_checkpoint(Path(path))
    encoder, sizes = build_query_encoder(Encoder, content, path)
    note = check_same_location_table(
        content, path, store.num_locations, table_fingerprint(store.locations), store.layout.root
    )
    if note:
        print(f"note: {note}", file=sys.stderr)
    return encoder, sizes


class Head(nn.Module):
    """Predict a label from the representations of a subject's patches.

    Args:
        rep_dim: number of features per patch.
        outputs: number of classes for a classification, else 1.
        pooling: ``mean`` over the patches, or ``attention`` with weights softmax(w tanh(V h)) (Ilse et al., 2018).
    """

    def __init__(self, rep_dim: int, outputs: int, pooling: str = "mean"):
        super().__init__()
        self.score = (
            nn.Sequential(nn.Linear(rep_dim, 32), nn.Tanh(), nn.Linear(32, 1)) if pooling == "attention" else None
        )
        self.linear = nn.Linear(rep_dim, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(rep_dim))
        self.register_buffer("scale", torch.ones(rep_dim))

    @torch.no_grad()
    def store_standardization(self, h: torch.Tensor) -> None:
        """Store the mean and SD of representations (..., rep_dim), which ``forward`` uses to standardise its input."""
        flat = h.flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.scale.copy_(1 / flat.std(0).clamp(min=1e-6))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Predict labels from representations: (n, patches, rep_dim) -> (n, outputs)."""
        h = (h - self.mean) * self.scale
        if self.score is None:
            return self.linear(h.mean(dim=1))
        weights = torch.softmax(self.score(h), dim=1)  # (n, patches, 1)
        return self.linear((weights * h).sum(dim=1))


def freeze_other_layers(encoder: nn.Module, layers: str) -> list[nn.Parameter]:
    """Freeze the encoder except for ``layers``, and return the parameters to train.

    ``layers`` is "frozen" (no parameters), "last" (the last two convolutions and their BatchNorm) or "all".
    """
    encoder.requires_grad_(layers == "all")
    if layers == "last":
        for module in (encoder.conv3, encoder.bn3, encoder.conv4, encoder.bn4):
            module.requires_grad_(True)
    encoder.fc.requires_grad_(False)  # only the contrastive loss uses the layer fc
    return [value for value in encoder.parameters() if value.requires_grad]
