"""Compare metrics with scikit-learn and closed forms, and weighted metrics with metrics of repeated rows."""

import numpy as np
import pytest
from sklearn import metrics as library

from tools.evaluation import metrics


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 5, 80).astype(float)
    return rng, grades, grades + rng.normal(0, 1, 80)


def ones(n):
    return np.ones((n, 1), dtype=int)


def test_numbers_and_grades(drawn):
    _, truth, given = drawn
    n = len(truth)
    assert metrics.r2(truth, given, ones(n))[0] == pytest.approx(library.r2_score(truth, given))
    wanted = library.mean_absolute_error(truth, given)
    assert metrics.mean_absolute_error(truth, given, ones(n))[0] == pytest.approx(wanted)
    rounded = np.clip(np.rint(given), 0, 4)
    assert metrics.exact_agreement(truth, rounded, ones(n))[0] == pytest.approx((truth == rounded).mean())
    assert metrics.share_within_one_grade(truth, rounded, ones(n))[0] == pytest.approx(
        (np.abs(truth - rounded) <= 1).mean()
    )
    wanted = library.cohen_kappa_score(truth.astype(int), rounded.astype(int), weights="quadratic")
    assert metrics.kappa(truth, rounded, ones(n))[0] == pytest.approx(wanted)
    assert metrics.kappa(truth, truth, ones(n))[0] == 1
    assert metrics.r2(truth, np.full(n, truth.mean()), ones(n))[0] == pytest.approx(0)


@pytest.mark.parametrize("classes", [2, 3])
def test_classes(drawn, classes):
    rng, *_ = drawn
    truth = rng.integers(0, classes, 90).astype(float)
    given = rng.random((90, classes)) + 0.5 * np.eye(classes)[truth.astype(int)]
    given = np.round(given / given.sum(1, keepdims=True), 1)  # ties
    if classes == 2:
        wanted = library.roc_auc_score(truth, given[:, 1])
    else:
        wanted = np.mean([library.roc_auc_score(truth == c, given[:, c]) for c in range(classes)])
    assert metrics.auroc(truth, given, ones(90))[0] == pytest.approx(wanted)
    wanted = library.balanced_accuracy_score(truth, given.argmax(1))
    assert metrics.balanced_accuracy(truth, given, ones(90))[0] == pytest.approx(wanted)


def test_a_weight_equals_repeated_rows(drawn):
    rng, truth, given = drawn
    weights = rng.integers(0, 4, (80, 3))
    scores = np.stack([1 - given / 5, given / 5], axis=1)
    for name, metric in (item for kind in metrics.METRICS.values() for item in kind.items()):
        binary = name in ("auroc", "balanced_accuracy")
        label, predicted = ((truth > 2).astype(float), scores) if binary else (truth, given)
        found = metric(label, predicted, weights)
        for column in range(3):
            rows = np.repeat(np.arange(80), weights[:, column])
            wanted = metric(label[rows], predicted[rows], ones(len(rows)))[0]
            assert found[column] == pytest.approx(wanted), name


def test_an_uninformative_resample_gives_nan():
    truth, given = np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 2.0])
    weights = np.array([[1], [2], [0]])
    assert np.isnan(metrics.r2(truth, given, weights)[0])
    scores = np.eye(2)[[0, 1, 1]]
    assert np.isnan(metrics.auroc(truth - 1, scores, weights)[0])
