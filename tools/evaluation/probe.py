"""A ridge regression on patient features, judged on patients that it has not seen."""

import numpy as np

FOLDS, REPEATS = 5, 10
RESAMPLES = 1000  # of the bootstrap over patients
PENALTIES = np.logspace(-1, 5, 25)  # of features with SD 1


def make_probe():
    """Features with SD 1 and a ridge regression whose penalty is chosen on the subjects that it is fitted to."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(alphas=PENALTIES))


def r2_score(target: np.ndarray, predicted: np.ndarray) -> float:
    """1 - SSE / SST, (n,), (n,)."""
    return float(1 - np.square(target - predicted).sum() / np.square(target - target.mean()).sum())


def cross_validated_r2(features: np.ndarray, target: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over repeats of the out-of-fold R²: (N, D), (N,) -> two numbers.

    Every subject is predicted once in each repeat by a model that has not seen it; R² is of those
    N predictions together, so that small folds do not distort it.
    """
    from sklearn.model_selection import KFold, cross_val_predict

    scores = []
    for repeat in range(REPEATS):
        folds = KFold(FOLDS, shuffle=True, random_state=seed + repeat)
        scores.append(r2_score(target, cross_val_predict(make_probe(), features, target, cv=folds)))
    return float(np.mean(scores)), float(np.std(scores))


def held_out_r2(features: np.ndarray, target: np.ndarray, held_out: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """R² of the held-out subjects by a model fitted to the others, and its bootstrap standard deviation.

    Args:
        features, target: (N, D), (N,).
        held_out: (N,) bool.
        seed: of the bootstrap, over held-out subjects.
    """
    predicted = make_probe().fit(features[~held_out], target[~held_out]).predict(features[held_out])
    truth, rng = target[held_out], np.random.default_rng(seed)
    draws = [rng.integers(len(truth), size=len(truth)) for _ in range(RESAMPLES)]
    scores = [r2_score(truth[draw], predicted[draw]) for draw in draws if np.ptp(truth[draw]) > 0]
    return r2_score(truth, predicted), float(np.std(scores))
