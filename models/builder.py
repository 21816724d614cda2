"""DrasCLR: momentum contrast with one queue per anatomical location and two tasks.

The patch task matches two views of the same patch. The neighbour task matches the key of a patch with views of
its k nearest neighbours in the same subject. The method follows MoCo v2 (He et al., CVPR 2020; Chen et al., 2020)
and DrasCLR (Yu et al., Medical Image Analysis 2024).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from misc import process
from models.cnn3d import Encoder
from models.probe import compute_step_statistics
from models.queue import KeyQueues


class Step(NamedTuple):
    """Results of :meth:`DrasCLR.step`."""

    logits_pch: torch.Tensor  # (B, 1 + K), or (B, world * B) with negatives="batch"
    logits_ngb: torch.Tensor | None  # same shape as logits_pch; None without neighbours
    labels: torch.Tensor  # (B,), all zero: column 0 is the positive key
    representation: torch.Tensor  # (B, rep_dim), h of the patches, detached
    statistics: dict[str, torch.Tensor]  # from models.probe.compute_step_statistics


class DrasCLR(KeyQueues):
    """Query encoder, momentum (key) encoder, and one queue of K keys for every location.

    Args:
        base_encoder: class of the encoder, called as
            ``base_encoder(rep_dim=, moco_dim=, num_experts=, num_coordinates=)``.
        num_patch: L, the number of locations.
        rep_dim, moco_dim: sizes of the representation and of its projection.
        num_experts: experts per convolution.
        num_coordinates: 3-D points per location; must be 1.
        K: number of keys in each location's queue; a multiple of the batch size over all ranks.
        m: momentum of the key encoder.
        T: softmax temperature.
        mlp: put a hidden layer before the projection (MoCo v2).
        bn_groups: number of groups of consecutive samples on this rank; each group has its own BatchNorm
            statistics. The publication used one BatchNorm group per GPU.
        negatives, mask_own, one_queue: unpublished variants; see :meth:`KeyQueues.make_queues`.

    Raises:
        ValueError: num_coordinates is not 1, or ``negatives`` has an unknown value.
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
            raise ValueError(f"num_coordinates is {num_coordinates}; it must be 1, that is, one 3-D point per location")
        self.m, self.T, self.num_locs, self.bn_groups = m, T, num_patch, bn_groups

        sizes = dict(rep_dim=rep_dim, moco_dim=moco_dim, num_experts=num_experts, num_coordinates=num_coordinates)
        self.encoder_q = base_encoder(**sizes)
        self.encoder_k = base_encoder(**sizes)
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.bn_groups = bn_groups
            if mlp:
                width = encoder.fc.in_features
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.make_queues(num_patch, K, moco_dim, negatives, mask_own, one_queue)

    def forward(
        self,
        patch_idx: int,
        pch_q: Sequence[torch.Tensor],
        pch_k: Sequence[torch.Tensor],
        ngb_q: Sequence[torch.Tensor] | None,
        subjects: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Run :meth:`step` and return only its logits and labels."""
        return self.step(patch_idx, pch_q, pch_k, ngb_q, subjects)[:3]

    def step(
        self,
        patch_idx: int | torch.Tensor,
        pch_q: Sequence[torch.Tensor],
        pch_k: Sequence[torch.Tensor],
        ngb_q: Sequence[torch.Tensor] | None,
        subjects: torch.Tensor | None = None,
        move_keys: bool = True,
    ) -> Step:
        """Encode the views, compare them with the queue, and update the queue and the key encoder.

        ``eval()`` does not switch off the updates of the queue and the key encoder. Inputs are not modified.

        Args:
            patch_idx: index l of the location that the whole batch shares, as an int or as a (1,) tensor on the device.
            pch_q: first view of the patches (B, 1, 32, 32, 32) and their locations, (1, 3) or (B, 3).
            pch_k: second view of the same patches and their locations, with the shapes of ``pch_q``.
            ngb_q: one view of each of the k neighbours (B, k, 32, 32, 32) and their locations, (1, k, 3) or (B, k, 3).
                If ngb_q is None, the neighbour task is left out. A location tensor with one row for the whole batch is
                faster, because each kernel is mixed only once.
            subjects: (B,) row numbers of the subjects, stored in the queue with their keys.
            move_keys: whether to update the key encoder; False if the query encoder has not changed since the last
                step.

        Raises:
            ValueError: a location tensor has neither 1 nor B rows, or K is not a multiple of the batch size over all
                ranks. ValueError is also raised if bn_groups does not divide the batch size, or if mask_own is set
                without subjects.
        """
        (query_patch, query_loc), (key_patch, key_loc) = pch_q, pch_k
        batch = query_patch.shape[0]
        self._check_inputs(batch, {"pch_q": pch_q, "pch_k": pch_k, "ngb_q": ngb_q}, subjects)

        # -------- queries: patches and neighbours, in two separate BatchNorm passes
        z, h, z_neighbors = self._encode_queries(query_patch, query_loc, ngb_q)  # (B, dim), (B, rep_dim), (B, k, dim)
        queries = [F.normalize(z, dim=1)]  # (B, dim)
        neighbors = None if z_neighbors is None else F.normalize(z_neighbors, dim=2)  # (B, k, dim)

        # -------- keys: update the key encoder first, then encode with it
        if move_keys:
            self._update_key_encoder()
        keys = self._encode_keys(key_patch, key_loc)  # (world * B, dim)
        own = process.rank() * batch + torch.arange(batch, device=z.device)  # (B,) rows of this rank's keys

        # -------- logits: compare with the queue before adding this step's keys
        with torch.autocast(z.device.type, enabled=False):
            if neighbors is not None:
                queries.append(neighbors.sum(dim=1))  # (B, dim); the similarity to a key is summed over neighbours
            logits = [
                similarity / self.T for similarity in self.compute_similarities(queries, keys, own, patch_idx, subjects)
            ]
            statistics = compute_step_statistics(
                queries[0], keys, own, subjects, *self.find_key_subjects_and_ages(patch_idx)
            )
        labels = torch.zeros(batch, dtype=torch.long, device=z.device)  # (B,)

        self.enqueue(keys, patch_idx, None if subjects is None else process.all_gather_rows(subjects))
        logits_ngb = None if neighbors is None else logits[1]
        return Step(logits[0], logits_ngb, labels, h.detach(), statistics)

    def _encode_queries(
        self, patch: torch.Tensor, loc: torch.Tensor, ngb_q: Sequence[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Encode the patches, and then all their neighbours in a second pass with separate BatchNorm statistics.

        Returns:
            z (B, dim) and h (B, rep_dim) of the patches; z (B, k, dim) of the neighbours, or None.
        """
        if ngb_q is None:
            return *self.encoder_q(patch, loc), None
        neighbors, near = ngb_q  # (B, k, 32, 32, 32), (1 or B, k, 3)
        batch, k = neighbors.shape[:2]
        shared = near.shape[0] == 1  # whether all samples have the same neighbour locations
        if shared:
            # Order the patches by location, so that the B patches of a neighbour location form a block with one kernel.
            # The order of the patches makes no difference to BatchNorm.
            near, order = near[0], neighbors.transpose(0, 1)  # (k, 3), (k, B, 32, 32, 32)
        else:
            near, order = near.reshape(batch * k, 3), neighbors  # (B k, 3), (B, k, 32, 32, 32)
        flat = order.reshape(batch * k, 1, *order.shape[2:])  # (k B or B k, 1, 32, 32, 32)
        kernels = near_kernels = ()
        if isinstance(self.encoder_q, Encoder):  # compute the mixed kernels of both passes in one call
            mixed = self.encoder_q.mix_kernels(torch.cat([loc, near]))
            kernels, near_kernels = zip(*(kernel.split([len(loc), len(near)]) for kernel in mixed))
        z, h = self.encoder_q(patch, loc, *kernels)  # (B, dim), (B, rep_dim)
        z_near = self.encoder_q(flat, near, *near_kernels)[0].view(*order.shape[:2], -1)
        return z, h, z_near.transpose(0, 1) if shared else z_near  # (B, k, dim)

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """Set key parameters to m * key + (1 - m) * query (MoCo, equation 2). Buffers do not change."""
        keys = list(self.encoder_k.parameters())
        queries = list(self.encoder_q.parameters())
        torch._foreach_mul_(keys, self.m)
        torch._foreach_add_(keys, queries, alpha=1.0 - self.m)

    @torch.no_grad()
    def _encode_keys(self, patches: torch.Tensor, locs: torch.Tensor) -> torch.Tensor:
        """Encode the keys of all ranks: (B, 1, 32, 32, 32) on each rank -> (world * B, dim) in rank order.

        Shuffled BatchNorm (MoCo, section 3.3): every group encodes a random part of the whole batch,
        so that a query and its key do not share BatchNorm statistics. With one BatchNorm group, the patches are not
        shuffled, because their order does not affect the statistics.
        """
        world, rank = process.world_size(), process.rank()
        batch = patches.shape[0]
        if world * self.bn_groups == 1:
            return F.normalize(self.encoder_k(patches, locs)[0], dim=1)  # (B, dim)

        order = torch.randperm(world * batch, device=patches.device)  # (world * B,)
        if world > 1:
            torch.distributed.broadcast(order, src=0)
        mine = order.view(world, batch)[rank]  # (B,) indices into the whole batch
        patches = process.all_gather_rows(patches)[mine]  # (B, 1, 32, 32, 32)
        if locs.shape[0] == batch:  # with one location per sample, shuffle the locations with the patches
            locs = process.all_gather_rows(locs)[mine]  # (B, 3)
        keys = F.normalize(self.encoder_k(patches, locs)[0], dim=1)  # (B, dim)
        shuffled = process.all_gather_rows(keys)  # (world * B, dim), row i is sample order[i]
        return shuffled[torch.argsort(order)]  # (world * B, dim), row i is sample i

    def _check_inputs(
        self, batch: int, views: dict[str, Sequence[torch.Tensor] | None], subjects: torch.Tensor | None
    ) -> None:
        """Raise ValueError if the sizes of a step's inputs are inconsistent, or if required subjects are missing."""
        for name, view in views.items():
            if view is not None and view[1].shape[0] not in (1, batch):
                raise ValueError(
                    f"{name} has {view[1].shape[0]} location rows for a batch of {batch}; pass 1 or {batch} rows"
                )
        total = batch * process.world_size()
        if self.K % total:
            raise ValueError(
                f"the queue size K = {self.K} is not a multiple of the batch of {total} samples over all ranks"
            )
        if batch % self.bn_groups:
            raise ValueError(
                f"a batch of {batch} samples cannot be divided into {self.bn_groups} equal BatchNorm groups"
            )
        if self.mask_own and subjects is None:
            raise ValueError("mask_own is set, but no subjects are given; pass the subjects of the batch")
