"""How well a map finds what is known to be there."""

import numpy as np
import SimpleITK as sitk


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
