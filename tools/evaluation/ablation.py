"""Result tables and a plot of an ablation study."""

from pathlib import Path

import numpy as np
import pandas as pd


def summarize_runs(scores_per_run: pd.DataFrame, reference_arm: str) -> pd.DataFrame:
    """Compute mean and SD of R² over seeds, and the paired difference from a reference arm.

    Args:
        scores_per_run: table with arm, seed, column, table, r2; the arm ``baseline`` has one row per column and table.
        reference_arm: the arm that the other arms are compared with.

    Returns:
        One row per label column, arm and table, with mean, sd and seeds. Arms other than ``baseline`` and the reference
        also have the mean and SD of the difference from the reference over shared seeds (difference, difference_sd). An
        undefined number is NaN, for example the SD of one seed.
    """
    found = []
    paired = (
        scores_per_run[scores_per_run["arm"] == reference_arm].set_index(["column", "table", "seed"])["r2"].sort_index()
    )
    for (column, arm, table), group in scores_per_run.groupby(["column", "arm", "table"], sort=False):
        values = group.set_index("seed")["r2"]
        row = {
            "column": column,
            "arm": arm,
            "table": table,
            "mean": values.mean(),
            "sd": values.std(),
            "seeds": len(values),
        }
        both = paired.loc[(column, table)].reindex(values.index).dropna() if (column, table) in paired.index else ()
        if arm not in (reference_arm, "baseline") and len(both):
            difference = values.loc[both.index] - both
            row |= {"difference": difference.mean(), "difference_sd": difference.std()}
        found.append(row)
    columns = ["column", "arm", "table", "mean", "sd", "seeds", "difference", "difference_sd"]
    return pd.DataFrame(found).reindex(columns=columns)


def format_markdown(table: pd.DataFrame, held_out: np.ndarray) -> str:
    """Format R² of the held-out subjects, mean ± SD over seeds: one row per label, one column per arm or baseline."""
    columns = table["column"].unique()
    names = list(dict.fromkeys(zip(table["arm"], table["table"])))
    cells = table.set_index(["column", "arm", "table"])
    heads = [name if arm == "baseline" else f"{arm}: {name}" for arm, name in names]
    lines = [
        f"R² of {int(held_out.sum())} held-out subjects, fitted to {int((~held_out).sum())} other subjects. "
        "Mean ± SD over seeds, and in parentheses the paired difference from the first arm.",
        "",
        "| label | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * len(heads),
    ]
    for column in columns:
        row = [_format_cell(cells.loc[(column, *name)]) for name in names]
        lines.append(f"| {column} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _format_cell(row: pd.Series) -> str:
    text = f"{row['mean']:.2f}"
    if not np.isnan(row["sd"]):
        text += f" ± {row['sd']:.2f}"
    if not np.isnan(row["difference"]):
        text += (
            f" ({row['difference']:+.2f}"
            + ("" if np.isnan(row["difference_sd"]) else f" ± {row['difference_sd']:.2f}")
            + ")"
        )
    return text


def plot_runs(rows: pd.DataFrame, path: Path) -> None:
    """Plot one panel per label: a dot for every run, a line for every baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = rows["column"].unique()
    runs = rows[rows["arm"] != "baseline"]
    runs = runs[runs["table"] == runs["table"].iloc[0]]
    arms = list(runs["arm"].unique())
    wide = min(4, len(columns))
    tall = -(-len(columns) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(3.6 * wide, 2.8 * tall), squeeze=False, layout="constrained")
    for panel in axes.flat[len(columns) :]:
        panel.axis("off")
    for panel, column in zip(axes.flat, columns):
        of_column = runs[runs["column"] == column]
        panel.scatter(of_column["arm"].map(arms.index), of_column["r2"], s=16, color="tab:blue")
        for name, color in (("density", "tab:gray"), ("histogram", "tab:orange")):
            value = rows[(rows["arm"] == "baseline") & (rows["column"] == column) & (rows["table"] == name)]["r2"]
            if len(value):
                panel.axhline(float(value.iloc[0]), color=color, lw=1, label=name)
        panel.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
        panel.set_xlim(-0.5, len(arms) - 0.5)
        low = min(-0.1, float(of_column["r2"].clip(lower=-0.5).min()) - 0.05)
        panel.set_ylim(low, 1)
        panel.set_title(column, fontsize=9)
        panel.set_ylabel("R²", fontsize=8)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
