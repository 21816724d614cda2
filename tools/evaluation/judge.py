"""How well each of several tables predicts one label: figures with intervals, beside permuted labels."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tools.evaluation.learn import MODELS, out_of_fold, predict_others
from tools.evaluation.metrics import METRICS, Metric
from tools.evaluation.splits import draw_folds, resamples, strata_of
from tools.evaluation.survival import c_index
from tools.evaluation.vectors import Table

RESAMPLES = 1000  # of the bootstrap, over patients
INTERVAL = (2.5, 97.5)  # percentiles
REPEATS = {"regression": 10, "log10": 10, "grade": 10, "class": 3, "survival": 3, "stage": 3}
PERMUTATIONS = 5


class Label(NamedTuple):
    """What is predicted.

    Attributes:
        name: the column's; of survival the event's.
        kind: regression, log10, grade, class, survival or stage.
        target: (N,) numbers, of classes 0, 1, ...; (N, 2) time and event; (N, 3) stage and what it follows from.
        classes: what class numbers stand for.
        time: of survival the column of the follow-up.
    """

    name: str
    kind: str
    target: np.ndarray
    classes: tuple[float, ...] = ()
    time: str = ""


class Judged(NamedTuple):
    """Figures of one label, and what they are of."""

    figures: dict[str, dict[str, dict[str, Any]]]  # table -> metric -> mean, low, high, permuted
    predictions: dict[str, np.ndarray]  # table -> (N, ...), mean over the repeats


def metrics_of(kind: str) -> dict[str, Metric]:
    """The metrics of a kind of label, by name; the first is the one that tables are compared by."""
    if kind == "survival":
        return {"c_index": c_index}
    if kind == "stage":
        return {name: functools.partial(_of_stage, metric) for name, metric in METRICS["grade"].items()}
    return METRICS["regression" if kind == "log10" else kind]


def _of_stage(metric: Metric, truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return metric(truth[:, 0], predicted, weights)


def judge(
    label: Label,
    tables: Mapping[str, Table],
    groups: np.ndarray,
    folds: int,
    weights: Mapping[str, np.ndarray] | None = None,
    held_out: np.ndarray | None = None,
    seed: int = 0,
    added_to: Mapping[str, str] | None = None,
) -> Judged:
    """Nested, repeated cross-validation: penalty, scaling and tree are chosen inside the folds.

    All tables share folds and resamples. In each repeat everybody is predicted once by a model that has not seen any
    scan of that patient; a figure is of those N predictions together, its mean over the repeats.

    Args:
        label: of N subjects, all known.
        tables: (N, D) each, or what gives them for each fold; the first is the one that others are compared to.
        groups: (N,) numbers of patients.
        folds: of each repeat.
        weights: (D,) of the columns of tables, or (models, D), to average predictions of; else ones.
        held_out: (N,) subjects to report on, by a model of the others, in place of folds.
        seed: of folds, bootstrap and permutations.
        added_to: of a table that has another's columns too, that other one.

    Returns:
        Figures and predictions. Beside a table's first metric stand the paired differences, with their intervals:
        ``{first}_minus_this``, and of a table in ``added_to`` ``this_minus_{other}``.
    """
    metrics, repeats = metrics_of(label.kind), 1 if held_out is not None else REPEATS[label.kind]
    reported = np.ones(len(groups), dtype=bool) if held_out is None else held_out
    draws = np.column_stack([np.ones(reported.sum(), dtype=int), resamples(groups[reported], RESAMPLES, seed)])
    target = np.log10(label.target) if label.kind == "log10" else label.target
    by_fold = target if target.ndim == 1 else target[:, -1] if label.kind == "survival" else target[:, 0]
    stratum = strata_of(by_fold, "class" if target.ndim == 2 else label.kind)

    def predict(name: str, truth: np.ndarray, repeat: int) -> np.ndarray:
        """The reported subjects, (reported, ...)."""
        table, of_columns = tables[name], (weights or {}).get(name)
        if held_out is not None:
            return predict_others(MODELS[label.kind], table, truth, held_out, of_columns)
        fold = draw_folds(stratum, groups, folds, np.random.default_rng([seed, repeat]))
        return out_of_fold(MODELS[label.kind], table, truth, fold, of_columns)

    rng, ones = np.random.default_rng([seed, 1]), np.ones((reported.sum(), 1))
    permuted = [target[rng.permutation(len(groups))] for _ in range(PERMUTATIONS)]
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    predictions: dict[str, np.ndarray] = {}
    samples: dict[str, np.ndarray] = {}  # of the first metric, (1 + RESAMPLES,)
    for name in tables:
        given = [predict(name, target, repeat) for repeat in range(repeats)]
        predictions[name] = np.mean(given, axis=0)
        figures[name] = {}
        for metric, measure in metrics.items():
            values = np.mean([measure(target[reported], one, draws) for one in given], axis=0)
            low, high = np.nanpercentile(values[1:], INTERVAL)
            figures[name][metric] = {"mean": float(values[0]), "low": float(low), "high": float(high)}
            samples.setdefault(name, values)
        given = [predict(name, truth, repeat) for repeat, truth in enumerate(permuted)]
        for metric, measure in metrics.items():
            chance = [measure(truth[reported], one, ones)[0] for truth, one in zip(permuted, given)]
            figures[name][metric]["permuted"] = float(np.nanmean(chance))

    def difference(one: str, other: str) -> dict[str, float]:
        paired = samples[one] - samples[other]
        low, high = np.nanpercentile(paired[1:], INTERVAL)
        return {"mean": float(paired[0]), "low": float(low), "high": float(high)}

    first, main = next(iter(tables)), next(iter(metrics))
    for name in samples:
        if name != first:
            figures[name][main][f"{first}_minus_this"] = difference(first, name)
    for name, other in (added_to or {}).items():
        figures[name][main][f"this_minus_{other}"] = difference(name, other)
    return Judged(figures, predictions)
