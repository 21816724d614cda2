"""What the network is told of where a patch lies, and which patches are its neighbours."""

import hashlib

import numpy as np

from data.layout import StoreError


def table_fingerprint(atlas_patch_loc: np.ndarray) -> str:
    """Sixteen digits that tell one table of corners, (L, 3) int, from another, whatever its dtype on disk."""
    return hashlib.sha256(np.ascontiguousarray(atlas_patch_loc, dtype="<i8").tobytes()).hexdigest()[:16]


def normalize_locations(atlas_patch_loc: np.ndarray) -> np.ndarray:
    """Corners scaled by the table's own maximum to [-1, 1]: (L, 3) int -> (L, 3) float32.

    ``loc / loc.max(0) * 2 - 1`` as published (data/copd_patch.py). So the table as a whole sets
    every value: with another table, the published weights are asked about other places. An axis
    whose maximum is 0 gives -1.
    """
    table = np.asarray(atlas_patch_loc, dtype=np.float64)
    maximum = table.max(axis=0)
    return (table / np.where(maximum == 0, 1, maximum) * 2 - 1).astype(np.float32)


def neighbor_table(atlas_patch_loc: np.ndarray, k: int) -> np.ndarray:
    """The k nearest other locations of each: (L, 3) int -> (L, k) int64, nearest first; k may be 0.

    Euclidean distance of corners, ties to the lower index. Squared distances of whole numbers are
    exact, so a tie is a tie; on the published atlas nearly every location has some.

    Raises:
        StoreError: there are not k other locations.
    """
    table = np.asarray(atlas_patch_loc)
    if not 0 <= k < len(table):
        raise StoreError(
            f"--k-neighbors {k} with {len(table)} locations: it must be below the number of locations"
            + ("; --beta 0 needs no neighbours" if len(table) == 1 else "")
        )
    neighbors = np.empty((len(table), k), dtype=np.int64)
    for index, corner in enumerate(table):
        squared = ((table - corner) ** 2).sum(axis=1)
        order = np.argsort(squared, kind="stable")
        neighbors[index] = order[order != index][:k]
    return neighbors
