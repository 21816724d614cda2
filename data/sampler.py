"""Choose the location and the subjects of each training step."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.layout import StoreError

JITTER = 0.5  # standard deviation of the noise added to each subject's score, so that batches vary
VISIT_STEPS = 4  # number of consecutive steps at a location, with --location-order interleaved


class BatchIndex(NamedTuple):
    """Identifies the batch of one rank in one step.

    The index includes the location, so that any data-loader worker can read the patches.
    """

    epoch: int
    location: int
    step: int  # index within the location
    rows: np.ndarray  # (batch per rank,) row numbers in the store


class LocationBatchSampler:
    """Batches of an epoch: floor(N / B) steps at each location, over shuffled subjects.

    The order of subjects depends only on (seed, epoch, location). Each rank takes consecutive subjects among the
    B subjects of a step. Two ranks never take the same subject in a step, and all ranks are at the same location.

    Args:
        num_subjects: N.
        num_locations: L.
        batch_size: B, the number of subjects per step over all ranks.
        seed: seed of the shuffle.
        rank, world_size: number of this process, and number of processes.
        similarity: (N, C) numbers that describe how subjects were scanned, NaN where unknown. A
            random direction is drawn for each epoch and location, and the subjects of a step have similar projections
            of their numbers onto this direction. If ``similarity`` is None, the subjects of a step are drawn at random.
        order: ``sequential``, as published, takes all steps at a location before the next location. ``interleaved``
            takes a few steps at each location in turn, so that the keys in each queue are less outdated.

    Raises:
        StoreError: B exceeds N, is not a multiple of the number of ranks, or leaves a rank with fewer than 2
            samples, which is too few for BatchNorm statistics.
    """

    def __init__(
        self,
        num_subjects: int,
        num_locations: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        order: str = "sequential",
        similarity: np.ndarray | None = None,
    ):
        if batch_size < 1 or batch_size % world_size:
            raise StoreError(
                f"--batch-size {batch_size} counts samples over all ranks and must be a multiple of the "
                f"number of ranks, {world_size}"
            )
        if batch_size // world_size < 2:
            raise StoreError(
                f"--batch-size {batch_size} on {world_size} rank(s) gives a batch of {batch_size // world_size} per "
                "rank, but BatchNorm needs at least 2 samples; use a larger batch or fewer ranks"
            )
        if batch_size > num_subjects:
            most = num_subjects // world_size * world_size
            advice = (
                f"use --batch-size {most} or less"
                if most >= 2 * world_size
                else f"{world_size} ranks need at least {2 * world_size} subjects"
            )
            raise StoreError(
                f"--batch-size {batch_size} exceeds the {num_subjects} subjects of the store, but no subject may "
                f"occur twice in a step; {advice}"
            )
        self.num_subjects = num_subjects
        self.num_locations = num_locations
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.order = order
        self.similarity = similarity
        self.epoch = 0
        self.skip = 0

    @property
    def steps_per_location(self) -> int:
        return self.num_subjects // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_location * self.num_locations

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch to iterate over; ``epoch`` is the number of finished epochs.

        The first ``skip`` steps, which an interrupted run has completed, are skipped, but ``len`` still counts them.
        """
        self.epoch = epoch
        self.skip = skip

    def iterate_locations_and_steps(self) -> Iterator[tuple[int, int]]:
        """Yield (location, step within the location) for each step of an epoch, in order."""
        steps = self.steps_per_location
        length = steps if self.order == "sequential" else VISIT_STEPS
        for start in range(0, steps, max(1, length)):
            for location in range(self.num_locations):
                for step in range(start, min(start + length, steps)):
                    yield location, step

    def __iter__(self) -> Iterator[BatchIndex]:
        share = self.batch_size // self.world_size
        permutation = functools.lru_cache(maxsize=2)(self.draw_permutation)
        for location, step in itertools.islice(self.iterate_locations_and_steps(), self.skip, None):
            start = step * self.batch_size + self.rank * share
            yield BatchIndex(self.epoch, location, step, permutation(location)[start : start + share])

    def draw_permutation(self, location: int) -> np.ndarray:
        """Draw the order of subjects at a location, (N,)."""
        rng = np.random.default_rng([self.seed, self.epoch, location])
        order = rng.permutation(self.num_subjects)
        if self.similarity is None:
            return order
        # Choose the subjects beyond the last full batch at random, not by their similarity scores.
        used = self.steps_per_location * self.batch_size
        batches = order[:used][
            np.argsort(self.project_similarity_on_random_axis(rng)[order[:used]], kind="stable")
        ].reshape(-1, self.batch_size)
        batches = rng.permuted(batches, axis=1)[rng.permutation(len(batches))]
        return np.concatenate([batches.ravel(), order[used:]])

    def project_similarity_on_random_axis(self, rng: np.random.Generator) -> np.ndarray:
        """Project the subjects' similarity values onto a random direction and add noise: scores (N,)."""
        known = ~np.isnan(self.similarity)  # (N, C)
        direction = rng.normal(size=self.similarity.shape[1])
        length = np.sqrt((known * direction**2).sum(axis=1))  # (N,), 0 for subjects without values
        along = (np.where(known, self.similarity, 0) * direction).sum(axis=1)
        along = np.divide(along, length, out=rng.normal(size=len(along)), where=length > 0)
        return along + JITTER * rng.normal(size=len(along))
