"""File names of a patch store, and checks of its arrays, for all modules that use the store."""

import os
from pathlib import Path

import numpy as np

from misc.command import UserError
from misc.files import is_utf8, load_array
from misc.sizes import HU_MAX, HU_MIN

PATCH_SUFFIX = "_patch.npy"


class StoreError(UserError):
    """Raised if a patch store is incomplete or inconsistent; the message says what to do."""


class StoreLayout:
    """Paths inside ``--root-dir``, as listed in preprocess/README.md. Raises StoreError if ``--root-dir`` is a file."""

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not is_utf8(self.root):
            raise StoreError(
                f"--root-dir {str(self.root)!a} has a name that is not UTF-8, so image libraries cannot open it; "
                "rename the folder"
            )
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"--root-dir {self.root} is a file; give a folder")

    @property
    def atlas_patch_loc(self) -> Path:
        return self.root / "atlas_patch_loc.npy"

    def lung_mask(self, sid: str) -> Path:
        return self.root / "lung_mask" / f"{sid}.nii.gz"

    def transform(self, sid: str) -> Path:
        return self.root / "transform" / f"{sid}_Reg_Atlas_Affine_0GenericAffine.mat"

    @property
    def patch_dir(self) -> Path:
        return self.root / "patch"

    def patch(self, sid: str) -> Path:
        return self.patch_dir / f"{sid}{PATCH_SUFFIX}"

    def patch_loc(self, sid: str) -> Path:
        return self.root / "patch_loc" / f"{sid}_patch_loc.npy"

    @property
    def grouped_dir(self) -> Path:
        return self.root / "grouped_patch"

    def grouped_patch_file(self, location: int) -> Path:
        return self.grouped_dir / f"patch_loc_{location}.npy"

    @property
    def subjects_csv(self) -> Path:
        return self.root / "subjects.csv"

    def report_path(self, script: str) -> Path:
        return self.root / "report" / f"{script}.csv"

    def report_lock(self, script: str) -> Path:
        """Return the lock file that a script holds while it writes its report."""
        return self.root / "report" / f".{script}.lock"

    def subjects_in_progress_dir(self, script: str) -> Path:
        """Return the folder of in-progress files, one for each subject that is not yet in the report."""
        return self.root / "report" / f".claims-{script}"

    def qc_picture(self, sid: str) -> Path:
        return self.root / "qc" / f"{sid}.png"

    @property
    def qc_page(self) -> Path:
        """Page that shows all subjects."""
        return self.root / "qc" / "index.html"

    @property
    def dirs_with_files_per_subject(self) -> tuple[Path, ...]:
        """Folders in which preprocessing writes one file per subject."""
        return tuple(
            name("x").parent for name in (self.lung_mask, self.transform, self.patch, self.patch_loc, self.qc_picture)
        )

    def patch_sids(self) -> list[str]:
        """List the subjects with a file in patch/, sorted by file name: the row order if subjects.csv is missing.

        Sorting by file name differs from sorting by subject: A1_patch.npy comes before A_patch.npy.
        """
        names = (entry.name for entry in os.scandir(self.patch_dir)) if self.patch_dir.is_dir() else ()
        return [name.removesuffix(PATCH_SUFFIX) for name in sorted(names) if name.endswith(PATCH_SUFFIX)]

    @property
    def grouping_inputs_record_path(self) -> Path:
        """File that describes the inputs of the grouped files; stores made by the published code lack this file."""
        return self.grouped_dir / "grouped.json"

    @property
    def grouping_lock(self) -> Path:
        """Lock file that group_patches.py holds while it writes the grouped files."""
        return self.root / "report" / ".group_patches.lock"

    @property
    def temporary_grouping_dir(self) -> Path:
        """Temporary folder for grouped files; it exists only during grouping and after an interruption."""
        return self.grouped_dir / ".partial"

    def list_published_location_tables(self) -> list[Path]:
        """List the location tables that are named as in the published implementation."""
        return sorted(self.root.glob("*_patch_loc.npy"))

    def find_atlas_patch_loc(self) -> Path:
        """Find the location table: atlas_patch_loc.npy, or the only ``*_patch_loc.npy`` of the published layout.

        Raises:
            StoreError: the store has no location table, or several tables of the published layout.
        """
        if self.atlas_patch_loc.is_file():
            return self.atlas_patch_loc
        if not self.root.is_dir():
            raise StoreError(f"--root-dir {self.root} is not a folder; make a store with preprocess/run_preprocess.sh")
        older = self.list_published_location_tables()
        if len(older) == 1:
            return older[0]
        found = f"; rename one of {', '.join(p.name for p in older)} to atlas_patch_loc.npy" if older else ""
        raise StoreError(
            f"--root-dir {self.root} is not a patch store: it has no atlas_patch_loc.npy"
            f"{found or '; run preprocess/run_preprocess.sh'}"
        )


def load_locations(path: Path) -> np.ndarray:
    """Read a table of patch corners: (L, 3) int64, atlas voxel index (x, y, z).

    Raises:
        StoreError: the table is unreadable, has a wrong shape or dtype, or has negative or repeated rows.
    """
    try:
        table = load_array(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StoreError(f"{path} is not a location table: it is not a complete .npy file of numbers") from error
    if table.ndim != 2 or table.shape[1] != 3 or len(table) == 0:
        raise StoreError(
            f"{path} has shape {table.shape}, but a location table must have shape (L, 3), one corner per row"
        )
    if not np.issubdtype(table.dtype, np.integer):
        raise StoreError(f"{path} has dtype {table.dtype}, but locations must be integer atlas voxel indices")
    if table.min() < 0:
        raise StoreError(f"{path} has negative values, but patch corners are atlas voxel indices, which start at 0")
    if len(np.unique(table, axis=0)) != len(table):
        raise StoreError(f"{path} has the same location in more than one row; keep each location once")
    return table.astype(np.int64)


def to_hu(patches: np.ndarray) -> np.ndarray:
    """Return int16 patches unchanged; clip other real dtypes to the HU range, and replace NaN with the lowest HU."""
    if patches.dtype == np.int16 and patches.dtype.isnative:
        return patches
    if patches.dtype.kind == "f":
        patches = np.nan_to_num(patches.astype(np.float32), nan=HU_MIN, posinf=HU_MAX, neginf=HU_MIN)
        return np.clip(patches, HU_MIN, HU_MAX)
    if patches.dtype.kind == "u":
        return np.minimum(patches, HU_MAX).astype(np.int16)
    return np.clip(patches.astype(np.int64), HU_MIN, HU_MAX).astype(np.int16)
