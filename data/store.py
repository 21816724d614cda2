"""Reading a patch store: ours, and the published implementation's as it is."""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from data.layout import HU_MAX, HU_MIN, PATCH_SIZE, StoreError, StoreLayout, load_locations
from data.tables import read_table


class PatchStore:
    """Patches of N subjects at L locations, read a (location, subjects) block at a time.

    Attributes:
        locations: (L, 3) int64 corners, atlas voxel index (x, y, z).
        sids: N subject names; row n of every read is sids[n].
        grouped: True when grouped_patch/ is read, False when patch/ is.

    Args:
        root: ``--root-dir``.
        require_grouped: raise rather than fall back on patch/ (training reads one location of many
            subjects at each step; from patch/ that is one seek per sample).

    Raises:
        StoreError: something is missing or files disagree; the message names the file.
    """

    def __init__(self, root: str | os.PathLike, require_grouped: bool = False):
        self.layout = StoreLayout(root)
        self.locations = load_locations(self.layout.find_atlas_patch_loc())
        self.grouped = self.layout.grouped(0).is_file()
        if self.grouped:
            self._open_grouped()
        elif require_grouped:
            raise StoreError(
                f"{self.layout.grouped_dir} has no patch_loc_0.npy; run "
                f"python preprocess/group_patches.py --root-dir {self.layout.root}"
            )
        else:
            self._open_by_subject()

    @property
    def num_locations(self) -> int:
        return len(self.locations)

    @property
    def num_subjects(self) -> int:
        return len(self.sids)

    # ------------------------------------------------------------ opening

    def _open_grouped(self) -> None:
        self._files = [_PatchFile(self.layout.grouped(index)) for index in range(self.num_locations)]
        if self.layout.subjects.is_file():
            self.sids = read_table(self.layout.subjects)["sid"].tolist()
            source = self.layout.subjects
        else:
            self.sids = self.layout.patch_sids()
            source = self.layout.patch_dir
            if not self.sids:  # only grouped files were kept: rows stay rows, without their names
                self.sids = [f"row{row:05d}" for row in range(self._files[0].shape[0])]
        wanted = (len(self.sids), PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
        for file in self._files:
            if file.shape != wanted:
                raise StoreError(
                    f"{file.path} has shape {file.shape}, but {source} lists {len(self.sids)} subjects, so it must be "
                    f"{wanted}; run preprocess/group_patches.py --root-dir {self.layout.root} again"
                )
        extra = self.layout.grouped(self.num_locations)
        if extra.exists():
            raise StoreError(
                f"{extra} exists, but the location table has only {self.num_locations} rows: another table's store"
            )

    def _open_by_subject(self) -> None:
        self.sids = self.layout.patch_sids()
        if not self.sids:
            raise StoreError(f"--root-dir {self.layout.root} has neither grouped_patch/ nor patch/ with patches in it")
        self._files = [_PatchFile(self.layout.patch(sid)) for sid in self.sids]
        wanted = (self.num_locations, PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
        for file in self._files:
            if file.shape != wanted:
                raise StoreError(
                    f"{file.path} has shape {file.shape}, but the location table asks for {wanted}; "
                    "cut it again with preprocess/patchify_images.py"
                )

    # ------------------------------------------------------------ reading

    def read(self, location: int, rows: np.ndarray) -> np.ndarray:
        """Patches of some subjects at one location: (n, 32, 32, 32), each (z, y, x), in HU.

        int16 as stored. Other dtypes, which the published implementation allowed, come back clipped
        to the HU range with NaN as -1024: whole numbers as int16, floats as float32.
        """
        if self.grouped:
            return self._files[location].read_rows(rows)
        return np.stack([self._files[row].read_rows(np.array([location]))[0] for row in rows])

    def bytes_per_patch(self) -> int:
        """Bytes on disk of one patch."""
        return self._files[0].dtype.itemsize * PATCH_SIZE**3


class _PatchFile:
    """One .npy file of patches, opened when first read so that worker processes open their own."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as stream:
                version = np.lib.format.read_magic(stream)
                reader = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                self.shape, self.fortran, self.dtype = reader(stream)
                self.offset = stream.tell()
                size = os.fstat(stream.fileno()).st_size
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read as a NumPy file of patches: {error}") from error
        if self.dtype.kind not in "iufb":
            raise StoreError(f"{path} has dtype {self.dtype}; patches are real numbers in HU")
        expected = self.offset + int(np.prod(self.shape)) * self.dtype.itemsize
        if size < expected:
            raise StoreError(f"{path} is truncated: {size} bytes of {expected}; make it again")
        self._array = None

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        if self._array is None:
            order = "F" if self.fortran else "C"
            self._array = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
        return _to_hu(np.asarray(self._array[rows]))


def _to_hu(patches: np.ndarray) -> np.ndarray:
    """int16 unchanged; any other real dtype clipped to the HU range, NaN as the lowest value."""
    if patches.dtype == np.int16 and patches.dtype.isnative:
        return patches
    if patches.dtype.kind == "f":
        patches = np.nan_to_num(patches.astype(np.float32), nan=HU_MIN, posinf=HU_MAX, neginf=HU_MIN)
        return np.clip(patches, HU_MIN, HU_MAX)
    if patches.dtype.kind == "u":
        return np.minimum(patches, HU_MAX).astype(np.int16)
    return np.clip(patches.astype(np.int64), HU_MIN, HU_MAX).astype(np.int16)


def read_labels(path: str | os.PathLike, sids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numeric columns of a label CSV for the given subjects.

    Args:
        path: CSV with a column sid, each subject at most once; columns without a number in every
            filled cell are left out.
        sids: the wanted row order.

    Returns:
        (N, P) float32, NaN where the subject or the value is missing; the P column names.

    Raises:
        StoreError: no such file, no sid column, a sid twice, no numeric column, or no subject of
            the store in it.
    """
    table = read_table(path).set_index("sid")
    numeric = {}
    for name in table.columns:
        text = table[name].str.strip()
        values = pd.to_numeric(text.where(~text.isin(["", "NA", "NaN", "nan", "."])), errors="coerce")
        filled = ~text.isin(["", "NA", "NaN", "nan", "."])
        if filled.any() and values[filled].notna().all():
            numeric[name] = values
    if not numeric:
        raise StoreError(f"{path} has no numeric column beside sid")
    if not set(sids) & set(table.index):
        raise StoreError(
            f"{path} has none of the store's subjects (the store's first is {sids[0]!r}, "
            f"the table's {table.index[0]!r})"
        )
    labels = pd.DataFrame(numeric, index=table.index).reindex(sids)
    return labels.to_numpy(dtype=np.float32), list(numeric)
