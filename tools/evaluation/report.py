"""An evaluation in words."""

from typing import Any

from tools.evaluation.judge import Judged, Label


def overview(judged: list[tuple[Label, int, Judged]]) -> str:
    """A line a label, a column a table: the kind's first metric with its 95 % interval."""
    names = list(dict.fromkeys(name for *_, found in judged for name in found.figures))
    lines = ["| label | subjects | metric | " + " | ".join(names) + " |", "| --- | --- | --- |" + " --- |" * len(names)]
    for label, subjects, found in judged:
        metric = next(iter(found.figures["features"]))
        cells = [_interval(found.figures[name][metric], "") for name in names]
        lines.append(f"| {label.name} | {subjects} | {metric} | " + " | ".join(cells) + " |")
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
                cells = [label.name, metric, table, _interval(figures, ""), f"{figures['permuted']:.2f}"]
                lines.append("| " + " | ".join([*cells, "" if more is None else _interval(more, "+")]) + " |")
    return "\n".join(lines)


def _interval(figures: dict[str, Any], sign: str) -> str:
    return f"{figures['mean']:{sign}.2f} ({figures['low']:{sign}.2f} to {figures['high']:{sign}.2f})"


def explain(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> list[str]:
    """What a reader may stumble over."""
    negative = [column for column, tables in results.items() if tables["features"].get("r2", {"mean": 0})["mean"] < 0]
    if not negative:
        return []
    return [
        f"R2 below 0 ({', '.join(negative)}): these predictions are farther from the truth than everybody's mean is, "
        "so the features tell nothing of that label that carries over to other patients."
    ]
