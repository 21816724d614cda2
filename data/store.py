"""Reading a patch store: ours, and the published implementation's as it is.

A store that is open stays the one that was opened: a file of it that changes is an error at the next reading, so that
rows of two groupings are never mixed.
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

SAMPLE_BYTES = 4096  # of a file's patches, at either end, that the store's version looks at
COMPARED = 20  # subjects that look newer than the grouped files
NAMED = 3  # subjects that a note names
MAX_OPEN = 128  # files mapped at a time; each holds a file descriptor, of which a process may have 1024


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
        subjects: CSV with a column sid; only these subjects, in the store's order.

    Raises:
        StoreError: something is missing or files disagree; the message names the file.
    """

    def __init__(
        self, root: str | os.PathLike, require_grouped: bool = False, subjects: str | os.PathLike | None = None
    ):
        self.layout = StoreLayout(root)
        self._mapped: deque[PatchFile] = deque()
        self._tables = (self.layout.find_atlas_patch_loc(), self.layout.subjects, self.layout.grouped_note)
        self._stamps = [_stamp(path) for path in self._tables]
        self.locations = load_locations(self._tables[0])
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
        self._stored = list(self.sids)  # rows of the files
        self._rows = np.arange(len(self.sids))  # of the files
        if subjects is not None:
            self._select(subjects)
        self.check_unchanged()  # grouping may have ended while the files were opened

    @property
    def num_locations(self) -> int:
        return len(self.locations)

    @property
    def num_subjects(self) -> int:
        return len(self.sids)

    @property
    def files(self) -> list[Path]:
        """Every file that patches are read from."""
        return [file.path for file in self._files]

    # ------------------------------------------------------------ which one it is

    @functools.cached_property
    def version(self) -> str:
        """Sixteen digits that tell this store from another, wherever either lies.

        Of the location table, the subjects and who of them is read, what grouping noted, and of every file its
        shape and SAMPLE_BYTES at either end: a store as the published code left it has a version too.
        """
        digest = hashlib.sha256(repr((self._stored, self.sids, table_fingerprint(self.locations))).encode())
        if self.grouped and self.layout.grouped_note.is_file():
            digest.update(self.layout.grouped_note.read_bytes())
        for file in self._files:
            digest.update(repr((file.shape, file.dtype.str, file.fortran)).encode() + file.sample())
        self.check_unchanged()
        return digest.hexdigest()[:16]

    def facts(self) -> dict[str, object]:
        """What tells a run's data: kept with what is made of it, and compared by who goes on."""
        table = {"location_table": table_fingerprint(self.locations)}
        return {"num_subjects": self.num_subjects, "store_version": self.version, **table}

    def check_unchanged(self) -> None:
        """Raise StoreError where a table or a file of patches is not the one that was opened."""
        for path, stamp in zip(self._tables, self._stamps):
            if _stamp(path) != stamp:
                raise StoreError(_changed(path))
        for file in self._files:
            file.check_unchanged()

    def notes(self) -> Iterator[str]:
        """What patch/ and the grouped files do not agree on, a sentence each."""
        there = self.layout.patch_sids() if self.grouped else []
        if not there:  # nothing to compare with: it may be removed once it is grouped
            return
        again = f"python preprocess/group_patches.py --root-dir {self.layout.root}"
        grouped = set(self._stored)
        missing = [sid for sid in there if sid not in grouped]
        if missing:
            yield f"{_some(missing)} of patch/ are not in grouped_patch/ and not read; {again} takes them in"
        gone = sorted(grouped.difference(there))
        if gone:
            yield f"{_some(gone)} of grouped_patch/ are not in patch/ any more, and are read; {again} drops them"
        if self.layout.grouped_note.is_file():
            grouped_at = self.layout.grouped_note.stat().st_mtime_ns
            newer = [sid for sid in there if sid in grouped and self.layout.patch(sid).stat().st_mtime_ns > grouped_at]
            if newer and self._differ(newer[:COMPARED]):
                yield f"{_some(newer)} of patch/ are newer than grouped_patch/, which is read; {again} takes them over"

    def _differ(self, sids: list[str]) -> bool:
        """Whether a subject's first patch is another in patch/ than grouped: a copied store has new times alone."""
        for sid in sids:
            own = PatchFile(self.layout.patch(sid), self._mapped).read_rows(np.array([0]))
            grouped = self._files[0].read_rows(np.array([self._stored.index(sid)]))
            if not np.array_equal(np.rint(own), np.rint(grouped)):
                return True
        return False

    # ------------------------------------------------------------ opening

    def _open_grouped(self) -> None:
        self._files = [PatchFile(self.layout.grouped(index), self._mapped) for index in range(self.num_locations)]
        if self.layout.subjects.is_file():
            self.sids = read_table(self.layout.subjects, file_names=False)["sid"].tolist()
            source = self.layout.subjects
        elif self.layout.grouping.is_dir():
            raise StoreError(
                f"{self.layout.grouped_dir} is half renamed, grouping was stopped; run "
                f"python preprocess/group_patches.py --root-dir {self.layout.root} to go on"
            )
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
        self._files = [PatchFile(self.layout.patch(sid), self._mapped) for sid in self.sids]
        wanted = (self.num_locations, PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
        for file in self._files:
            if file.shape != wanted:
                raise StoreError(
                    f"{file.path} has shape {file.shape}, but the location table asks for {wanted}; "
                    "cut it again with preprocess/patchify_images.py"
                )

    def _select(self, subjects: str | os.PathLike) -> None:
        """Keep the subjects that a table lists."""
        wanted = set(read_table(subjects, file_names=False)["sid"])
        lacking = sorted(wanted.difference(self.sids))
        if lacking:
            raise StoreError(
                f"{subjects}: {len(lacking)} of its {len(wanted)} subjects are not in {self.layout.root}, "
                f"the first {lacking[0]!r} (the store's first is {self.sids[0]!r})"
            )
        self._rows = np.array([row for row, sid in enumerate(self.sids) if sid in wanted])
        self.sids = [self.sids[row] for row in self._rows]

    # ------------------------------------------------------------ reading

    def read(self, location: int, rows: np.ndarray) -> np.ndarray:
        """Patches of some subjects at one location: (n, 32, 32, 32), each (z, y, x), in HU.

        int16 as stored. Other dtypes, which the published implementation allowed, come back clipped
        to the HU range with NaN as -1024: whole numbers as int16, floats as float32.
        """
        rows = self._rows[rows]
        if self.grouped:
            return self._files[location].read_rows(rows)
        return np.stack([self._files[row].read_rows(np.array([location]))[0] for row in rows])


def _some(sids: list[str]) -> str:
    """How many subjects, and the first names."""
    names = ", ".join(sids[:NAMED]) + (", ..." if len(sids) > NAMED else "")
    return f"{len(sids)} subject{'s' if len(sids) > 1 else ''} ({names})"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Tells one version of a file from another; None where there is none."""
    try:
        return _of(os.stat(path))
    except OSError:
        return None


def _of(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed(path: Path) -> str:
    return (
        f"{path} has changed since this run opened the store (grouped again, or a subject added?); what it read before "
        "and would read now do not go together: let preprocessing end, then start again"
    )


class PatchFile:
    """One .npy file of patches, mapped when first read so that worker processes map their own.

    ``mapped`` lists the store's files that are mapped now; the one mapped first makes room.
    """

    def __init__(self, path: Path, mapped: "deque[PatchFile]"):
        self.path = path
        self._mapped = mapped
        try:
            with open(path, "rb") as stream:
                self.shape, self.fortran, self.dtype = read_array_header(stream)
                self.offset = stream.tell()
                status = os.fstat(stream.fileno())
        except FileNotFoundError:
            raise StoreError(f"{path} is not there; run preprocess/group_patches.py again") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise StoreError(f"{path} is {error}; make it again") from error
        if self.dtype.kind not in "iufb":
            raise StoreError(f"{path} has dtype {self.dtype}; patches are real numbers in HU")
        expected = self.offset + int(np.prod(self.shape)) * self.dtype.itemsize
        self._stamp, self._end = _of(status), expected
        self._array = None

    def check_unchanged(self) -> None:
        """Raise StoreError where it is another file than the one that was opened, or was written to."""
        if _stamp(self.path) != self._stamp:
            raise StoreError(_changed(self.path))

    def sample(self) -> bytes:
        """Some bytes of its patches, from either end."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            start = stream.read(min(SAMPLE_BYTES, self._end - self.offset))
            stream.seek(max(self.offset, self._end - SAMPLE_BYTES))
            return start + stream.read(min(SAMPLE_BYTES, self._end - self.offset))

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Some rows in HU; see to_hu."""
        return to_hu(self.stored_rows(rows))

    def stored_rows(self, rows: np.ndarray) -> np.ndarray:
        """Some rows as they are stored."""
        array = self._array  # kept here: another thread may take it off the list
        self.check_unchanged()  # before: reading a file that was cut short ends the process
        if array is None:
            order = "F" if self.fortran else "C"
            array = self._array = np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order)
            self._mapped.append(self)
            if len(self._mapped) > MAX_OPEN:
                self._mapped.popleft()._array = None
        patches = np.asarray(array[rows])
        self.check_unchanged()  # after: so nobody wrote while it was read
        return patches
