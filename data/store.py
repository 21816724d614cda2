"""Read a patch store that this package or the published implementation has made.

A store must not change while it is open. If a file of an open store changes, the next read fails with an error, so rows
of two different groupings are never mixed.
"""

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.layout import StoreError, StoreLayout, load_locations, to_hu
from data.locations import table_fingerprint
from data.tables import read_table
from misc.files import read_array_header
from misc.sizes import PATCH_SIZE

SAMPLE_BYTES = 4096  # the store's hash includes this many bytes from each end of a file's data
COMPARED = 20  # maximum number of subjects to compare if their files in patch/ are newer than grouped_patch/
NAMED = 3  # maximum number of subjects that a message names
MAX_OPEN = 128  # maximum number of mapped files; many systems allow only 1024 open files per process


class PatchStore:
    """Patches of N subjects at L locations. Each read returns the patches of many subjects at one location.

    Attributes:
        locations: (L, 3) int64 corners, atlas voxel index (x, y, z).
        sids: N subject names; row n of the store belongs to sids[n].
        grouped: True if patches are read from grouped_patch/, False if from patch/.

    Args:
        root: the folder of the store, ``--root-dir``.
        require_grouped: raise an error instead of falling back to patch/. A training step reads many
            subjects at one location; from patch/, each subject would need a separate disk access.
        subjects: CSV with a column sid; only these subjects are read, in the order of the store.

    Raises:
        StoreError: a file is missing or files contradict each other; the message names the file.
    """

    def __init__(
        self, root: str | os.PathLike, require_grouped: bool = False, subjects: str | os.PathLike | None = None
    ):
        self.layout = StoreLayout(root)
        self._mapped: deque[PatchFile] = deque()
        self._tables = (
            self.layout.find_atlas_patch_loc(),
            self.layout.subjects_csv,
            self.layout.grouping_inputs_record_path,
        )
        self._stamps = [read_inode_size_and_mtime_ns(path) for path in self._tables]
        self.locations = load_locations(self._tables[0])
        self.grouped = self.layout.grouped_patch_file(0).is_file()
        if self.grouped:
            self._open_grouped()
        elif require_grouped:
            raise StoreError(
                f"{self.layout.grouped_dir} does not have patch_loc_0.npy; run "
                f"python preprocess/group_patches.py --root-dir {self.layout.root}"
            )
        else:
            self._open_subject_files()
        self._stored = list(self.sids)  # the subject of each row in the files
        self._rows = np.arange(len(self.sids))  # for each selected subject, its row in the files
        if subjects is not None:
            self._select_subjects(subjects)
        self.check_store_files_unchanged()  # group_patches.py may have finished while the files were being opened

    @property
    def num_locations(self) -> int:
        return len(self.locations)

    @property
    def num_subjects(self) -> int:
        return len(self.sids)

    @property
    def patch_file_paths(self) -> list[Path]:
        """All files from which patches are read."""
        return [file.path for file in self._files]

    # ------------------------------------------------------------ version

    @functools.cached_property
    def version(self) -> str:
        """Sixteen hexadecimal digits that identify the content of this store, independent of its path.

        The version is a hash of the location table, the stored and the selected subjects, grouped.json, and the shape
        and the first and last SAMPLE_BYTES of each file. A store made by the published code has no grouped.json.
        """
        digest = hashlib.sha256(repr((self._stored, self.sids, table_fingerprint(self.locations))).encode())
        if self.grouped and self.layout.grouping_inputs_record_path.is_file():
            digest.update(self.layout.grouping_inputs_record_path.read_bytes())
        for file in self._files:
            digest.update(repr((file.shape, file.dtype.str, file.fortran)).encode() + file.read_first_and_last_bytes())
        self.check_store_files_unchanged()
        return digest.hexdigest()[:16]

    def collect_identity(self) -> dict[str, object]:
        """Return the properties of the store that identify the data of a run.

        Outputs record these properties, and a resumed run compares the properties of its store with those in its
        checkpoint.
        """
        table = {"location_table": table_fingerprint(self.locations)}
        return {"num_subjects": self.num_subjects, "store_version": self.version, **table}

    def check_store_files_unchanged(self) -> None:
        """Raise StoreError if a table or a patch file has changed since the store was opened."""
        for path, stamp in zip(self._tables, self._stamps):
            if read_inode_size_and_mtime_ns(path) != stamp:
                raise StoreError(explain_changed_store_file(path))
        for file in self._files:
            file.check_file_unchanged()

    def describe_outdated_grouped_files(self) -> Iterator[str]:
        """Yield a message for each difference between patch/ and the grouped files."""
        there = self.layout.patch_sids() if self.grouped else []
        if not there:  # patch/ may have been removed after grouping
            return
        again = f"python preprocess/group_patches.py --root-dir {self.layout.root}"
        grouped = set(self._stored)
        missing = [sid for sid in there if sid not in grouped]
        if missing:
            names = summarize_sids(missing)
            yield f"{names} in patch/ but not in grouped_patch/ will not be read; run {again} to add them"
        gone = sorted(grouped.difference(there))
        if gone:
            names = summarize_sids(gone)
            yield f"{names} in grouped_patch/ but no longer in patch/ will be read; run {again} to drop them"
        if self.layout.grouping_inputs_record_path.is_file():
            grouped_at = self.layout.grouping_inputs_record_path.stat().st_mtime_ns
            newer = [sid for sid in there if sid in grouped and self.layout.patch(sid).stat().st_mtime_ns > grouped_at]
            if newer and self.do_patches_differ_from_grouped(newer[:COMPARED]):
                changed = f"{summarize_sids(newer)} in patch/ changed after grouping"
                yield f"{changed}, but the old patches will be read; run {again}"

    def do_patches_differ_from_grouped(self, sids: list[str]) -> bool:
        """Return whether any subject's first patch differs between patch/ and grouped_patch/.

        Modification times alone are not enough, because copying a store changes these times.
        """
        for sid in sids:
            own = PatchFile(self.layout.patch(sid), self._mapped).read_rows(np.array([0]))
            grouped = self._files[0].read_rows(np.array([self._stored.index(sid)]))
            if not np.array_equal(np.rint(own), np.rint(grouped)):
                return True
        return False

    # ------------------------------------------------------------ opening

    def _open_grouped(self) -> None:
        self._files = [
            PatchFile(self.layout.grouped_patch_file(index), self._mapped) for index in range(self.num_locations)
        ]
        if self.layout.subjects_csv.is_file():
            self.sids = read_table(self.layout.subjects_csv, file_names=False)["sid"].tolist()
            source = self.layout.subjects_csv
        elif self.layout.temporary_grouping_dir.is_dir():
            raise StoreError(
                f"{self.layout.grouped_dir} is incomplete because grouping was interrupted; run "
                f"python preprocess/group_patches.py --root-dir {self.layout.root} to finish it"
            )
        else:
            self.sids = self.layout.patch_sids()
            source = self.layout.patch_dir
            if not self.sids:  # without subjects.csv and patch/, the subjects' names are unknown
                self.sids = [f"row{row:05d}" for row in range(self._files[0].shape[0])]
        wanted = (len(self.sids), PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
        for file in self._files:
            if file.shape != wanted:
                raise StoreError(
                    f"{file.path} has shape {file.shape}, but {source} lists {len(self.sids)} subjects, so the "
                    f"shape must be {wanted}; run preprocess/group_patches.py --root-dir {self.layout.root} again"
                )
        extra = self.layout.grouped_patch_file(self.num_locations)
        if extra.exists():
            raise StoreError(
                f"{extra} exists, but the location table has only {self.num_locations} rows; use the location table "
                "that the patches were cut with"
            )

    def _open_subject_files(self) -> None:
        self.sids = self.layout.patch_sids()
        if not self.sids:
            raise StoreError(f"--root-dir {self.layout.root} has no patches, neither in grouped_patch/ nor in patch/")
        self._files = [PatchFile(self.layout.patch(sid), self._mapped) for sid in self.sids]
        wanted = (self.num_locations, PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
        for file in self._files:
            if file.shape != wanted:
                raise StoreError(
                    f"{file.path} has shape {file.shape}, but the location table requires {wanted}; "
                    "cut the patches again with preprocess/patchify_images.py"
                )

    def _select_subjects(self, subjects: str | os.PathLike) -> None:
        """Keep only the subjects that a table lists."""
        wanted = set(read_table(subjects, file_names=False)["sid"])
        lacking = sorted(wanted.difference(self.sids))
        if lacking:
            raise StoreError(
                f"{subjects}: {len(lacking)} of its {len(wanted)} subjects are not in {self.layout.root}, for example "
                f"{lacking[0]!r}; the first sid in the store is {self.sids[0]!r}"
            )
        self._rows = np.array([row for row, sid in enumerate(self.sids) if sid in wanted])
        self.sids = [self.sids[row] for row in self._rows]

    # ------------------------------------------------------------ reading

    def read(self, location: int, rows: np.ndarray) -> np.ndarray:
        """Read patches of some subjects at one location: (n, 32, 32, 32), each (z, y, x), in HU.

        int16 values are returned as stored. Values of other dtypes, which the published implementation allows, are
        clipped to the HU range, and NaN becomes -1024. Integers are returned as int16, floats as float32.
        """
        rows = self._rows[rows]
        if self.grouped:
            return self._files[location].read_rows(rows)
        return np.stack([self._files[row].read_rows(np.array([location]))[0] for row in rows])


def summarize_sids(sids: list[str]) -> str:
    """Return the number of subjects and the first few names, for a message."""
    names = ", ".join(sids[:NAMED]) + (", ..." if len(sids) > NAMED else "")
    return f"{len(sids)} subject{'s' if len(sids) > 1 else ''} ({names})"


def read_inode_size_and_mtime_ns(path: Path) -> tuple[int, int, int] | None:
    """Return inode, size and modification time of a file, or None if the file does not exist."""
    try:
        return select_inode_size_and_mtime_ns(os.stat(path))
    except OSError:
        return None


def select_inode_size_and_mtime_ns(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def explain_changed_store_file(path: Path) -> str:
    return (
        f"{path} has changed since this run opened the store, for example because patches were grouped again or a "
        "subject was added. Wait until preprocessing has finished, then start again"
    )


class PatchFile:
    """One .npy file of patches, memory-mapped at the first read, so that each data-loader worker makes its own mapping.

    ``mapped_files`` lists all memory-mapped files of the store. If more than MAX_OPEN files are mapped, the oldest
    mapping is closed.
    """

    def __init__(self, path: Path, mapped_files: "deque[PatchFile]"):
        self.path = path
        self._mapped = mapped_files
        try:
            with open(path, "rb") as stream:
                self.shape, self.fortran, self.dtype = read_array_header(stream)
                self.offset = stream.tell()
                status = os.fstat(stream.fileno())
        except FileNotFoundError:
            raise StoreError(f"{path} does not exist; run preprocess/group_patches.py again") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise StoreError(f"{path} is {error}; create it again") from error
        if self.dtype.kind not in "iufb":
            raise StoreError(f"{path} has dtype {self.dtype}, but patches must be real numbers in HU")
        expected = self.offset + int(np.prod(self.shape)) * self.dtype.itemsize
        self._stamp, self._end = select_inode_size_and_mtime_ns(status), expected
        self._array = None

    def check_file_unchanged(self) -> None:
        """Raise StoreError if the file was replaced or written to after it was opened."""
        if read_inode_size_and_mtime_ns(self.path) != self._stamp:
            raise StoreError(explain_changed_store_file(self.path))

    def read_first_and_last_bytes(self) -> bytes:
        """Read the first and the last SAMPLE_BYTES of the patches."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            start = stream.read(min(SAMPLE_BYTES, self._end - self.offset))
            stream.seek(max(self.offset, self._end - SAMPLE_BYTES))
            return start + stream.read(min(SAMPLE_BYTES, self._end - self.offset))

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Read rows, and convert the values to HU with :func:`to_hu`."""
        return to_hu(self.read_rows_in_stored_dtype(rows))

    def read_rows_in_stored_dtype(self, rows: np.ndarray) -> np.ndarray:
        """Read rows in the stored dtype."""
        array = self._array  # keep a local reference, because another thread may close the mapping
        self.check_file_unchanged()  # check before reading, because reading a truncated mapped file kills the process
        if array is None:
            order = "F" if self.fortran else "C"
            array = self._array = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
            self._mapped.append(self)
            if len(self._mapped) > MAX_OPEN:
                self._mapped.popleft()._array = None
        patches = np.asarray(array[rows])
        self.check_file_unchanged()  # check again, to detect writes during the read
        return patches
