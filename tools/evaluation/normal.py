"""What is usual of healthy patients' patches, and how far a patch is from it."""

import numpy as np

FOLDS = 5
ENOUGH = 20000  # deviations that a covariance is estimated from
FEWEST = 10  # healthy patients
LOCATIONS_AT_ONCE = 16  # so that features mapped from the disk need not fit into memory


class Normal:
    """A normal density of a patch's features: a mean for each place, one covariance for all.

    The covariance is shrunk to the sphere as Ledoit and Wolf (2004) choose, so few patients suffice.

    Args:
        features: (N, L, D) of patients' patches, in memory or mapped from the disk.
        rows: (n,) of the healthy patients, whom the density is fitted to.
        seed: of the choice of deviations where there are more than enough.
    """

    def __init__(self, features: np.ndarray, rows: np.ndarray, seed: int = 0):
        from sklearn.covariance import ledoit_wolf

        _, locations, width = features.shape
        self.mean = np.zeros((locations, width))  # (L, D)
        for part in parts(locations):
            self.mean[part] = np.asarray(features[rows, part], dtype=np.float64).mean(axis=0)
        pairs = np.arange(len(rows) * locations)
        if len(pairs) > ENOUGH:
            pairs = np.sort(np.random.default_rng(seed).choice(pairs, ENOUGH, replace=False))
        places = pairs % locations
        deviations = np.asarray(features[rows[pairs // locations], places], dtype=np.float64) - self.mean[places]
        scale = deviations.std(axis=0)
        self.factor = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-12)  # (D,)
        covariance, _ = ledoit_wolf(deviations * self.factor, assume_centered=True)
        self.root = np.linalg.cholesky(np.linalg.inv(covariance + 1e-9 * np.eye(width)))  # (D, D)

    def score(self, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance over D, about 1 for what is usual: (N, L, D), (n,) rows of it -> (n, L)."""
        scores = np.zeros((len(rows), features.shape[1]))
        for part in parts(features.shape[1]):
            deviations = np.asarray(features[rows, part], dtype=np.float64) - self.mean[part]
            scores[:, part] = np.square(deviations * self.factor @ self.root).mean(axis=2)
        return scores


def parts(locations: int) -> list[slice]:
    """Some locations at a time."""
    return [slice(start, start + LOCATIONS_AT_ONCE) for start in range(0, locations, LOCATIONS_AT_ONCE)]


def unusual(features: np.ndarray, healthy: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scores of every patch, (N, L, D) and (N,) bool -> (N, L).

    A healthy patient is scored by the density of other healthy ones, else he would look more usual than a new one.
    The others are scored by the mean of those densities, so that both are held against as many patients.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(healthy))
    others = np.flatnonzero(~healthy)
    scores = np.zeros(features.shape[:2])
    for own in np.array_split(rows, FOLDS):
        density = Normal(features, np.setdiff1d(rows, own), seed)
        scores[own] = density.score(features, own)
        scores[others] += density.score(features, others) / FOLDS
    return scores
