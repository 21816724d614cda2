"""Metrics of predictions, computed for many bootstrap resamples at once.

Each function takes the truth (n,), the prediction (n,) or (n, classes), and weights (n, b). A weight is the number of
times that a subject occurs in a resample. The result has one value per resample, (b,), which is NaN if the metric is
undefined for the resample. If all weights are 1, the result is the ordinary metric.
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _divide_or_nan(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide ``above`` by ``below``; the result is NaN where ``below`` is 0."""
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def r2(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficient of determination, 1 - SSE / SST; negative if predictions are worse than the mean of all subjects."""
    count, middle = weights.sum(0), truth.mean()
    truth, predicted = truth - middle, predicted - middle  # centring avoids a loss of precision if the mean is large
    mean = _divide_or_nan(truth @ weights, count)  # (b,)
    squares = np.square(truth) @ weights
    total = squares - count * mean**2
    return 1 - _divide_or_nan(np.square(truth - predicted) @ weights, np.where(total > 1e-12 * squares, total, 0))


def mean_absolute_error(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean absolute error in the unit of the label."""
    return _divide_or_nan(np.abs(truth - predicted) @ weights, weights.sum(0))


def exact_agreement(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of subjects for which the rounded prediction is equal to the true grade."""
    return _divide_or_nan((np.rint(predicted) == truth) @ weights.astype(float), weights.sum(0))


def share_within_one_grade(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of subjects for which the rounded prediction is at most one grade off."""
    return _divide_or_nan((np.abs(np.rint(predicted) - truth) <= 1) @ weights.astype(float), weights.sum(0))


def kappa(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Cohen's kappa of rounded predictions, with quadratic weights.

    Kappa is 1 - a / b: a is the mean squared difference from the true grades, and b is the value of a for predictions
    that are independent of the true grades.
    """
    given = np.rint(predicted)
    count = weights.sum(0)
    seen = _divide_or_nan(np.square(truth - given) @ weights, count)
    means = [_divide_or_nan(values @ weights, count) for values in (truth, given)]
    squares = [_divide_or_nan(np.square(values) @ weights, count) for values in (truth, given)]
    return 1 - _divide_or_nan(seen, squares[0] + squares[1] - 2 * means[0] * means[1])


def auroc(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve; with more than two classes, the mean of the areas of each class against the rest.

    Args:
        truth: (n,) class numbers.
        predicted: (n, classes) scores.
        weights: (n, b).
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
        below = np.cumsum(negatives, axis=0) - 0.5 * negatives  # ties count as one half
        won = (w * pos * below[groups]).sum(0)
        areas.append(_divide_or_nan(won, (w * pos).sum(0) * (w * ~pos).sum(0)))
    return np.mean(areas, axis=0)


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean recall over the classes."""
    given = predicted.argmax(axis=1)
    recalls = []
    for number in range(predicted.shape[1]):
        own = truth == number
        recalls.append(_divide_or_nan((own & (given == number)) @ weights.astype(float), own @ weights.astype(float)))
    return np.mean(recalls, axis=0)


METRICS: dict[str, dict[str, Metric]] = {
    "regression": {"r2": r2, "mean_absolute_error": mean_absolute_error},
    "grade": {"kappa": kappa, "exact": exact_agreement, "within_one": share_within_one_grade},
    "class": {"auroc": auroc, "balanced_accuracy": balanced_accuracy},
}
