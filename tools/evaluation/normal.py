"""What is usual of healthy patients' patches, and how far a patch is from it."""

import numpy as np

FOLDS = 5
ENOUGH = 20000  # deviations that a covariance is estimated from
FEWEST = 10  # healthy patients


class Normal:
    """A normal density of a patch's features: a mean for each place, one covariance for all.

    The covariance is shrunk to the sphere as Ledoit and Wolf (2004) choose, so few patients suffice.

    Args:
        features: (n, L, D) of healthy patients' patches.
    """

    def __init__(self, features: np.ndarray, seed: int = 0):
        from sklearn.covariance import ledoit_wolf

        self.mean = features.mean(axis=0)  # (L, D)
        deviations = (features - self.mean).reshape(-1, features.shape[2])
        if len(deviations) > ENOUGH:
            deviations = np.random.default_rng(seed).choice(deviations, ENOUGH, replace=False)
        scale = deviations.std(axis=0)
        self.factor = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-12)  # (D,)
        covariance, _ = ledoit_wolf(deviations * self.factor, assume_centered=True)
        self.root = np.linalg.cholesky(np.linalg.inv(covariance + 1e-9 * np.eye(len(covariance))))  # (D, D)

    def score(self, features: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance over D, about 1 for what is usual: (n, L, D) -> (n, L)."""
        return np.square((features - self.mean) * self.factor @ self.root).mean(axis=2)


def unusual(features: np.ndarray, healthy: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scores of every patch, (N, L, D) and (N,) bool -> (N, L).

    A healthy patient is scored by the density of other healthy ones, else he would look more usual than a new one.
    The others are scored by the mean of those densities, so that both are held against as many patients.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(healthy))
    scores = np.zeros(features.shape[:2])
    for part in np.array_split(rows, FOLDS):
        density = Normal(features[np.setdiff1d(rows, part)], seed)
        scores[part] = density.score(features[part])
        scores[~healthy] += density.score(features[~healthy]) / FOLDS
    return scores
