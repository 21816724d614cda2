"""Models of a label on features, fitted to some subjects and asked about others."""

from collections.abc import Callable

import numpy as np

from tools.evaluation.probe import make_probe
from tools.evaluation.survival import choose_penalty, fit_cox

COVARIATE_WEIGHT = 10.0  # of a standardised covariate: hardly penalised beside features
INNER_FOLDS = 3

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # fitted x, fitted y, other x -> predictions


def scale(fitted: np.ndarray, others: np.ndarray, covariates: int) -> tuple[np.ndarray, np.ndarray]:
    """Both with mean 0 and SD 1 of the fitted; the first columns, ``covariates`` of them, weighted up."""
    mean, sd = fitted.mean(0), fitted.std(0)
    weight = np.ones(fitted.shape[1])
    weight[:covariates] = COVARIATE_WEIGHT
    factor = np.divide(weight, sd, out=np.zeros_like(sd), where=sd > 1e-12)
    return (fitted - mean) * factor, (others - mean) * factor


def predict_number(fitted: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Ridge regression, (n,)."""
    return make_probe().fit(fitted, target).predict(others)


def predict_grade(fitted: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Ridge regression within the range of the fitted grades, (n,), not rounded."""
    return np.clip(predict_number(fitted, target, others), target.min(), target.max())


def predict_class(fitted: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Logistic regression: probabilities (n, classes) of the numbers 0, 1, ...; a class not fitted to has 0."""
    from sklearn.linear_model import LogisticRegressionCV

    present, counts = np.unique(target, return_counts=True)
    probabilities = np.zeros((len(others), int(target.max()) + 1))
    if len(present) == 1:
        probabilities[:, int(present[0])] = 1
        return probabilities
    settings = dict(Cs=np.logspace(-5, 1, 7), cv=min(INNER_FOLDS, counts.min()), scoring="neg_log_loss")
    if settings["cv"] < 2:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=1000)
    else:
        model = LogisticRegressionCV(**settings, class_weight="balanced", max_iter=1000)
    probabilities[:, present.astype(int)] = model.fit(fitted, target).predict_proba(others)
    return probabilities


def predict_risk(fitted: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Ridge Cox regression of (n, 2) times and events: the linear predictor, (n,)."""
    time, event = target.T
    penalty = choose_penalty(fitted, time, event, INNER_FOLDS, seed=0)
    return others @ fit_cox(fitted, time, event, penalty)


def predict_stage(fitted: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    """A grade by way of spirometry, the practice of the method's group: a decision tree on two predicted values.

    Args:
        target: (n, 3): the grade, and the two values that it follows from, such as log10 FEV1 % predicted and FEV1/FVC.

    Returns:
        (n,) grades.
    """
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    values = [cross_val_predict(make_probe(), fitted, target[:, column], cv=INNER_FOLDS) for column in (1, 2)]
    tree = DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, random_state=0)
    tree.fit(np.stack(values, axis=1), target[:, 0])
    asked = [predict_number(fitted, target[:, column], others) for column in (1, 2)]
    return tree.predict(np.stack(asked, axis=1)).astype(float)


MODELS: dict[str, Predict] = {
    "regression": predict_number,
    "log10": predict_number,
    "grade": predict_grade,
    "class": predict_class,
    "survival": predict_risk,
    "stage": predict_stage,
}


def predict_others(
    model: Predict, features: np.ndarray, target: np.ndarray, others: np.ndarray, covariates: int = 0
) -> np.ndarray:
    """The rows ``others`` (N,) bool predicted by a model of the rest: (others, ...). Scaling is the rest's too."""
    fitted, asked = scale(features[~others], features[others], covariates)
    return model(fitted, target[~others], asked)


def out_of_fold(
    model: Predict, features: np.ndarray, target: np.ndarray, fold: np.ndarray, covariates: int = 0
) -> np.ndarray:
    """Everybody predicted by a model that has seen the other folds only: (N, ...)."""
    predicted = None
    for number in np.unique(fold):
        own = fold == number
        part = predict_others(model, features, target, own, covariates)
        if predicted is None:
            predicted = np.zeros((len(fold), *part.shape[1:]))
        if part.ndim == 2 and part.shape[1] < predicted.shape[1]:
            part = np.pad(part, ((0, 0), (0, predicted.shape[1] - part.shape[1])))
        predicted[own] = part
    return predicted
