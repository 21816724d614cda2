"""Result tables of an evaluation in Markdown, with explanations."""

from typing import Any

import numpy as np

from tools.evaluation.judge import Evaluation, Label


def format_metric_overview(evaluations: list[tuple[Label, int, Evaluation]]) -> str:
    """Format each label's main metric and 95 % interval as a table: one row per label, one column per feature table."""
    names = list(dict.fromkeys(name for *_, found in evaluations for name in found.figures))
    head = " | ".join(map(_escape_cell, names))
    lines = [f"| label | subjects | metric | {head} |", "| --- | --- | --- |" + " --- |" * len(names)]
    for label, subjects, found in evaluations:
        metric = next(iter(found.figures["features"]))
        cells = [_format_mean_and_interval(found.figures[name][metric], "") for name in names]
        lines.append(f"| {_escape_cell(label.name)} | {subjects} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_metrics_table(judged: list[tuple[Label, int, Evaluation]]) -> str:
    """Return one row per label, metric and table: value, interval, value for permuted labels, and paired differences.

    The column "features minus this" is the metric of the features minus the metric of the table. If the table includes
    another table, the column "gain" is the metric of the table minus the metric of the included table.
    """
    lines = [
        "| label | metric | table | value (95 %) | permuted | features minus this (95 %) | gain (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, _, found in judged:
        for table, metrics in found.figures.items():
            for metric, figures in metrics.items():
                more = next((value for key, value in figures.items() if key.endswith("_minus_this")), None)
                added = next((value for key, value in figures.items() if key.startswith("this_minus_")), None)
                cells = [
                    _escape_cell(label.name),
                    metric,
                    _escape_cell(table),
                    _format_mean_and_interval(figures, ""),
                    f"{figures['permuted']:.2f}",
                ]
                cells += ["" if paired is None else _format_mean_and_interval(paired, "+") for paired in (more, added)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _escape_cell(name: str) -> str:
    """Escape | in a name, because the character would end a table cell."""
    return name.replace("|", "\\|")


def _format_mean_and_interval(figures: dict[str, Any], sign_format: str) -> str:
    return (
        f"{figures['mean']:{sign_format}.2f} ({figures['low']:{sign_format}.2f} to {figures['high']:{sign_format}.2f})"
    )


SHOWN = 0.005  # smallest difference that is visible with two decimals
CHANCE = {"r2": 0.0, "kappa": 0.0, "auroc": 0.5, "c_index": 0.5}


def explain_results(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """Return lines of the report that explain surprising results."""
    negative, chance = [], []
    for label, tables in results.items():
        metric, figures = next(iter(tables["features"].items()))
        if metric == "r2" and figures["mean"] < 0:
            negative.append(label)
        elif metric in CHANCE and figures["low"] <= CHANCE[metric] <= figures["high"]:
            chance.append(label)
    lines = []
    if negative:
        lines.append(
            f"R2 below 0 ({', '.join(negative)}): the predictions are worse than the mean of all subjects, so the "
            "features do not predict these labels in new subjects."
        )
    if chance:
        lines.append(
            f"Not distinguishable from chance with these subjects ({', '.join(chance)}): the interval of the features "
            "includes 0 (0.5 for AUROC and C-index)."
        )
    return lines + _explain_gain_over_histogram(results)


def _explain_gain_over_histogram(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """Return a line that states whether adding the features to the histogram improves the predictions."""
    added, useless = {}, []
    for label, tables in results.items():
        metric, figures = next(iter(tables.get("features+histogram", {"": {}}).items()))
        difference = figures.get("this_minus_histogram")
        if difference is None or np.isnan(difference["mean"]):
            continue
        if figures["mean"] > CHANCE.get(metric, -np.inf):
            added[label] = difference
        else:  # the combination is not better than chance, so its difference from the histogram is not a gain
            useless.append(label)
    if not added:
        return []
    some = [label for label, figures in added.items() if figures["mean"] >= SHOWN]
    more = [label for label in some if added[label]["low"] > 0]
    less = [label for label, figures in added.items() if figures["mean"] <= -SHOWN and figures["high"] < 0]
    line = (
        f"Adding the features to the histogram improves {len(some)} of {len(added)} label(s) by at least {SHOWN:g}; "
        f"the interval is above 0 for {len(more)}"
    )
    line += f" ({', '.join(more)})" if more else ""
    line += f"; it is worse for {', '.join(less)}" if less else ""
    line += f". Even together they do not predict {', '.join(useless)}" if useless else ""
    return [line + ". Random weights may also add a little, because averaging two models reduces noise."]
