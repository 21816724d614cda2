"""The normal distribution of patch features in healthy subjects, and scores of how unusual a patch is."""

import numpy as np

FOLDS = 5
ENOUGH = 20000  # maximum number of patches from which the covariance is estimated
FEWEST = 10  # minimum number of healthy subjects
LOCATIONS_AT_ONCE = 16  # locations read at once, so that a memory-mapped file may be larger than the memory


class HealthyDensity:
    """A normal distribution of patch features, with one mean per location and one covariance for all locations.

    The covariance is shrunk towards the identity by the method of Ledoit and Wolf (2004), so that few subjects suffice.

    Args:
        features: (N, L, D) patch features, in memory or memory-mapped.
        healthy_rows: (n,) rows of the healthy subjects that the distribution is fitted to.
        seed: random seed for drawing ENOUGH patches; used only if the healthy subjects have more than ENOUGH.
    """

    def __init__(self, features: np.ndarray, healthy_rows: np.ndarray, seed: int = 0):
        from sklearn.covariance import ledoit_wolf

        _, locations, width = features.shape
        self.mean = np.zeros((locations, width))  # (L, D)
        for part in split_locations_into_chunks(locations):
            self.mean[part] = np.asarray(features[healthy_rows, part], dtype=np.float64).mean(axis=0)
        pairs = np.arange(len(healthy_rows) * locations)
        if len(pairs) > ENOUGH:
            pairs = np.sort(np.random.default_rng(seed).choice(pairs, ENOUGH, replace=False))
        places = pairs % locations
        deviations = (
            np.asarray(features[healthy_rows[pairs // locations], places], dtype=np.float64) - self.mean[places]
        )
        scale = deviations.std(axis=0)
        self.factor = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-12)  # (D,)
        covariance, _ = ledoit_wolf(deviations * self.factor, assume_centered=True)
        self.root = np.linalg.cholesky(np.linalg.inv(covariance + 1e-9 * np.eye(width)))  # (D, D)

    def score_by_mahalanobis_distance(self, features: np.ndarray, subject_rows: np.ndarray) -> np.ndarray:
        """Score the given rows by squared Mahalanobis distance / D: (N, L, D), (n,) -> (n, L).

        The score is about 1 for typical patches.
        """
        scores = np.zeros((len(subject_rows), features.shape[1]))
        for part in split_locations_into_chunks(features.shape[1]):
            deviations = np.asarray(features[subject_rows, part], dtype=np.float64) - self.mean[part]
            scores[:, part] = np.square(deviations * self.factor @ self.root).mean(axis=2)
        return scores


def split_locations_into_chunks(num_locations: int) -> list[slice]:
    """Split the locations into slices of LOCATIONS_AT_ONCE locations."""
    return [slice(start, start + LOCATIONS_AT_ONCE) for start in range(0, num_locations, LOCATIONS_AT_ONCE)]


def score_patch_abnormality(features: np.ndarray, healthy: np.ndarray, seed: int = 0) -> np.ndarray:
    """Score every patch: features (N, L, D) and healthy (N,) bool -> (N, L).

    The distribution that scores a healthy subject is fitted to other healthy subjects, because a distribution gives
    lower scores to the subjects it was fitted to. Subjects who are not healthy get the mean score over the
    distributions of all folds. In every fold, the distribution is fitted to about the same number of healthy subjects.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(healthy))
    others = np.flatnonzero(~healthy)
    scores = np.zeros(features.shape[:2])
    for own in np.array_split(rows, FOLDS):
        density = HealthyDensity(features, np.setdiff1d(rows, own), seed)
        scores[own] = density.score_by_mahalanobis_distance(features, own)
        scores[others] += density.score_by_mahalanobis_distance(features, others) / FOLDS
    return scores
