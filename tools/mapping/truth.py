"""How well a map finds what is known to be there."""

import numpy as np
import pandas as pd
import SimpleITK as sitk

RESAMPLES = 2000  # of the scans


def judge_map(scores: sitk.Image, truth: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Average precision and the best Dice over thresholds, over the voxels of the mask.

    Args:
        scores: float32 on the scan's grid.
        truth: bool, (z, y, x).
        mask: bool, (z, y, x).

    Returns:
        share (of the lung that is positive: what chance's average precision is), average_precision, dice: NaN where
        nothing or everything is positive.
    """
    from sklearn.metrics import precision_recall_curve

    wanted = truth[mask]
    share = float(wanted.mean()) if len(wanted) else float("nan")
    if not 0 < share < 1:
        return {"share": share, "average_precision": float("nan"), "dice": float("nan")}
    precision, recall, _ = precision_recall_curve(wanted, sitk.GetArrayViewFromImage(scores)[mask])
    dice = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    area = float(-np.sum(np.diff(recall) * precision[:-1]))
    return {"share": share, "average_precision": area, "dice": float(dice.max())}


def summary(rows: pd.DataFrame) -> str:
    """A line a label and table: means over scans, and the 95 % interval of the average precision over scans.

    Args:
        rows: column, table, sid, share, average_precision and dice of each map. A scan without what is looked for has
            NaN and is left out.
    """
    lines = [
        "| label | maps by | scans | chance | average precision | best Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (column, table), group in rows.groupby(["column", "table"], sort=False):
        known = group.dropna(subset=["average_precision"]).sort_values("sid")
        if known.empty:
            lines.append(f"| {column} | {table} | 0 | | nothing there to be found | |")
            continue
        values = known["average_precision"].to_numpy()
        drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        lines.append(
            f"| {column} | {table} | {len(values)} | {known['share'].mean():.2f} | {values.mean():.2f} ({low:.2f} to "
            f"{high:.2f}) | {known['dice'].mean():.2f} |"
        )
    return "\n".join(lines)
