"""Figures of merit, each for one set of predictions, or for many resamples of it at once.

A function takes the truth (n,), the prediction (n,) or (n, classes), and weights (n, b): how often each patient is in
each of b resamples. It gives (b,) figures, NaN where a resample leaves one undefined. All ones is the plain figure.
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def r2(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """1 - SSE / SST; below 0 the prediction is worse than everybody's mean."""
    count, middle = weights.sum(0), truth.mean()
    truth, predicted = truth - middle, predicted - middle  # else digits are lost where the mean is large
    mean = _ratio(truth @ weights, count)  # (b,)
    squares = np.square(truth) @ weights
    total = squares - count * mean**2
    return 1 - _ratio(np.square(truth - predicted) @ weights, np.where(total > 1e-12 * squares, total, 0))


def mean_absolute_error(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """In the label's unit."""
    return _ratio(np.abs(truth - predicted) @ weights, weights.sum(0))


def exact(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share whose grade, rounded, is the true one."""
    return _ratio((np.rint(predicted) == truth) @ weights.astype(float), weights.sum(0))


def within_one(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share whose grade, rounded, is at most one off."""
    return _ratio((np.abs(np.rint(predicted) - truth) <= 1) @ weights.astype(float), weights.sum(0))


def kappa(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's with quadratic weights, of rounded grades: 1 - mean squared difference / that of independent grades."""
    given = np.rint(predicted)
    count = weights.sum(0)
    seen = _ratio(np.square(truth - given) @ weights, count)
    means = [_ratio(values @ weights, count) for values in (truth, given)]
    squares = [_ratio(np.square(values) @ weights, count) for values in (truth, given)]
    return 1 - _ratio(seen, squares[0] + squares[1] - 2 * means[0] * means[1])


def auroc(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve; of several classes, the mean of each against the rest.

    Args:
        truth: (n,) numbers of classes; predicted: (n, classes).
    """
    areas = []
    for number in range(1 if predicted.shape[1] == 2 else 0, predicted.shape[1]):
        positive, score = truth == number, predicted[:, number]
        order = np.argsort(score, kind="stable")
        w, pos, ranked = weights[order].astype(float), positive[order][:, None], score[order]
        edges = np.flatnonzero(np.diff(ranked)) + 1
        groups = np.repeat(np.arange(len(edges) + 1), np.diff([0, *edges, len(ranked)]))
        negatives = np.zeros((len(edges) + 1, w.shape[1]))
        np.add.at(negatives, groups, w * ~pos)
        below = np.cumsum(negatives, axis=0) - 0.5 * negatives  # ties count a half
        won = (w * pos * below[groups]).sum(0)
        areas.append(_ratio(won, (w * pos).sum(0) * (w * ~pos).sum(0)))
    return np.mean(areas, axis=0)


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the classes of the share found."""
    given = predicted.argmax(axis=1)
    recalls = []
    for number in range(predicted.shape[1]):
        own = truth == number
        recalls.append(_ratio((own & (given == number)) @ weights.astype(float), own @ weights.astype(float)))
    return np.mean(recalls, axis=0)


METRICS: dict[str, dict[str, Metric]] = {
    "regression": {"r2": r2, "mean_absolute_error": mean_absolute_error},
    "grade": {"kappa": kappa, "exact": exact, "within_one": within_one},
    "class": {"auroc": auroc, "balanced_accuracy": balanced_accuracy},
}
