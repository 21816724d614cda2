"""Tables and plots of test metrics against the number of labelled subjects (label-efficiency curves)."""

from pathlib import Path

import pandas as pd


def format_markdown(table: pd.DataFrame, metrics: list[str]) -> str:
    """Format the mean and SD of test metrics over seeds: a row per fraction of labels, a column per arm and metric."""
    arms = list(dict.fromkeys(table["arm"]))
    heads = [f"{arm}: {metric}" for arm in arms for metric in metrics]
    lines = ["| fraction | labelled subjects | " + " | ".join(heads) + " |", "| --- | --- |" + " --- |" * len(heads)]
    for fraction, group in table.groupby("fraction"):
        cells = [f"{fraction:g}", f"{group['patients'].median():.0f}"]
        for arm in arms:
            for metric in metrics:
                values = group.loc[group["arm"] == arm, metric]
                spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.2f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_curve(table: pd.DataFrame, metric: str, path: Path) -> None:
    """Plot a metric against the number of labelled subjects: a dot per fit, a line through the means of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(4.8, 3.6), layout="constrained")
    for arm, group in table.groupby("arm", sort=False):
        (line,) = panel.plot(group.groupby("patients")[metric].mean(), marker="o", ms=4, label=arm)
        panel.scatter(group["patients"], group[metric], s=8, alpha=0.5, color=line.get_color())
    panel.set_xscale("log")
    panel.set_ylim(bottom=max(-0.5, panel.get_ylim()[0]))
    panel.set_xlabel("labelled subjects")
    panel.set_ylabel(f"{metric} of test subjects")
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
