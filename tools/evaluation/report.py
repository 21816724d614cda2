"""An evaluation in words."""

from typing import Any

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
    """A line a label, metric and table: figure, 95 % interval, permuted labels, and what the features have more."""
    lines = [
        "| label | metric | table | figure (95 %) | permuted | features more by (95 %) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, _, found in judged:
        for table, metrics in found.figures.items():
            for metric, figures in metrics.items():
                more = next((value for key, value in figures.items() if key.endswith("_minus_this")), None)
                cells = [_cell(label.name), metric, _cell(table), _interval(figures, ""), f"{figures['permuted']:.2f}"]
                lines.append("| " + " | ".join([*cells, "" if more is None else _interval(more, "+")]) + " |")
    return "\n".join(lines)


def _cell(name: str) -> str:
    """A name that does not end a cell of a table."""
    return name.replace("|", "\\|")


def _interval(figures: dict[str, Any], sign: str) -> str:
    return f"{figures['mean']:{sign}.2f} ({figures['low']:{sign}.2f} to {figures['high']:{sign}.2f})"


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
    return lines
