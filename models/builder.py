"""DrasCLR: momentum contrast with one queue per anatomical location and two tasks.

The patch task matches two views of the same patch. The neighbour task matches views of the k
nearest patches of the same subject with that patch's key. After MoCo v2 (He et al., CVPR 2020;
Chen et al., 2020) and DrasCLR (Yu et al., Medical Image Analysis 2024).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from misc import process


class DrasCLR(nn.Module):
    """Query encoder, momentum (key) encoder, and a queue of K keys for every location.

    Args:
        base_encoder: called as ``base_encoder(rep_dim=, moco_dim=, num_experts=, num_coordinates=)``.
        num_patch: L, the number of locations.
        rep_dim, moco_dim: sizes of the representation and of its projection.
        num_experts: experts per convolution.
        num_coordinates: 3-D points per location; only 1 is defined here.
        K: keys in each location's queue; a multiple of the batch over all ranks.
        m: momentum of the key encoder.
        T: softmax temperature.
        mlp: put a hidden layer before the projection (MoCo v2).
        bn_groups: groups of this rank's consecutive samples with BatchNorm statistics of their own, as the
            publication has one for each of its GPUs.
        negatives: ``queue``, as published, or ``batch``: the keys of the step's other subjects, over all ranks.
        mask_own: leave keys of the query's own subject out of the queue's negatives.
        one_queue: keys of all locations enter the first location's queue, and negatives are from there: what
            momentum contrast was before each location had a queue of its own.

    Attributes:
        probe: what the last step tells beside its logits; see :meth:`_look`.
        representation: h of the last step's patches, (B, rep_dim).
        keys_follow: whether the next step moves the key encoder; not where the query encoder has not moved since.

    Raises:
        ValueError: num_coordinates is not 1, or negatives is another word.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        num_patch: int,
        rep_dim: int,
        moco_dim: int,
        num_experts: int,
        num_coordinates: int,
        K: int,
        m: float,
        T: float,
        mlp: bool,
        bn_groups: int = 1,
        negatives: str = "queue",
        mask_own: bool = False,
        one_queue: bool = False,
    ):
        super().__init__()
        if num_coordinates != 1:
            raise ValueError(f"num_coordinates is {num_coordinates}; a location is one 3-D point, so it must be 1")
        self.K = K
        self.m = m
        self.T = T
        self.num_locs = num_patch
        if negatives not in ("queue", "batch"):
            raise ValueError(f"negatives is {negatives!r}; it must be queue or batch")
        self.negatives, self.mask_own, self.bn_groups = negatives, mask_own, bn_groups
        self.one_queue = one_queue
        self.probe: dict[str, torch.Tensor] = {}
        self.representation: torch.Tensor | None = None
        self.keys_follow = True

        sizes = dict(rep_dim=rep_dim, moco_dim=moco_dim, num_experts=num_experts, num_coordinates=num_coordinates)
        self.encoder_q = base_encoder(**sizes)
        self.encoder_k = base_encoder(**sizes)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                width = encoder.fc.in_features
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.encoder_q.bn_groups = self.encoder_k.bn_groups = bn_groups

        # (L, K, dim): a step touches one location, here one contiguous block. On disk the published
        # layout is (dim, K, L); the two hooks below turn one into the other.
        queue = torch.randn(num_patch, K, moco_dim)  # (L, K, dim)
        for keys in queue:  # in place, a location at a time: at published sizes a copy would be 1.2 GB
            F.normalize(keys, dim=1, out=keys)
        self.register_buffer("queue", queue)
        self.register_buffer("queue_ptr", torch.zeros(num_patch, dtype=torch.long))  # (L,)

        # Where the queue's keys are from: not in the published state dict, see queue_origin.
        self.steps = 0
        unknown = torch.full((num_patch, K), -1, dtype=torch.int32)  # (L, K)
        self.register_buffer("queue_subject", unknown, persistent=False)
        self.register_buffer("queue_step", unknown.clone(), persistent=False)

    # ------------------------------------------------------------ state dict, in the disk layout

    def queue_origin(self) -> dict[str, Any]:
        """Subject and step that each key is from, -1 where unknown, (L, K) each; and the steps so far."""
        return {"subject": self.queue_subject, "step": self.queue_step, "steps": self.steps}

    def load_queue_origin(self, origin: dict[str, Any]) -> None:
        """The inverse of :meth:`queue_origin`."""
        self.queue_subject.copy_(origin["subject"])
        self.queue_step.copy_(origin["step"])
        self.steps = int(origin["steps"])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A view, as every other entry: at published sizes a copy would be 1.2 GB.
        destination[prefix + "queue"] = destination[prefix + "queue"].permute(2, 1, 0)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        key = prefix + "queue"
        on_disk = state_dict.get(key)
        if on_disk is not None and on_disk.dim() == 3:
            state_dict[key] = on_disk.permute(2, 1, 0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if on_disk is not None:
            state_dict[key] = on_disk

    # ------------------------------------------------------------ parts of a step

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """key parameters <- m * key + (1 - m) * query (MoCo, equation 2); buffers are left alone."""
        keys = list(self.encoder_k.parameters())
        queries = list(self.encoder_q.parameters())
        torch._foreach_mul_(keys, self.m)
        torch._foreach_add_(keys, queries, alpha=1.0 - self.m)

    @torch.no_grad()
    def _encode_keys(self, patches: torch.Tensor, locs: torch.Tensor) -> torch.Tensor:
        """Keys of all ranks in rank order: (B, 1, 32, 32, 32) on each rank -> (world * B, dim).

        Shuffled BatchNorm (MoCo, section 3.3): every group encodes a random share of the whole batch,
        so that a query and its key do not share BatchNorm statistics. With one group the statistics
        do not depend on the order, and nothing is moved.
        """
        world, rank = process.world_size(), process.rank()
        batch = patches.shape[0]
        if world * self.bn_groups == 1:
            return F.normalize(self.encoder_k(patches, locs)[0], dim=1)  # (B, dim)

        order = torch.randperm(world * batch, device=patches.device)  # (world * B,)
        if world > 1:
            torch.distributed.broadcast(order, src=0)
        mine = order.view(world, batch)[rank]  # (B,) samples of the whole batch
        patches = process.all_gather_rows(patches)[mine]  # (B, 1, 32, 32, 32)
        if locs.shape[0] == batch:  # one location per sample travels with its patch
            locs = process.all_gather_rows(locs)[mine]  # (B, 3)
        keys = F.normalize(self.encoder_k(patches, locs)[0], dim=1)  # (B, dim)
        shuffled = process.all_gather_rows(keys)  # (world * B, dim), row i is sample order[i]
        return shuffled[torch.argsort(order)]  # (world * B, dim), row i is sample i

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor, patch_idx: int, subjects: torch.Tensor | None) -> None:
        """Replace the oldest keys of one location. keys: (world * B, dim); subjects: (world * B,) or none."""
        count = keys.shape[0]
        pointer = self.queue_ptr[patch_idx]  # ()
        # Indices are computed on the device: reading the pointer would wait for it at every step.
        rows = (pointer + torch.arange(count, device=keys.device)) % self.K  # (world * B,)
        self.queue[patch_idx].index_copy_(0, rows, keys.to(self.queue.dtype))
        self.queue_ptr[patch_idx] = (pointer + count) % self.K
        self.steps += 1
        self.queue_step[patch_idx].index_fill_(0, rows, self.steps)
        if subjects is not None:
            self.queue_subject[patch_idx].index_copy_(0, rows, subjects.to(torch.int32))

    @torch.no_grad()
    def _look(
        self, patch_idx: int, query: torch.Tensor, all_keys: torch.Tensor, own: torch.Tensor, mine: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What no queue can flatter, of one step, each a number on the device.

        Args:
            query: (B, dim), normalised.
            all_keys: (world * B, dim), normalised.
            own: (B,) row of each query's key in all_keys.
            mine: (B,) subjects of the queries, or none.

        Returns:
            accuracy_fresh: % of queries whose own key is the nearest of this step's keys, all as old as each other.
            alignment: mean squared distance of query and key; uniformity: log of the mean Gaussian potential of
            pairs of keys (Wang and Isola, 2020).
            queue_own: % of the location's queue that is keys of the query's own subject.
            queue_age: mean age of the location's keys, in steps, of those whose age is known.
        """
        total = all_keys.shape[0]
        nearest = (query @ all_keys.t()).argmax(dim=1)  # (B,)
        squared = 2 - 2 * (all_keys @ all_keys.t())  # (total, total)
        potential = torch.exp(-2 * squared)
        pairs = (potential.sum() - potential.diagonal().sum()) / max(1, total * (total - 1))
        steps = self.queue_step[patch_idx]  # (K,)
        known = steps >= 0
        age = ((self.steps + 1 - steps) * known).sum() / known.sum().clamp(min=1)
        shared = query.new_zeros(())
        if mine is not None:
            shared = 100 * (self.queue_subject[patch_idx][None] == mine[:, None]).float().mean()  # (B, K) -> ()
        return {
            "accuracy_fresh": 100 * (nearest == own).float().mean(),
            "alignment": (query - all_keys[own]).square().sum(dim=1).mean(),
            "uniformity": pairs.log(),
            "queue_own": shared,
            "queue_age": age.float(),
        }

    def _check(self, batch: int, query_loc, key_loc, neighbor_loc, subjects: torch.Tensor | None) -> None:
        """Raise ValueError where a step's inputs do not go together."""
        for name, locs in (("pch_q", query_loc), ("pch_k", key_loc), ("ngb_q", neighbor_loc)):
            if locs.shape[0] not in (1, batch):
                raise ValueError(f"{name} has {locs.shape[0]} location rows for a batch of {batch}; give 1 or {batch}")
        total = batch * process.world_size()
        if self.K % total:
            raise ValueError(f"the queue of K = {self.K} keys is not a multiple of the batch of {total} over all ranks")
        if batch % self.bn_groups:
            raise ValueError(f"{self.bn_groups} BatchNorm groups do not divide a batch of {batch}")
        if self.mask_own and subjects is None:
            raise ValueError("mask_own needs the batch's subjects")

    def forward(
        self,
        patch_idx: int,
        pch_q: Sequence[torch.Tensor],
        pch_k: Sequence[torch.Tensor],
        ngb_q: Sequence[torch.Tensor],
        subjects: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step: encode, compare with the queue, update the queue and the key encoder.

        All of it happens in ``eval()`` too. Inputs are not modified.

        Args:
            patch_idx: index l of the location that the whole batch shares.
            pch_q: first view (B, 1, 32, 32, 32) and its locations, (1, 3) or (B, 3).
            pch_k: second view of the same patches, likewise.
            ngb_q: one view of the k neighbours (B, k, 32, 32, 32) and their locations, (1, k, 3) or
                (B, k, 3). One row for the whole batch is the fast path: kernels are mixed once.
            subjects: (B,) numbers of the subjects, to know whose keys the queue holds.

        Returns:
            logits_pch and logits_ngb (B, 1 + K), or (B, world * B) with negatives of the batch; labels (B,), all
            zero: column 0 is the key.

        Raises:
            ValueError: a location tensor has neither 1 nor B rows, K is not a multiple of the batch over all
                ranks, bn_groups does not divide the batch, or mask_own has no subjects.
        """
        (query_patch, query_loc), (key_patch, key_loc), (neighbor_patch, neighbor_loc) = pch_q, pch_k, ngb_q
        batch, k = neighbor_patch.shape[:2]
        self._check(batch, query_loc, key_loc, neighbor_loc, subjects)
        if self.one_queue:
            patch_idx = 0  # of the queue; where the patches are from, their locations tell

        # -------- queries: patches and neighbours in two BatchNorm passes
        z, h = self.encoder_q(query_patch, query_loc)  # (B, dim), (B, rep_dim)
        self.representation = h.detach()
        query = F.normalize(z, dim=1)  # (B, dim)
        if neighbor_loc.shape[0] == 1:
            # Location-major, so that block j of B samples shares the kernel of neighbour j.
            # BatchNorm does not mind the order.
            flat = neighbor_patch.transpose(0, 1).reshape(k * batch, 1, *neighbor_patch.shape[2:])  # (k B, 1, 32, ...)
            neighbors = self.encoder_q(flat, neighbor_loc[0])[0]  # (k B, dim)
            neighbors = neighbors.view(k, batch, -1).transpose(0, 1)  # (B, k, dim)
        else:
            flat = neighbor_patch.reshape(batch * k, 1, *neighbor_patch.shape[2:])  # (B k, 1, 32, ...)
            neighbors = self.encoder_q(flat, neighbor_loc.reshape(batch * k, 3))[0]  # (B k, dim)
            neighbors = neighbors.view(batch, k, -1)  # (B, k, dim)
        neighbors = F.normalize(neighbors, dim=2)  # (B, k, dim)

        # -------- keys: momentum first, then the pass
        if self.keys_follow:
            self._update_key_encoder()
        all_keys = self._encode_keys(key_patch, key_loc)  # (world * B, dim)
        own = process.rank() * batch + torch.arange(batch, device=query.device)  # (B,) rows of all_keys

        # -------- logits, with the queue as it was before this step's keys
        with torch.autocast(query.device.type, enabled=False):
            neighbor_sum = neighbors.sum(dim=1)  # (B, dim); sum over k of r . x = (sum over k of r) . x
            if self.negatives == "batch":
                logits_pch = self._logits_in_batch(query, all_keys, own)  # (B, world * B)
                logits_ngb = self._logits_in_batch(neighbor_sum, all_keys, own)  # (B, world * B)
            else:
                # Cloned, because the backward pass needs it after the queue has moved on.
                negatives = self.queue[patch_idx].clone()  # (K, dim)
                masked = None
                if self.mask_own:
                    masked = self.queue_subject[patch_idx][None] == subjects[:, None]  # (B, K)
                logits_pch = self._logits(query, all_keys[own], negatives, masked)  # (B, 1 + K)
                logits_ngb = self._logits(neighbor_sum, all_keys[own], negatives, masked)  # (B, 1 + K)
            self.probe = self._look(patch_idx, query.detach(), all_keys, own, subjects)
        labels = torch.zeros(batch, dtype=torch.long, device=query.device)  # (B,)

        self._enqueue(all_keys, patch_idx, None if subjects is None else process.all_gather_rows(subjects))
        return logits_pch, logits_ngb, labels

    def _logits(
        self, query: torch.Tensor, key: torch.Tensor, negatives: torch.Tensor, masked: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[query . key, query . negatives] / T: (B, dim), (B, dim), (K, dim) -> (B, 1 + K); -inf where masked."""
        positive = (query * key).sum(dim=1, keepdim=True)  # (B, 1)
        similarity = query @ negatives.t()  # (B, K)
        if masked is not None:
            similarity = similarity.masked_fill(masked, -torch.inf)
        return torch.cat([positive, similarity], dim=1) / self.T

    def _logits_in_batch(self, query: torch.Tensor, all_keys: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """[query . own key, query . the others' keys] / T: (B, dim), (n, dim), (B,) -> (B, n)."""
        total = all_keys.shape[0]
        order = (own[:, None] + torch.arange(total, device=own.device)) % total  # (B, n), each row's own key first
        return (query @ all_keys.t()).gather(1, order) / self.T
