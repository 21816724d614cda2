"""A queue of K keys for every location, and the similarities of queries to the keys that they are compared with.

The published method takes all keys of the location's queue as negatives. Three variants that are not published stand
beside it: negatives of the batch, a subject's own keys masked, one queue for all locations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class KeyQueues(nn.Module):
    """The queues of all locations. DrasCLR inherits them, so that their buffers have the published names."""

    def make_queues(
        self,
        num_patch: int,
        K: int,
        dim: int,
        negatives: str = "queue",
        mask_own: bool = False,
        one_queue: bool = False,
    ) -> None:
        """Fill the queues with random keys of unit length.

        Args:
            num_patch: L, the number of locations.
            K: keys in each location's queue; a multiple of the batch over all ranks.
            dim: size of a key.
            negatives: ``queue``, as published, or ``batch``: the keys of the step's other subjects, over all ranks.
            mask_own: leave keys of the query's own subject out of the queue's negatives.
            one_queue: put the keys of all locations into the first location's queue and take negatives from there, as
                momentum contrast did before each location had a queue of its own.

        Raises:
            ValueError: negatives is another word.
        """
        if negatives not in ("queue", "batch"):
            raise ValueError(f"negatives is {negatives!r}; it must be queue or batch")
        self.K, self.negatives, self.mask_own, self.one_queue = K, negatives, mask_own, one_queue

        # A step touches one location: (L, K, dim) makes that one contiguous block. On disk the published
        # layout is (dim, K, L); the two hooks below convert it.
        queue = torch.randn(num_patch, K, dim)  # (L, K, dim)
        for keys in queue:  # in place, a location at a time: at published sizes a copy would be 1.2 GB
            F.normalize(keys, dim=1, out=keys)
        self.register_buffer("queue", queue)
        self.register_buffer("queue_ptr", torch.zeros(num_patch, dtype=torch.long))  # (L,)

        # Where each key is from. Not in the published state dict; see queue_origin.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32), persistent=False)
        unknown = torch.full((num_patch, K), -1, dtype=torch.int32)  # (L, K)
        self.register_buffer("queue_subject", unknown, persistent=False)
        self.register_buffer("queue_step", unknown.clone(), persistent=False)

    # ------------------------------------------------------------ in a step

    def compare(
        self,
        queries: Sequence[torch.Tensor],
        keys: torch.Tensor,
        own: torch.Tensor,
        patch_idx: int | torch.Tensor,
        subjects: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Similarities [q . own key, q . negatives] of each tensor of queries.

        Args:
            queries: (B, dim) each.
            keys: (world * B, dim), the step's.
            own: (B,) row of each query's key in ``keys``.
            patch_idx: location l, or a tensor of it, (1,).
            subjects: (B,) of the queries; needed with mask_own.

        Returns:
            (B, 1 + K) each, -inf where a key is masked; or (B, world * B) with negatives of the batch.
        """
        if self.negatives == "batch":
            total = keys.shape[0]
            order = (own[:, None] + torch.arange(total, device=own.device)) % total  # (B, world * B), own key first
            return [(query @ keys.t()).gather(1, order) for query in queries]
        where = self._queue_index(patch_idx)  # (1,)
        negatives = self.queue[where][0]  # (K, dim), a copy: the backward pass needs it after the queue has moved on
        similarities = []
        for query in queries:
            positive = (query * keys[own]).sum(dim=1, keepdim=True)  # (B, 1)
            negative = query @ negatives.t()  # (B, K)
            if self.mask_own:
                negative = negative.masked_fill(self.queue_subject[where] == subjects[:, None], -torch.inf)
            similarities.append(torch.cat([positive, negative], dim=1))  # (B, 1 + K)
        return similarities

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor, patch_idx: int | torch.Tensor, subjects: torch.Tensor | None) -> None:
        """Replace the oldest keys of one location. keys: (world * B, dim); subjects: (world * B,) or None."""
        where = self._queue_index(patch_idx)  # (1,)
        count = keys.shape[0]
        pointer = self.queue_ptr[where]  # (1,)
        # Indices are computed on the device: reading the pointer would wait for it at every step.
        rows = (pointer + torch.arange(count, device=keys.device)) % self.K + where * self.K  # (world * B,), of L K
        self.queue.flatten(0, 1).index_copy_(0, rows, keys.to(self.queue.dtype))
        self.queue_ptr.index_copy_(0, where, (pointer + count) % self.K)
        self.steps += 1
        self.queue_step.flatten().index_copy_(0, rows, self.steps.expand(count))
        if subjects is not None:
            self.queue_subject.flatten().index_copy_(0, rows, subjects.to(torch.int32))

    def origin_at(self, patch_idx: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Subject and age in steps of each key at a location, (K,) each; -1 where unknown."""
        where = self._queue_index(patch_idx)
        step = self.queue_step[where][0]  # (K,)
        return self.queue_subject[where][0], torch.where(step >= 0, self.steps + 1 - step, -1)

    def _queue_index(self, patch_idx: int | torch.Tensor) -> torch.Tensor:
        """The queue of a location, (1,), on its device: a GPU's step does not depend on a number of Python's."""
        where = torch.as_tensor(patch_idx, device=self.queue.device).reshape(1)
        return torch.zeros_like(where) if self.one_queue else where

    # ------------------------------------------------------------ on disk

    def queue_origin(self) -> dict[str, Any]:
        """Subject and step of each key, -1 where unknown, (L, K) each; and the number of steps so far."""
        return {"subject": self.queue_subject, "step": self.queue_step, "steps": int(self.steps)}

    def load_queue_origin(self, origin: dict[str, Any]) -> None:
        """The inverse of :meth:`queue_origin`."""
        self.queue_subject.copy_(origin["subject"])
        self.queue_step.copy_(origin["step"])
        self.steps.fill_(int(origin["steps"]))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A view, like every other entry: at published sizes a copy would be 1.2 GB.
        destination[prefix + "queue"] = destination[prefix + "queue"].permute(2, 1, 0)  # (dim, K, L)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        key = prefix + "queue"
        on_disk = state_dict.get(key)
        if on_disk is not None and on_disk.dim() == 3:
            state_dict[key] = on_disk.permute(2, 1, 0)  # (L, K, dim)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if on_disk is not None:
            state_dict[key] = on_disk
