"""Compare maps of predictions with label images."""

import numpy as np
import pandas as pd
import SimpleITK as sitk

RESAMPLES = 2000  # bootstrap resamples over scans


def score_map(scores: sitk.Image, truth: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Compute average precision, and the best Dice over all thresholds, from the voxels of the mask.

    Args:
        scores: the map, float32 on the grid of the scan.
        truth: (z, y, x) bool, the positive voxels.
        mask: (z, y, x) bool, the voxels to evaluate.

    Returns:
        share: share of positive voxels in the mask, which is also the average precision of a random map.
        average_precision, dice: NaN if no voxel or every voxel of the mask is positive.
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


def format_map_accuracy_table(scores_per_map: pd.DataFrame) -> str:
    """Format means over scans, and the 95 % interval of average precision: one row per label and table.

    Args:
        scores_per_map: one row per map, with columns named column, table, sid, share, average_precision and dice.
            Scans without an average precision (NaN) are left out.
    """
    lines = [
        "| label | map from | scans | chance | average precision | best Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (column, table), group in scores_per_map.groupby(["column", "table"], sort=False):
        known = group.dropna(subset=["average_precision"]).sort_values("sid")
        if known.empty:
            lines.append(f"| {column} | {table} | 0 | | no positive voxels | |")
            continue
        values = known["average_precision"].to_numpy()
        drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        lines.append(
            f"| {column} | {table} | {len(values)} | {known['share'].mean():.2f} | {values.mean():.2f} ({low:.2f} to "
            f"{high:.2f}) | {known['dice'].mean():.2f} |"
        )
    return "\n".join(lines)
