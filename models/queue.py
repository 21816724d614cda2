"""A queue of K keys for every location, and the similarities between queries and keys.

The published method takes all keys in the location's queue as negatives. The queues have three unpublished variants:
negatives from the current batch, masking of keys from the query's own subject, and one queue for all locations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class KeyQueues(nn.Module):
    """The queues of all locations. DrasCLR inherits from this class to give the buffers their published names."""

    def make_queues(
        self,
        num_patch: int,
        K: int,
        dim: int,
        negatives: str = "queue",
        mask_own: bool = False,
        one_queue: bool = False,
    ) -> None:
        """Create the queues and fill them with random keys of unit length.

        Args:
            num_patch: L, the number of locations.
            K: number of keys in each location's queue; a multiple of the batch size over all ranks.
            dim: size of a key.
            negatives: ``queue`` (published) takes the keys in the location's queue as negatives. ``batch`` takes the
                keys of the other subjects in this step as negatives, from all ranks.
            mask_own: do not use keys of the query's own subject as negatives from the queue.
            one_queue: put the keys of all locations into the first location's queue and take all negatives from it,
                as in momentum contrast without locations.

        Raises:
            ValueError: ``negatives`` is neither ``queue`` nor ``batch``.
        """
        if negatives not in ("queue", "batch"):
            raise ValueError(f"negatives is {negatives!r}; it must be 'queue' or 'batch'")
        self.K, self.negatives, self.mask_own, self.one_queue = K, negatives, mask_own, one_queue

        # A step uses the keys of one location, which form one contiguous block of (L, K, dim).
        # Checkpoints store the queue in the published layout (dim, K, L).
        # _save_to_state_dict and _load_from_state_dict convert between the layouts in memory and on disk.
        queue = torch.randn(num_patch, K, dim)  # (L, K, dim)
        for keys in queue:  # normalise in place, because a copy would take 1.2 GB at the published sizes
            F.normalize(keys, dim=1, out=keys)
        self.register_buffer("queue", queue)
        self.register_buffer("queue_ptr", torch.zeros(num_patch, dtype=torch.long))  # (L,)

        # The subject and step of each key are not part of the published state dict; see export_key_subjects_and_steps.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int32), persistent=False)
        unknown = torch.full((num_patch, K), -1, dtype=torch.int32)  # (L, K)
        self.register_buffer("queue_subject", unknown, persistent=False)
        self.register_buffer("queue_step", unknown.clone(), persistent=False)

    # ------------------------------------------------------------ in a step

    def compute_similarities(
        self,
        queries: Sequence[torch.Tensor],
        keys: torch.Tensor,
        own: torch.Tensor,
        patch_idx: int | torch.Tensor,
        subjects: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Compute the dot products of each query with its own key and with the negatives.

        Args:
            queries: tensors of shape (B, dim).
            keys: (world * B, dim), the keys of this step.
            own: (B,) row of each query's own key in ``keys``.
            patch_idx: index l of the location, as an int or as a (1,) tensor.
            subjects: (B,) subjects of the queries; required with mask_own.

        Returns:
            One tensor per entry of ``queries``: (B, 1 + K), with -inf for masked keys, or (B, world * B) with
            negatives from the batch.
        """
        if self.negatives == "batch":
            total = keys.shape[0]
            order = (own[:, None] + torch.arange(total, device=own.device)) % total  # (B, world * B), own key first
            return [(query @ keys.t()).gather(1, order) for query in queries]
        where = self._get_queue_index(patch_idx)  # (1,)
        negatives = self.queue[where][0]  # (K, dim), a copy, because the queue changes before backward()
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
        """Replace the oldest keys in the queue of one location.

        Args:
            keys: (world * B, dim).
            patch_idx: index l of the location, as an int or as a (1,) tensor.
            subjects: (world * B,) subjects of the keys, or None.
        """
        where = self._get_queue_index(patch_idx)  # (1,)
        count = keys.shape[0]
        pointer = self.queue_ptr[where]  # (1,)
        # Compute the indices on the device. Reading the pointer would make the CPU wait for the device at every step.
        rows = (pointer + torch.arange(count, device=keys.device)) % self.K + where * self.K  # (world * B,) row indices
        self.queue.flatten(0, 1).index_copy_(0, rows, keys.to(self.queue.dtype))
        self.queue_ptr.index_copy_(0, where, (pointer + count) % self.K)
        self.steps += 1
        self.queue_step.flatten().index_copy_(0, rows, self.steps.expand(count))
        if subjects is not None:
            self.queue_subject.flatten().index_copy_(0, rows, subjects.to(torch.int32))

    def find_key_subjects_and_ages(self, patch_idx: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the subject and the age in steps of each key at a location, (K,) each; -1 if unknown."""
        where = self._get_queue_index(patch_idx)
        step = self.queue_step[where][0]  # (K,)
        return self.queue_subject[where][0], torch.where(step >= 0, self.steps + 1 - step, -1)

    def _get_queue_index(self, patch_idx: int | torch.Tensor) -> torch.Tensor:
        """Return the index of a location's queue as a (1,) tensor on the device of the queue.

        With a tensor index, a CUDA graph of the step works for every location.
        """
        where = torch.as_tensor(patch_idx, device=self.queue.device).reshape(1)
        return torch.zeros_like(where) if self.one_queue else where

    # ------------------------------------------------------------ on disk

    def export_key_subjects_and_steps(self) -> dict[str, Any]:
        """Return the subject and step of each key, (L, K) each, -1 if unknown, and the number of steps so far."""
        return {"subject": self.queue_subject, "step": self.queue_step, "steps": int(self.steps)}

    def restore_key_subjects_and_steps(self, exported_origins: dict[str, Any]) -> None:
        """Restore the subjects and steps of the keys from the result of :meth:`export_key_subjects_and_steps`."""
        self.queue_subject.copy_(exported_origins["subject"])
        self.queue_step.copy_(exported_origins["step"])
        self.steps.fill_(int(exported_origins["steps"]))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Save a view, because a copy of the queue would take 1.2 GB at the published sizes.
        destination[prefix + "queue"] = destination[prefix + "queue"].permute(2, 1, 0)  # (dim, K, L)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        key = prefix + "queue"
        on_disk = state_dict.get(key)
        if on_disk is not None and on_disk.dim() == 3:
            state_dict[key] = on_disk.permute(2, 1, 0)  # (L, K, dim)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if on_disk is not None:
            state_dict[key] = on_disk
