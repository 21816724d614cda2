"""Network coordinates of the locations, and the neighbours of each location."""

import hashlib

import numpy as np

from data.layout import StoreError


def table_fingerprint(atlas_patch_loc: np.ndarray) -> str:
    """Return sixteen hexadecimal digits that identify a location table (L, 3) int, independent of its dtype on disk."""
    return hashlib.sha256(np.ascontiguousarray(atlas_patch_loc, dtype="<i8").tobytes()).hexdigest()[:16]


def normalize_locations(atlas_patch_loc: np.ndarray) -> np.ndarray:
    """Scale corners by the table's maximum to [-1, 1]: (L, 3) int -> (L, 3) float32.

    The published code (data/copd_patch.py) computes ``loc / loc.max(0) * 2 - 1``. Each value depends on the whole
    table, so a different table would give the published weights different coordinates. If the maximum along an axis
    is 0, all values of this axis become -1.
    """
    table = np.asarray(atlas_patch_loc, dtype=np.float64)
    maximum = table.max(axis=0)
    return (table / np.where(maximum == 0, 1, maximum) * 2 - 1).astype(np.float32)


def neighbor_table(atlas_patch_loc: np.ndarray, k: int) -> np.ndarray:
    """Find the k nearest other locations of each location: (L, 3) int -> (L, k) int64, nearest first; k may be 0.

    The distance is the Euclidean distance between corners; if distances are equal, the lower index comes first.
    Squared distances between integers are exact, so equal distances are always detected. Nearly every location of the
    published atlas has neighbours at equal distances.

    Raises:
        StoreError: the table has fewer than k + 1 locations.
    """
    table = np.asarray(atlas_patch_loc)
    if not 0 <= k < len(table):
        raise StoreError(
            f"--k-neighbors {k} must be below the number of locations, which is {len(table)}"
            + ("; use --beta 0 to train without neighbours" if len(table) == 1 else "")
        )
    neighbors = np.empty((len(table), k), dtype=np.int64)
    for index, corner in enumerate(table):
        squared = ((table - corner) ** 2).sum(axis=1)
        order = np.argsort(squared, kind="stable")
        neighbors[index] = order[order != index][:k]
    return neighbors
