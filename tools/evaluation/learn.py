"""Models that predict a label from features: fit to some subjects, predict the others."""

import warnings
from collections.abc import Callable

import numpy as np

from tools.evaluation.metrics import r2
from tools.evaluation.survival import choose_penalty, fit_cox
from tools.evaluation.vectors import Table, get_features_fitted_to_rows, join_tables

FOLDS = 5
PENALTIES = np.logspace(-1, 5, 25)  # ridge penalties for features with SD 1
COVARIATE_WEIGHT = 10.0  # factor for covariates, so large that the ridge penalty hardly shrinks their coefficients
INNER_FOLDS = 3

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # features, labels, new features -> predictions


def make_even_table_weights(*widths: int) -> np.ndarray:
    """Return column weights for joined tables, (2, D), to measure what the other tables add to the last one.

    Each row holds the weights for one model: the first model uses only the last table, the second uses all tables. In
    the second model, each table has the same sum of squares, so that a table with many columns does not dominate. The
    predictions of the two models are averaged. With a few hundred subjects, choosing the better model is noisier than
    averaging both (the forecast combination puzzle: Stock and Watson, 2004).
    """
    alone = np.repeat([*np.zeros(len(widths) - 1), 1.0], widths)
    return np.stack([alone, np.repeat(np.sqrt(widths[-1] / np.array(widths)), widths)])


def join_tables_with_even_weights(*tables: Table) -> tuple[Table, np.ndarray]:
    """Join tables, and return the result with the weights of :func:`make_even_table_weights`."""
    return join_tables(*tables), make_even_table_weights(*(table.shape[1] for table in tables))


def prepend_covariate_weights(covariate_count: int, column_weights: np.ndarray) -> np.ndarray:
    """Return the column weights of a table with ``covariate_count`` covariates in front of its other columns."""
    return np.concatenate(
        [np.full((*column_weights.shape[:-1], covariate_count), COVARIATE_WEIGHT), column_weights], axis=-1
    )


