"""Plots of an evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.evaluation.judge import Evaluation, Label
from tools.evaluation.survival import compute_log_rank, kaplan_meier, split_by_risk

if TYPE_CHECKING:  # importing matplotlib is slow, so only the plotting function imports it
    from matplotlib.axes import Axes

GROUP_NAMES = {2: ("lower", "higher"), 3: ("lowest third", "middle third", "highest third")}


def plot_predictions(
    label: Label, evaluation: Evaluation, table_name: str, reported_rows: np.ndarray, path: Path
) -> None:
    """Plot the predictions from one feature table.

    The plot shows predicted against true numbers, boxes by true grade, calibration curves of classes, or survival
    curves by predicted risk.

    Args:
        label: the label, with the true values of N subjects.
        evaluation: evaluation of the label.
        table_name: name of the table of features.
        reported_rows: (N,) bool, the subjects to plot.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    label = label._replace(
        name=label.name.replace("$", r"\$"), time=label.time.replace("$", r"\$")
    )  # matplotlib would treat a $ as the start of a formula
    figure, panel = plt.subplots(figsize=(4.6, 4.0), layout="constrained")
    truth, predicted = label.target[reported_rows], evaluation.predictions[table_name]
    main, figures = next(iter(evaluation.figures[table_name].items()))
    draw_one = {"survival": _plot_survival, "class": _plot_calibration, "grade": _plot_grades, "stage": _plot_grades}
    draw_one.get(label.kind, _plot_predicted_against_true)(panel, label, truth, predicted)
    interval = f"{figures['mean']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})"
    panel.set_title(f"{label.name}, {table_name}: {main} {interval}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_predicted_against_true(panel: "Axes", label: Label, truth: np.ndarray, predicted: np.ndarray) -> None:
    if label.kind == "log10":
        truth = np.log10(truth)
    panel.scatter(truth, predicted, s=9, alpha=0.6)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    panel.plot(ends, ends, color="tab:gray", lw=1)
    unit = f"log10 {label.name}" if label.kind == "log10" else label.name
    panel.set_xlabel(f"{unit}, true")
    panel.set_ylabel("predicted")


def _plot_grades(panel: "Axes", label: Label, truth: np.ndarray, predicted: np.ndarray) -> None:
    truth = truth[:, 0] if truth.ndim == 2 else truth
    grades = np.unique(truth)
    panel.boxplot([predicted[truth == grade] for grade in grades], positions=grades, widths=0.6)
    panel.plot(grades, grades, color="tab:gray", lw=1)
    panel.set_xlabel(f"{label.name}, true")
    panel.set_ylabel("predicted")


def _plot_calibration(panel: "Axes", label: Label, truth: np.ndarray, predicted: np.ndarray) -> None:
    """Plot the observed share of each class in groups of subjects with similar predicted probabilities."""
    for number in range(1 if len(label.classes) == 2 else 0, len(label.classes)):
        probability, own = predicted[:, number], truth == number
        bins = np.searchsorted(np.quantile(probability, np.arange(1, 8) / 8), probability, side="right")
        points = [(probability[bins == b].mean(), own[bins == b].mean()) for b in np.unique(bins)]
        panel.plot(*zip(*points), marker="o", ms=4, lw=1, label=f"{label.name} = {label.classes[number]:g}")
    panel.plot([0, 1], [0, 1], color="tab:gray", lw=1)
    panel.set_xlabel("predicted probability")
    panel.set_ylabel("share of the class")
    panel.legend(fontsize=8)


def _plot_survival(panel: "Axes", label: Label, truth: np.ndarray, predicted: np.ndarray) -> None:
    time, event = truth.T
    number = 3 if len(time) >= 60 else 2
    group = split_by_risk(predicted, number)
    there = np.unique(group)  # only one group if all predicted risks are equal
    for position, index in enumerate(there):
        rows = group == index
        times, share = kaplan_meier(time[rows], event[rows])
        end = time[rows].max()
        which = GROUP_NAMES[number][index] if len(there) > 1 else "equal"
        name = f"{which} predicted risk ({rows.sum()}, {int(event[rows].sum())} events)"
        (line,) = panel.step([*times, end], [*share, share[-1]], where="post", label=name)
        censored = time[rows & (event == 0)]
        at = np.searchsorted(times, censored, side="right") - 1
        panel.plot(censored, np.asarray(share)[at], "|", color=line.get_color(), ms=6)
        at_risk = {moment: int((time[rows] >= moment).sum()) for moment in np.linspace(0, time.max(), 5)}
        _write_numbers_at_risk(panel, at_risk, position, line.get_color())
    panel.set_ylim(0, 1.02)
    text = f"{label.time or 'time'} (numbers above: subjects at risk; ticks: censored)"
    panel.set_xlabel(text, labelpad=4 + 10 * len(there), fontsize=8)
    panel.set_ylabel(f"share without the event ({label.name})")
    title = f"log-rank p = {compute_log_rank(time, event, group):.2g}" if len(there) > 1 else "all risks are equal"
    panel.legend(fontsize=8, title=title, title_fontsize=8)


def _write_numbers_at_risk(panel: "Axes", at_risk: dict[float, int], line: int, color: str) -> None:
    """Write the numbers of subjects at risk in one group on a line below the axis."""
    for moment, count in at_risk.items():
        place = dict(
            xytext=(0, -16 - 9 * line), textcoords="offset points", ha="center", va="top", annotation_clip=False
        )
        panel.annotate(str(count), (moment, 0), color=color, fontsize=7, **place)
