"""Compute the numbers of the explore page: maps, nearest subjects, and predictive or unusual locations."""

from collections.abc import Callable

import numpy as np

from tools.evaluation.metrics import r2
from tools.evaluation.normal import score_patch_abnormality, split_locations_into_chunks

FOLDS = 5
PENALTIES = (0.01, 0.1, 1.0, 10.0)  # ridge penalties per training subject, for features with SD 1
FEWEST = 20  # minimum number of subjects with a label


def standardize_features(features: np.ndarray) -> np.ndarray:
    """Standardise features (N, D) to mean 0 and SD 1. Constant features become 0."""
    scale = features.std(axis=0)
    return np.divide(features - features.mean(axis=0), scale, out=np.zeros_like(features), where=scale > 1e-9)


def project_subjects(features: np.ndarray, tsne: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Map subjects to two dimensions, (N, 2) float32, by PCA and, if ``tsne``, also by t-SNE.

    Args:
        features: (N, D), standardised.
        tsne: whether to compute t-SNE.
        seed: random seed.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    found = {"PCA": PCA(2, random_state=seed).fit_transform(features)}
    if tsne:
        perplexity = min(30, (len(features) - 1) / 3)
        found["t-SNE"] = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return {name: places.astype(np.float32) for name, places in found.items()}


def find_nearest_subjects(features: np.ndarray, neighbor_count: int) -> np.ndarray:
    """Find the nearest other subjects: standardised features (N, D) -> rows (N, count), nearest first."""
    from sklearn.neighbors import NearestNeighbors

    rows = NearestNeighbors(n_neighbors=neighbor_count + 1).fit(features).kneighbors(features, return_distance=False)
    own = np.arange(len(features))[:, None]
    # Drop the subject itself, which is not always the first neighbour if several subjects have equal features.
    order = np.argsort(rows == own, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)[:, :neighbor_count]


def compute_location_importance(
    features: np.ndarray, target: np.ndarray, report_progress: Callable[[int], None] = lambda _: None, seed: int = 0
) -> np.ndarray:
    """Compute how well each location alone predicts a label: R² of a 5-fold cross-validated ridge regression.

    All locations use the same penalty, the one with the best mean R² (values below 0 count as 0). Choosing one penalty
    for all locations hardly inflates the R² of a single location.

    Args:
        features: (N, L, D).
        target: (N,) values of the label, NaN where unknown.
        report_progress: called after every few locations with the number of locations finished since the last call.
        seed: random seed of the folds.

    Returns:
        R² of each location, (L,); all NaN if fewer than 20 subjects have a label or if all labels are equal.
    """
    known = np.flatnonzero(~np.isnan(target))
    found = np.full((len(PENALTIES), features.shape[1]), np.nan)
    if len(known) < FEWEST or np.ptp(target[known]) == 0:
        return found[0]
    y = target[known].astype(np.float64)
    folds = np.array_split(np.random.default_rng(seed).permutation(len(known)), FOLDS)
    for part in split_locations_into_chunks(features.shape[1]):
        block = np.asarray(features[known, part], dtype=np.float64)  # (n, some, D)
        for place, x in zip(range(part.start, features.shape[1]), block.transpose(1, 0, 2)):
            predicted = _predict_out_of_fold(standardize_features(x), y, folds)  # (penalties, n)
            found[:, place] = [r2(y, values, np.ones((len(y), 1)))[0] for values in predicted]
        report_progress(block.shape[1])
    return found[np.argmax(found.clip(min=0).mean(axis=1))]


def _predict_out_of_fold(x: np.ndarray, y: np.ndarray, folds: list[np.ndarray]) -> np.ndarray:
    """Predict each fold from the other folds with every penalty: (n, D), (n,) -> (penalties, n)."""
    gram, product = x.T @ x, x.T @ y
    predicted = np.zeros((len(PENALTIES), len(y)))
    for fold in folds:
        own, count = x[fold], len(y) - len(fold)
        total = y.sum() - y[fold].sum()
        mean = -own.sum(axis=0) / count  # mean of x in the other folds; the mean over all folds is 0
        middle = total / count
        covariance = gram - own.T @ own - count * np.outer(mean, mean)  # (D, D)
        moment = product - own.T @ y[fold] - total * mean  # (D,)
        values, vectors = np.linalg.eigh(covariance)
        rotated, left = vectors.T @ moment, (own - mean) @ vectors
        for row, penalty in zip(predicted, PENALTIES):
            row[fold] = middle + left @ (rotated / (values.clip(min=0) + penalty * count))
    return predicted


def find_unusual_locations(features: np.ndarray, healthy: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the locations where each subject differs most from the healthy subjects.

    Args:
        features: (N, L, D).
        healthy: (N,) bool, the subjects that the normal distribution is fitted to; see tools.evaluation.normal.
        count: number of locations per subject.

    Returns:
        Locations (N, count) and their scores (N, count), highest score first.
    """
    scores = score_patch_abnormality(features, healthy)  # (N, L)
    places = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return places, np.take_along_axis(scores, places, axis=1)