def standardize(
    train_features: np.ndarray, test_features: np.ndarray, column_weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Standardise training and test features with the mean and SD of ``train_features``.

    If ``column_weights`` (D,) are given, multiply the columns of both tables by these weights.
    """
    mean, sd = train_features.mean(0), train_features.std(0)
    column_weights = np.ones(len(sd)) if column_weights is None else column_weights
    factor = np.divide(column_weights, sd, out=np.zeros_like(sd), where=sd > 1e-12)
    return (train_features - mean) * factor, (test_features - mean) * factor


def make_ridge_regression():
    """Return a ridge regression for columns with SD 1, which chooses its penalty on the training subjects."""
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=PENALTIES)


def predict_by_ridge_regression(
    train_features: np.ndarray, train_target: np.ndarray, test_features: np.ndarray
) -> np.ndarray:
    """Predict numbers (n,) by ridge regression. The features must already be standardised."""
    return make_ridge_regression().fit(train_features, train_target).predict(test_features)


def predict_grade(train_features: np.ndarray, train_target: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """Predict grades (n,) by ridge regression, clipped to the range of the fitted grades but not rounded."""
    return np.clip(
        predict_by_ridge_regression(train_features, train_target, test_features), train_target.min(), train_target.max()
    )


def predict_class(train_features: np.ndarray, train_target: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """Predict probabilities (n, classes) of classes 0, 1, ... by logistic regression.

    A class that is missing from the training subjects gets probability 0.
    """
    from sklearn.linear_model import LogisticRegressionCV

    present, counts = np.unique(train_target, return_counts=True)
    probabilities = np.zeros((len(test_features), int(train_target.max()) + 1))
    if len(present) == 1:
        probabilities[:, int(present[0])] = 1
        return probabilities
    settings = dict(Cs=np.logspace(-5, 1, 7), cv=min(INNER_FOLDS, counts.min()), scoring="neg_log_loss")
    if len(present) == 2:
        # This solver is several times faster than the default, but needs scikit-learn 1.6 for more than two classes.
        settings["solver"] = "newton-cholesky"
    if settings["cv"] < 2:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=1000)
    else:
        model = LogisticRegressionCV(**settings, class_weight="balanced", max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # warnings about defaults that change in scikit-learn 1.10
        probabilities[:, present.astype(int)] = model.fit(train_features, train_target).predict_proba(test_features)
    return probabilities


def predict_risk(train_features: np.ndarray, train_target: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """Predict risk, (n,): the linear predictor of a ridge Cox regression on times and events (n, 2)."""
    time, event = train_target.T
    penalty = choose_penalty(train_features, time, event, INNER_FOLDS, seed=0)
    return test_features @ fit_cox(train_features, time, event, penalty)


def predict_copd_stage(train_features: np.ndarray, train_target: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """Predict a COPD stage as the authors of DrasCLR do: by a decision tree on two predicted spirometry values.

    Args:
        train_features: (n, D) features of the training subjects.
        train_target: (n, 3), the grade and the two values that define it, such as log10 of FEV1 % predicted and of
            FEV1/FVC.
        test_features: (m, D) features of the subjects to predict.

    Returns:
        (m,) grades.
    """
    return _predict_stage_from_tables([(train_features, test_features)], train_target)


def _predict_stage_from_tables(tables: list[tuple[np.ndarray, np.ndarray]], train_target: np.ndarray) -> np.ndarray:
    """Predict a COPD stage as predict_copd_stage does, but from several tables.

    Predicted spirometry is averaged over the tables, because a mean of predicted stages may be a fraction.
    """
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    known, asked = [], []
    for column in (1, 2):
        values = train_target[:, column]
        known.append(
            np.mean(
                [cross_val_predict(make_ridge_regression(), own, values, cv=INNER_FOLDS) for own, _ in tables], axis=0
            )
        )
        asked.append(np.mean([predict_by_ridge_regression(own, values, others) for own, others in tables], axis=0))
    tree = DecisionTreeClassifier(max_depth=4, min_samples_leaf=5, random_state=0)
    tree.fit(np.stack(known, axis=1), train_target[:, 0])
    return tree.predict(np.stack(asked, axis=1)).astype(float)


MODELS: dict[str, Predict] = {
    "regression": predict_by_ridge_regression,
    "log10": predict_by_ridge_regression,
    "grade": predict_grade,
    "class": predict_class,
    "survival": predict_risk,
    "stage": predict_copd_stage,
}


def fit_and_predict_held_out(
    model: Predict, features: Table, target: np.ndarray, held_out: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Fit a model to some subjects and predict the others.

    Args:
        model: one of MODELS.
        features: (N, D), or an object that computes features (N, D) for the rows that the model is fitted to.
        target: (N, ...).
        held_out: (N,) bool, the rows to predict. The model and the scaling are not fitted to these rows.
        weights: column weights (D,), or (models, D) to average the predictions of several models.

    Returns:
        Predictions, (others, ...).
    """
    features = get_features_fitted_to_rows(features, ~held_out)
    if weights is not None and weights.ndim == 2:
        if model is predict_copd_stage:
            return _predict_stage_from_tables(
                [standardize(features[~held_out], features[held_out], row) for row in weights], target[~held_out]
            )
        return np.mean([fit_and_predict_held_out(model, features, target, held_out, row) for row in weights], axis=0)
    if model is predict_copd_stage:
        fitted, asked = standardize(features[~held_out], features[held_out], weights)
        return _predict_stage_from_tables([(fitted, asked)], target[~held_out])
    return model(
        *_reduce_to_row_space(*standardize(features[~held_out], features[held_out], weights), target[~held_out])
    )


def _reduce_to_row_space(
    train_features: np.ndarray, test_features: np.ndarray, train_target: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Reduce wide tables to r <= n columns without changing the predictions: (n, D), (m, D) -> (n, r), (m, r).

    The target is returned unchanged between the two tables.

    If a model penalises its squared weights, the weights lie in the row space of ``train_features``. A rotation
    maps the row space of ``train_features`` to r columns. The rotation matrix is computed from the inner products of
    the rows, (n, n). For 4,096 columns, this method is about five times faster than a QR decomposition.
    """
    if train_features.shape[1] <= len(train_features):
        return train_features, train_target, test_features
    squares, directions = np.linalg.eigh(train_features @ train_features.T)
    kept = squares > squares[-1] * 1e-13
    if not kept.any():  # every column is constant
        return train_features[:, :1], train_target, test_features[:, :1] * 0
    lengths, directions = np.sqrt(squares[kept]), directions[:, kept]  # (r,), (n, r)
    return directions * lengths, train_target, test_features @ train_features.T @ (directions / lengths)


def predict_out_of_fold(
    model: Predict, features: Table, target: np.ndarray, fold: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Predict every subject with a model that was fitted to the other folds, (N, ...)."""
    predicted = None
    for number in np.unique(fold):
        own = fold == number
        part = fit_and_predict_held_out(model, features, target, own, weights)
        if predicted is None:
            # Use the classes of all subjects: a fold may lack the highest class.
            width = (int(target.max()) + 1,) if part.ndim == 2 else ()
            predicted = np.zeros((len(fold), *width))
        if part.ndim == 2:
            part = np.pad(part, ((0, 0), (0, predicted.shape[1] - part.shape[1])))
        predicted[own] = part
    return predicted


def compute_held_out_ridge_r2(
    features: Table, target: np.ndarray, held_out: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Fit a ridge regression to the subjects that are not held out, and return its R² for the held-out subjects.

    Args:
        features: (N, D), or an object as in :func:`fit_and_predict_held_out`.
        target: (N,).
        held_out: (N,) bool.
        weights: column weights (D,) or (models, D), as in :func:`fit_and_predict_held_out`.
    """
    predicted = fit_and_predict_held_out(predict_by_ridge_regression, features, target, held_out, weights)
    return float(r2(target[held_out], predicted, np.ones((len(predicted), 1)))[0])
