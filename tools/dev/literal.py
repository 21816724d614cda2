"""A slow, literal implementation of the published method, as the reference for the benchmark."""

import copy
import math

import torch
import torch.nn.functional as F

from data.augment import ELASTIC_SIGMA, PUBLISHED
from data.views import clip_and_shift_hu, scale_to_unit_range
from models.builder import DrasCLR
from models.cnn3d import Encoder
from models.condconv3d import CondConv3D


def convolve_with_mixed_kernel(conv: CondConv3D, sample: torch.Tensor, loc: torch.Tensor) -> torch.Tensor:
    """Convolve one sample, (1, in, D, H, W), with the kernel of its location."""
    routing = torch.sigmoid(conv._routing_fn.fc(loc))
    kernel = (routing[:, None, None, None, None, None] * conv.weight).sum(0)
    return F.conv3d(sample, kernel, conv.bias, conv.stride, conv.padding)


def encode_sample_by_sample(encoder: Encoder, x: torch.Tensor, locs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode with a loop over samples in every convolution: (B, 1, 32, 32, 32), (B, 3) -> z, h."""
    for conv, norm in encoder.layers():
        x = torch.cat([convolve_with_mixed_kernel(conv, x[i : i + 1], locs[i]) for i in range(len(x))])
        x = F.elu(norm(x))
    h = x.flatten(1)
    return encoder.fc(h), h


class LiteralStep:
    """The training step with a queue of shape (moco_dim, K, L) and loops over samples and neighbours."""

    def __init__(self, model: DrasCLR):
        self.encoder_q, self.encoder_k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
        self.m, self.T, self.K = model.m, model.T, model.K
        self.queue = model.state_dict()["queue"].clone(memory_format=torch.contiguous_format)
        self.queue_ptr = model.queue_ptr.clone()
        self.optimizer = torch.optim.SGD(
            self.encoder_q.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, foreach=False
        )

    def compute_loss(
        self,
        location: int,
        query: torch.Tensor,
        key: torch.Tensor,
        neighbors: torch.Tensor,
        loc: torch.Tensor,
        neighbor_loc: torch.Tensor,
    ) -> torch.Tensor:
        batch, k = neighbors.shape[:2]
        q = F.normalize(encode_sample_by_sample(self.encoder_q, query, loc.expand(batch, 3))[0], dim=1)
        r = encode_sample_by_sample(
            self.encoder_q, neighbors.reshape(batch * k, 1, 32, 32, 32), neighbor_loc.expand(batch, k, 3).reshape(-1, 3)
        )[0]
        r = F.normalize(r.view(batch, k, -1), dim=2)
        with torch.no_grad():
            for slow, fast in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                slow.data = slow.data * self.m + fast.data * (1.0 - self.m)
            keys = F.normalize(encode_sample_by_sample(self.encoder_k, key, loc.expand(batch, 3))[0], dim=1)
        negatives = self.queue[:, :, location].clone()
        logits_pch = torch.cat([(q * keys).sum(1, keepdim=True), q @ negatives], dim=1) / self.T
        positive = sum((r[:, j] * keys).sum(1, keepdim=True) for j in range(k))
        logits_ngb = torch.cat([positive, sum(r[:, j] @ negatives for j in range(k))], dim=1) / self.T
        pointer = int(self.queue_ptr[location])
        self.queue[:, pointer : pointer + batch, location] = keys.T
        self.queue_ptr[location] = (pointer + batch) % self.K
        labels = torch.zeros(batch, dtype=torch.long, device=q.device)
        return F.cross_entropy(logits_pch, labels) + F.cross_entropy(logits_ngb, labels)

    def step(self, *inputs) -> float:
        loss = self.compute_loss(*inputs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class LiteralAugmentation:
    """MONAI's transforms, applied to one sample at a time."""

    def __init__(self, transform_letters: str):
        from monai import transforms

        affine = dict(
            prob=1.0,
            rotate_range=(math.radians(PUBLISHED.rotate),) * 3,
            translate_range=(PUBLISHED.translate,) * 3,
            scale_range=(PUBLISHED.scale,) * 3,
            mode="bilinear",
            padding_mode="border",
        )
        transforms_by_letter = {
            "a": lambda: transforms.RandAffine(**affine),
            "e": lambda: transforms.Rand3DElastic(
                sigma_range=ELASTIC_SIGMA, magnitude_range=(0.0, PUBLISHED.elastic), **affine
            ),
            "g": lambda: transforms.RandGaussianNoise(prob=PUBLISHED.noise_prob, mean=0.0, std=PUBLISHED.noise_std),
            "c": lambda: transforms.RandAdjustContrast(prob=PUBLISHED.contrast_prob, gamma=PUBLISHED.gamma),
        }
        self.chain = [transforms_by_letter[letter]() for letter in transform_letters]

    def __call__(self, volume: torch.Tensor) -> torch.Tensor:
        """Augment a volume (C, 32, 32, 32) with values in [0, 1264]."""
        for transform in self.chain:
            volume = transform(volume)
        return torch.as_tensor(volume)


def make_views_sample_by_sample(
    patches: torch.Tensor, neighbors: torch.Tensor, augment: LiteralAugmentation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three views of a step (query, key, neighbours), augmented one sample at a time."""
    shifted = clip_and_shift_hu(patches)[:, None]
    shifted_neighbors = clip_and_shift_hu(neighbors)
    query = torch.stack([augment(volume) for volume in shifted])
    key = torch.stack([augment(volume) for volume in shifted])
    return (
        scale_to_unit_range(query),
        scale_to_unit_range(key),
        scale_to_unit_range(torch.stack([augment(volume) for volume in shifted_neighbors])),
    )
