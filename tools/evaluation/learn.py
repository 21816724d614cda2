"""Models of a label on features, fitted to some subjects and asked about others."""

import warnings
from collections.abc import Callable

import numpy as np

from tools.evaluation.metrics import r2
from tools.evaluation.survival import choose_penalty, fit_cox
from tools.evaluation.vectors import Table, fitted_table

FOLDS = 5
PENALTIES = np.logspace(-1, 5, 25)  # of features with SD 1
COVARIATE_WEIGHT = 10.0  # of a standardised covariate: hardly penalised beside features
INNER_FOLDS = 3

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # fitted x, fitted y, other x -> predictions


def joined_weights(*widths: int) -> np.ndarray:
    """Weights of the columns of tables side by side, (2, D), to ask what the others add to the last.

    A row is a model: the last table alone, and all of them, each with the same sum of squares, so that a wide table
    does not drown a narrow one. The mean of the two models' predictions is taken, because a choice on some hundred
    subjects is noisier (the forecast combination puzzle: Stock and Watson, 2004).
    """
    alone = np.repeat([*np.zeros(len(widths) - 1), 1.0], widths)
    return np.stack([alone, np.repeat(np.sqrt(widths[-1] / np.array(widths)), widths)])


def covariate_weights(count: int, weights: np.ndarray) -> np.ndarray:
    """Of the columns of a table with ``count`` covariates before it."""
    return np.concatenate([np.full((*weights.shape[:-1], count), COVARIATE_WEIGHT), weights], axis=-1)


def scale(fitted: np.ndarray, others: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Both with mean 0 and SD 1 of the fitted, times ``weights`` (D,) where given."""
    mean, sd = fitted.mean(0), fitted.std(0)
    weights = np.ones(len(sd)) if weights is None else weights
    factor = np.divide(weights, sd, out=np.zeros_like(sd), where=sd > 1e-12)
    return (fitted - mean) * factor, (others - mean) * factor


def ridge():
    """A ridge regression whose penalty is chosen on the subjects that it is fitted to, of columns with SD 1."""
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=PENALTIES)


def predict_number(fitted: np.ndarray, target: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Ridge regression, its penalty chosen on the fitted subjects, (n,). Columns keep the weight they have."""
    return ridge().fit(fitted, target).predict(others)


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
    if len(present) == 2:
        settings["solver"] = (
            "newton-cholesky"  # several times faster; of more classes scikit-learn 1.6 and later has it
        )
    if settings["cv"] < 2:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=1000)
    else:
        model = LogisticRegressionCV(**settings, class_weight="balanced", max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of defaults that scikit-learn 1.10 will change
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
    return _stage_of([(fitted, others)], target)


def _stage_of(tables: list[tuple[np.ndarray, np.ndarray]], target: np.ndarray) -> np.ndarray:
    """As predict_stage, of several tables: the mean of the values that they predict, for a mean of stages is none."""
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    known, asked = [], []
    for column in (1, 2):
        values = target[:, column]
        known.append(np.mean([cross_val_predict(ridge(), own, values, cv=INNER_FOLDS) for own, _ in tables], axis=0))
        asked.append(np.mean([predict_number(own, values, others) for own, others in tables], axis=0))
    tree = DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, random_state=0)
    tree.fit(np.stack(known, axis=1), target[:, 0])
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
    model: Predict, features: Table, target: np.ndarray, others: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """The rows ``others`` (N,) bool predicted by a model of the rest: (others, ...). Scaling is the rest's too.

    Args:
        features: (N, D), or what gives them for a set of fitted rows.
        weights: (D,) of the columns, or (models, D), the mean of whose predictions is taken.
    """
    features = fitted_table(features, ~others)
    if weights is not None and weights.ndim == 2:
        if model is predict_stage:
            return _stage_of([scale(features[~others], features[others], row) for row in weights], target[~others])
        return np.mean([predict_others(model, features, target, others, row) for row in weights], axis=0)
    if model is predict_stage:
        fitted, asked = scale(features[~others], features[others], weights)
        return _stage_of([(fitted, asked)], target[~others])
    return model(*_in_row_space(*scale(features[~others], features[others], weights), target[~others]))


def _in_row_space(fitted: np.ndarray, asked: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fitted rows, target and asked rows, of no more columns than fitted rows: (n, D), (m, D) -> (n, r), (n,), (m, r).

    A model with a penalty on the squares of its weights has these in the space of the fitted rows, which an orthogonal
    rotation takes to the first r columns: the same predictions, from fewer columns. The rotation is of the rows' inner
    products, (n, n), twenty times faster than a QR decomposition of 4,096 columns.
    """
    if fitted.shape[1] <= len(fitted):
        return fitted, target, asked
    squares, directions = np.linalg.eigh(fitted @ fitted.T)
    kept = squares > squares[-1] * 1e-13
    lengths, directions = np.sqrt(squares[kept]), directions[:, kept]  # (r,), (n, r)
    return directions * lengths, target, asked @ fitted.T @ (directions / lengths)


def out_of_fold(
    model: Predict, features: Table, target: np.ndarray, fold: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Everybody predicted by a model that has seen the other folds only: (N, ...)."""
    predicted = None
    for number in np.unique(fold):
        own = fold == number
        part = predict_others(model, features, target, own, weights)
        if predicted is None:
            # Classes as in the whole: a fold may lack the highest one.
            width = (int(target.max()) + 1,) if part.ndim == 2 else ()
            predicted = np.zeros((len(fold), *width))
        if part.ndim == 2:
            part = np.pad(part, ((0, 0), (0, predicted.shape[1] - part.shape[1])))
        predicted[own] = part
    return predicted


def held_out_r2(features: Table, target: np.ndarray, held_out: np.ndarray, weights: np.ndarray | None = None) -> float:
    """R² of the held-out subjects by a ridge regression fitted to the others.

    Args:
        features: (N, D), or as in :func:`predict_others`.
        target: (N,).
        held_out: (N,) bool.
        weights: (D,) of the columns, or (models, D).
    """
    predicted = predict_others(predict_number, features, target, held_out, weights)
    return float(r2(target[held_out], predicted, np.ones((len(predicted), 1)))[0])
