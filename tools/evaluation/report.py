"""An evaluation in words."""

from typing import Any

import numpy as np

from tools.evaluation.judge import Judged, Label


def overview(judged: list[tuple[Label, int, Judged]]) -> str:
    """A line a label, a column a table: the kind's first metric with its 95 % interval."""
    names = list(dict.fromkeys(name for *_, found in judged for name in found.figures))
    head = " | ".join(map(_cell, names))
    lines = [f"| label | subjects | metric | {head} |", "| --- | --- | --- |" + " --- |" * len(names)]
    for label, subjects, found in judged:
        metric = next(iter(found.figures["features"]))
        cells = [_interval(found.figures[name][metric], "") for name in names]
        lines.append(f"| {_cell(label.name)} | {subjects} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(judged: list[tuple[Label, int, Judged]]) -> str:
    """A line a label, metric and table: figure, 95 % interval, permuted labels, and paired differences.

    These are what the features have more than the table, and what a table that has another's columns too has more
    than that one.
    """
    lines = [
        "| label | metric | table | figure (95 %) | permuted | features more by (95 %) | adds (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, _, found in judged:
        for table, metrics in found.figures.items():
            for metric, figures in metrics.items():
                more = next((value for key, value in figures.items() if key.endswith("_minus_this")), None)
                added = next((value for key, value in figures.items() if key.startswith("this_minus_")), None)
                cells = [_cell(label.name), metric, _cell(table), _interval(figures, ""), f"{figures['permuted']:.2f}"]
                cells += ["" if paired is None else _interval(paired, "+") for paired in (more, added)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str) -> str:
    """A name that does not end a cell of a table."""
    return name.replace("|", "\\|")


def _interval(figures: dict[str, Any], sign: str) -> str:
    return f"{figures['mean']:{sign}.2f} ({figures['low']:{sign}.2f} to {figures['high']:{sign}.2f})"


SHOWN = 0.005  # differences that two digits show
CHANCE = {"r2": 0.0, "kappa": 0.0, "auroc": 0.5, "c_index": 0.5}


def explain(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """What a reader may stumble over."""
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
            f"R2 below 0 ({', '.join(negative)}): these predictions are farther from the truth than everybody's mean "
            "is, so the features tell nothing of that label that carries over to other patients."
        )
    if chance:
        lines.append(
            f"No better than chance as far as these patients tell ({', '.join(chance)}): the interval of the features "
            "reaches 0, of AUROC and C-index 0.5."
        )
    return lines + _what_is_added(results)


def _what_is_added(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """Whether the features add to the histogram, the question that a clinic has to a network."""
    added, useless = {}, []
    for label, tables in results.items():
        metric, figures = next(iter(tables.get("features+histogram", {"": {}}).items()))
        difference = figures.get("this_minus_histogram")
        if difference is None or np.isnan(difference["mean"]):
            continue
        if figures["mean"] > CHANCE.get(metric, -np.inf):
            added[label] = difference
        else:  # less wrong than a useless histogram is no gain
            useless.append(label)
    if not added:
        return []
    some = [label for label, figures in added.items() if figures["mean"] >= SHOWN]
    more = [label for label in some if added[label]["low"] > 0]
    less = [label for label, figures in added.items() if figures["mean"] <= -SHOWN and figures["high"] < 0]
    line = (
        f"Beside the histogram the features add to it on {len(some)} of {len(added)} label(s), by {SHOWN:g} at least; "
        f"with an interval above 0 on {len(more)}"
    )
    line += f" ({', '.join(more)})" if more else ""
    line += f"; they take from it on {', '.join(less)}" if less else ""
    line += f". Together they tell nothing of {', '.join(useless)}" if useless else ""
    return [line + ". Random weights may add a little too: a model averaged with another is steadier."]
