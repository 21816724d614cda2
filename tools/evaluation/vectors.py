"""Patient vectors: one vector per subject, computed from the features of its patches.

- `mean` is the mean over locations, as published.
- `moments` first standardises each location by mean and SD over the subjects that a model is fitted to, because
  features differ more between locations than between subjects. The vector is the mean and the SD of the standardised
  features over locations.
- `layers` is computed like `moments`, but from the output of extract_feature.py --layers: the mean and SD of every
  layer's channels within each patch. The features in `layers` describe finer structures than h does, and
  also the variation within a patch.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from misc.command import UserError
from misc.files import write_atomically

VECTORS = ("mean", "moments", "layers")
FILES = {"moments": "pred_arr_patch_full.npy", "layers": "layer_arr_patch_full.npy"}
LARGEST_Z = 10.0  # a channel that is off in all fitted subjects but on in another subject would exceed 100,000 SD
LEAST_SD = 1e-6  # features with a smaller SD over subjects at a location are set to 0, for example constant features
KEPT_BYTES = 2**29  # bytes; maximum size of the cache for the vectors of several folds
BYTES_AT_ONCE = 2**26  # bytes of patch features read at once; a memory-mapped file may be larger than the memory


class Standardization(NamedTuple):
    """Mean and SD of each feature at each location over the subjects that a model is fitted to."""

    kind: str  # moments or layers
    mean: np.ndarray  # (L, D) float64
    factor: np.ndarray  # (L, D) float64: 1 / SD, or 0 if a feature does not vary

    @classmethod
    def fit(cls, vector_kind: str, patch_features: np.ndarray, rows: np.ndarray) -> "Standardization":
        """Compute the mean and SD over ``rows`` of ``patch_features`` (N, L, D) in one pass over the file or array."""
        total = squares = 0.0
        # Subtracting one subject's features from all features keeps the sums of squares accurate.
        origin = np.asarray(patch_features[rows[0]], dtype=np.float64)  # (L, D)
        for some in _split_rows_into_blocks(patch_features, rows):
            apart = np.asarray(patch_features[some], dtype=np.float64) - origin
            total = total + apart.sum(axis=0)
            squares = squares + np.einsum("nld,nld->ld", apart, apart)
        mean = total / len(rows)
        sd = np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))
        factor = np.divide(1, sd, out=np.zeros_like(sd), where=sd > LEAST_SD)
        return cls(vector_kind, origin + mean, factor)

    def compute_patient_vectors(self, patches: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return mean and SD of standardised features over locations, of n rows: (N, L, D) -> (n, 2 D), means first.

        Standardised features are clipped to ± LARGEST_Z.
        """
        rows = np.arange(len(patches)) if rows is None else rows
        found = np.empty((len(rows), 2 * self.mean.shape[1]))
        start = 0
        for some in _split_rows_into_blocks(patches, rows):
            z = (np.asarray(patches[some], dtype=np.float64) - self.mean) * self.factor  # (n, L, D)
            np.clip(z, -LARGEST_Z, LARGEST_Z, out=z)
            mean = z.mean(axis=1)
            z -= mean[:, None]
            spread = np.sqrt(np.einsum("nld,nld->nd", z, z) / z.shape[1])
            found[start : start + len(some)] = np.concatenate([mean, spread], axis=1)
            start += len(some)
        return found

    def save(self, path: Path, checkpoint_sha256: str = "") -> None:
        """Write an .npz file that loads without pickle."""
        arrays = {"kind": np.array(self.kind), "mean": self.mean, "factor": self.factor}
        arrays["checkpoint_sha256"] = np.array(checkpoint_sha256)
        write_atomically(path, lambda stream: np.savez(stream, **arrays))

    @classmethod
    def load_with_checkpoint_sha256(cls, path: str | os.PathLike) -> tuple["Standardization", str]:
        """Read a file that :meth:`save` wrote. Return the standardisation and the checkpoint's SHA-256.

        Raises UserError if the file is not valid.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                found = cls(str(content["kind"]), content["mean"], content["factor"])
                checkpoint = str(content["checkpoint_sha256"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"--standardization {path} is not a standardization.npz written by evaluate.py --out-dir: {error}"
            ) from error
        if found.kind not in FILES or found.mean.ndim != 2 or found.mean.shape != found.factor.shape:
            raise UserError(
                f"--standardization {path} is not a valid standardization.npz; run evaluate.py --out-dir again"
            )
        return found, checkpoint


def _split_rows_into_blocks(patches: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Split row numbers into parts with about BYTES_AT_ONCE bytes of patch features each."""
    each = max(1, BYTES_AT_ONCE // (8 * max(1, patches[0].size)))
    return [rows[start : start + each] for start in range(0, len(rows), each)]


class PatientVectors:
    """Patient vectors of N subjects, standardised over the subjects that a model is fitted to.

    PatientVectors can replace a table (N, 2 D): learn.py calls ``compute_standardized_features`` for each set of
    subjects that a model is fitted to.

    Args:
        kind: kind of patient vector, ``moments`` or ``layers``.
        patches: (N', L, D) patch features.
        rows: (N,) row of each subject in ``patches``.
    """

    def __init__(self, kind: str, patches: np.ndarray, rows: np.ndarray):
        self.kind, self.patches, self.rows = kind, patches, rows
        self.shape = len(rows), 2 * patches.shape[2]
        # The objects that __getitem__ returns share this cache.
        self._kept: OrderedDict[tuple[bytes, bytes], np.ndarray] = OrderedDict()

    def __getitem__(self, row_mask: np.ndarray) -> "PatientVectors":
        """Select the rows in ``row_mask``."""
        part = PatientVectors(self.kind, self.patches, self.rows[row_mask])
        part._kept = self._kept
        return part

    def compute_standardized_features(self, fitted_subject_mask: np.ndarray) -> np.ndarray:
        """Return vectors (N, 2 D), standardised with the mean and SD of the subjects in a mask (N,) bool.

        Results are cached, because several tables use the same folds.
        """
        key = self.rows.tobytes(), fitted_subject_mask.tobytes()
        if key not in self._kept:
            standardization = Standardization.fit(self.kind, self.patches, self.rows[fitted_subject_mask])
            self._kept[key] = standardization.compute_patient_vectors(self.patches, self.rows)
            while len(self._kept) > max(1, KEPT_BYTES // self._kept[key].nbytes):
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class JoinedTable:
    """Feature tables side by side. Any of them may be PatientVectors, which are standardised for each fitted model."""

    def __init__(self, *tables: "np.ndarray | PatientVectors | JoinedTable"):
        self.tables = tables
        self.shape = (
            len(tables[0]) if isinstance(tables[0], np.ndarray) else tables[0].shape[0],
            sum(table.shape[1] for table in tables),
        )

    def __getitem__(self, rows: np.ndarray) -> "JoinedTable":
        return JoinedTable(*(table[rows] for table in self.tables))

    def compute_standardized_features(self, fitted_subject_mask: np.ndarray) -> np.ndarray:
        return np.hstack([get_features_fitted_to_rows(table, fitted_subject_mask) for table in self.tables])


Table = np.ndarray | PatientVectors | JoinedTable


def get_features_fitted_to_rows(table: Table, fitted_rows: np.ndarray) -> np.ndarray:
    """Return the features (N, D) of a table for a model that is fitted to the rows in ``fitted_rows``, (N,) bool."""
    return table if isinstance(table, np.ndarray) else table.compute_standardized_features(fitted_rows)


def join_tables(*tables: Table) -> Table:
    """Join tables by columns."""
    if all(isinstance(table, np.ndarray) for table in tables):
        return np.hstack(tables)
    return JoinedTable(*tables)
