"""Evaluate how well several tables predict one label: metrics with intervals, and metrics for permuted labels."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tools.evaluation.learn import MODELS, fit_and_predict_held_out, predict_out_of_fold
from tools.evaluation.metrics import METRICS, Metric
from tools.evaluation.splits import draw_folds, draw_resamples, make_strata
from tools.evaluation.survival import c_index
from tools.evaluation.vectors import Table

RESAMPLES = 1000  # bootstrap resamples over patients
INTERVAL = (2.5, 97.5)  # percentiles
REPEATS = {"regression": 10, "log10": 10, "grade": 10, "class": 3, "survival": 3, "stage": 3}
PERMUTATIONS = 5


class Label(NamedTuple):
    """A label to predict.

    Attributes:
        name: name of the label column; for survival, of the event column.
        kind: regression, log10, grade, class, survival or stage.
        target: (N,) numbers, or class numbers 0, 1, ... for classes. For survival, (N, 2): times and events. For a
            disease stage, (N, 3): the stage and the two spirometry values that define it.
        classes: the original value of each class number.
        time: name of the column of follow-up times; only for survival.
    """

    name: str
    kind: str
    target: np.ndarray
    classes: tuple[float, ...] = ()
    time: str = ""


class Evaluation(NamedTuple):
    """Metrics and predictions of one label."""

    figures: dict[str, dict[str, dict[str, Any]]]  # table -> metric -> mean, low, high, permuted
    predictions: dict[str, np.ndarray]  # table -> predictions (N, ...), mean over the repeats


def select_metrics(kind: str) -> dict[str, Metric]:
    """Return the metrics for a kind of label, by metric name. The first metric is used to compare tables."""
    if kind == "survival":
        return {"c_index": c_index}
    if kind == "stage":
        return {
            name: functools.partial(_apply_metric_to_disease_stage, metric) for name, metric in METRICS["grade"].items()
        }
    return METRICS["regression" if kind == "log10" else kind]


def _apply_metric_to_disease_stage(
    metric: Metric, truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    return metric(truth[:, 0], predicted, weights)


def evaluate_label(
    label: Label,
    tables: Mapping[str, Table],
    groups: np.ndarray,
    folds: int,
    weights: Mapping[str, np.ndarray] | None = None,
    held_out: np.ndarray | None = None,
    seed: int = 0,
    base_table_names: Mapping[str, str] | None = None,
) -> Evaluation:
    """Evaluate tables by nested, repeated cross-validation; every fold chooses its own penalty and scaling.

    All tables use the same folds and bootstrap resamples. In each repeat, every subject is predicted once by a model
    that has not seen any scan of the same patient. A metric is computed from all N predictions of a repeat and averaged
    over the repeats.

    Args:
        label: a label with a value for each of the N subjects.
        tables: features (N, D), or objects that compute features for each fold. The first table is compared with
            every other table.
        groups: (N,) patient numbers.
        folds: number of folds in each repeat.
        weights: column weights of a table, (D,), or (models, D) to average several models (default: ones).
        held_out: (N,) bool, test subjects for a model that is fitted to all others; None for cross-validation.
        seed: random seed of folds, bootstrap and permutations.
        base_table_names: maps the name of each joined table to the name of the table that other columns were added to.

    Returns:
        Metrics and predictions. For the first metric, every other table also has its paired difference from the first
        table, ``{first}_minus_this``, with an interval. A table in ``base_table_names`` also has its difference from
        its base table, ``this_minus_{base}``.
    """
    metrics, repeats = select_metrics(label.kind), 1 if held_out is not None else REPEATS[label.kind]
    reported = np.ones(len(groups), dtype=bool) if held_out is None else held_out
    draws = np.column_stack([np.ones(reported.sum(), dtype=int), draw_resamples(groups[reported], RESAMPLES, seed)])
    target = np.log10(label.target) if label.kind == "log10" else label.target
    by_fold = target if target.ndim == 1 else target[:, -1] if label.kind == "survival" else target[:, 0]
    stratum = make_strata(by_fold, "class" if target.ndim == 2 else label.kind)

    def predict_reported_subjects(table_name: str, truth: np.ndarray, repeat: int) -> np.ndarray:
        """Return predictions for the subjects to report on, one row per subject."""
        table, of_columns = tables[table_name], (weights or {}).get(table_name)
        if held_out is not None:
            return fit_and_predict_held_out(MODELS[label.kind], table, truth, held_out, of_columns)
        fold = draw_folds(stratum, groups, folds, np.random.default_rng([seed, repeat]))
        return predict_out_of_fold(MODELS[label.kind], table, truth, fold, of_columns)

    rng, ones = np.random.default_rng([seed, 1]), np.ones((reported.sum(), 1))
    permuted = [target[rng.permutation(len(groups))] for _ in range(PERMUTATIONS)]
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    predictions: dict[str, np.ndarray] = {}
    samples: dict[str, np.ndarray] = {}  # table -> the first metric, for all subjects and for each resample
    for name in tables:
        given = [predict_reported_subjects(name, target, repeat) for repeat in range(repeats)]
        predictions[name] = np.mean(given, axis=0)
        figures[name] = {}
        for metric, measure in metrics.items():
            values = np.mean([measure(target[reported], one, draws) for one in given], axis=0)
            low, high = np.nanpercentile(values[1:], INTERVAL)
            figures[name][metric] = {"mean": float(values[0]), "low": float(low), "high": float(high)}
            samples.setdefault(name, values)
        given = [predict_reported_subjects(name, truth, repeat) for repeat, truth in enumerate(permuted)]
        for metric, measure in metrics.items():
            chance = [measure(truth[reported], one, ones)[0] for truth, one in zip(permuted, given)]
            figures[name][metric]["permuted"] = float(np.nanmean(chance))

    def compute_metric_difference(first_table: str, second_table: str) -> dict[str, float]:
        paired = samples[first_table] - samples[second_table]
        low, high = np.nanpercentile(paired[1:], INTERVAL)
        return {"mean": float(paired[0]), "low": float(low), "high": float(high)}

    first, main = next(iter(tables)), next(iter(metrics))
    for name in samples:
        if name != first:
            figures[name][main][f"{first}_minus_this"] = compute_metric_difference(first, name)
    for name, other in (base_table_names or {}).items():
        figures[name][main][f"this_minus_{other}"] = compute_metric_difference(name, other)
    return Evaluation(figures, predictions)
