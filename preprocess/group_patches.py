"""Stage 5: group the patches into one file per location, so that training can read one location of all subjects.

    python preprocess/group_patches.py --root-dir /data/patches

Reads <root-dir>/patch/{sid}_patch.npy. Writes subjects.csv and, for each location, grouped_patch/patch_loc_{l}.npy, an
array (N, 32, 32, 32) for N subjects. Row n of subjects.csv names the subject in row n of every grouped file. An
interrupted run continues where it stopped. Run the script again after adding subjects.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout, load_locations, to_hu
from data.tables import read_table
from misc.command import run
from misc.files import hold_lock_or_raise, load_array, make_array_header, write_text
from misc.progress import add_progress_flag, progress_bar
from preprocess.report import find_earlier_failures
from preprocess.subjects import add_store_flag, parse_flags

CHUNK_BYTES = 512 * 2**20  # maximum bytes of patches held in memory at a time


def find_complete_subjects_and_patch_shape(
    layout: StoreLayout, num_locations: int
) -> tuple[list[str], tuple[int, ...]]:
    """Find the subjects in patch/ that can be grouped, sorted by file name.

    A file is usable if it has one patch for each of the ``num_locations`` locations and the most common patch shape.

    Returns:
        The sids, and the shape of one patch.

    Raises:
        StoreError: no subject is usable.
    """
    good: dict[tuple, list[str]] = {}
    failed = find_earlier_failures(layout, "group_patches")
    for sid in layout.patch_sids():
        path = layout.patch(sid)
        if sid in failed:
            print(f"group_patches: {sid} left out: the subject failed in {failed[sid]}", file=sys.stderr)
            continue
        try:
            patches = load_array(path, mapped=True)
        except (OSError, ValueError) as error:
            print(f"group_patches: {sid} left out: {path} cannot be read ({error})", file=sys.stderr)
            continue
        if patches.ndim != 4 or len(patches) != num_locations or patches.dtype.kind not in "iufb":
            print(
                f"group_patches: {sid} left out: {path} is {patches.dtype} {patches.shape}, "
                f"not an array of {num_locations} patches",
                file=sys.stderr,
            )
            continue
        good.setdefault(patches.shape[1:], []).append(sid)
    if not good:
        raise StoreError(f"{layout.patch_dir} has no usable patches; run preprocess/patchify_images.py")
    shape, sids = max(good.items(), key=lambda item: len(item[1]))
    for other_shape, others in good.items():
        if others is not sids:
            print(
                f"group_patches: {len(others)} subjects left out (the first is {others[0]}): their patches have shape "
                f"{other_shape}, but most subjects have {shape}",
                file=sys.stderr,
            )
    return sids, shape


def load_patches(path: Path) -> np.ndarray:
    """Load the patches of one subject as int16 HU; files of the published implementation can have other dtypes."""
    return convert_to_hu(load_array(path))


def convert_to_hu(patches: np.ndarray) -> np.ndarray:
    """Convert patches of any dtype to int16 HU, the format of the grouped files."""
    patches = to_hu(patches)
    return patches if patches.dtype == np.int16 else np.rint(patches).astype(np.int16)


def fingerprint_patches(layout: StoreLayout, sids: list[str]) -> str:
    """Return a hash that changes if a subject is added or removed, or if its patches are cut again."""
    digest = hashlib.sha256()
    for sid in sids:
        status = layout.patch(sid).stat()
        digest.update(f"{sid}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Grouping:
    """Write the grouped files of a list of subjects, and continue an interrupted run.

    Args:
        layout: paths of the store.
        sids: subjects in the row order of the grouped files.
        patch_shape: shape of one patch.
        num_locations: number of locations.
    """

    def __init__(self, layout: StoreLayout, sids: list[str], patch_shape: tuple[int, ...], num_locations: int):
        self.layout, self.sids, self.count = layout, sids, num_locations
        self.key = fingerprint_patches(layout, sids)
        self.header = make_array_header((len(sids), *patch_shape), np.dtype(np.int16))
        self.patch_bytes = int(np.prod(patch_shape)) * 2
        self.file_bytes = len(self.header) + len(sids) * self.patch_bytes
        self.done_file = layout.grouping_inputs_record_path
        self.state_file = layout.temporary_grouping_dir / "state.json"

    def is_done(self) -> bool:
        """Return whether all grouped files exist, are complete and contain exactly the subjects of this store."""
        if not (self.done_file.is_file() and self.layout.subjects_csv.is_file()):
            return False
        if json.loads(self.done_file.read_text()).get("key") != self.key:
            return False
        if read_table(self.layout.subjects_csv, file_names=False)["sid"].tolist() != self.sids:
            return False
        files = [self.layout.grouped_patch_file(index) for index in range(self.count)]
        return all(file.is_file() and file.stat().st_size == self.file_bytes for file in files)

    def get_temporary_path(self, location: int) -> Path:
        """Return the temporary path where a location's file is written before it gets its final name."""
        return self.layout.temporary_grouping_dir / self.layout.grouped_patch_file(location).name

    def start_or_resume_grouping(self) -> int:
        """Continue an interrupted run, or create the temporary files anew.

        Returns:
            The number of subjects that are already written; 0 if the files are new.

        Raises:
            StoreError: the disk has too little free space.
        """
        if self.state_file.is_file():
            state = json.loads(self.state_file.read_text())
            if state["key"] == self.key and state["rows"]:
                return state["rows"]
        shutil.rmtree(self.layout.temporary_grouping_dir, ignore_errors=True)
        free, needed = shutil.disk_usage(self.layout.root).free, self.file_bytes * self.count
        if needed > free:
            raise StoreError(
                f"{len(self.sids)} subjects at {self.count} locations need {needed / 1e9:.1f} GB, but "
                f"{self.layout.root} has {free / 1e9:.1f} GB free; free some space or group fewer subjects"
            )
        self.layout.temporary_grouping_dir.mkdir(parents=True)
        for index in range(self.count):
            self.get_temporary_path(index).write_bytes(self.header)
        _write_state_json(self.state_file, {"key": self.key, "rows": 0})
        return 0

    def write_subject_chunk(self, first_row: int) -> int:
        """Write the next chunk of subjects, starting at row ``first_row``, and return their number."""
        sids = self.sids[first_row : first_row + max(1, CHUNK_BYTES // (self.patch_bytes * self.count))]
        patches = np.stack([load_patches(self.layout.patch(sid)) for sid in sids], axis=1)  # (L, n, z, y, x)
        for index in range(self.count):
            with open(self.get_temporary_path(index), "r+b") as stream:
                stream.seek(len(self.header) + first_row * self.patch_bytes)
                stream.write(np.ascontiguousarray(patches[index]).data)
        _write_state_json(self.state_file, {"key": self.key, "rows": first_row + len(sids)})
        return len(sids)

    def _find_temporary_or_final_file(self, location: int) -> Path:
        """Return the path of a location's new file: temporary, or final if a run stopped while renaming the files."""
        return (
            self.get_temporary_path(location)
            if self.get_temporary_path(location).is_file()
            else self.layout.grouped_patch_file(location)
        )

    def verify_new_files(self) -> None:
        """Verify the new files on the disk before they replace the old files.

        The size of every file is checked. For each subject, the patch at one random location is also compared with
        the subject's own file.

        Raises:
            StoreError: a file differs from what was written; the next run makes all files again.
        """
        for index in range(self.count):
            with open(self._find_temporary_or_final_file(index), "rb") as stream:
                os.fsync(stream.fileno())
                size = stream.seek(0, os.SEEK_END)
            if size != self.file_bytes:
                self._remove_files_and_raise(
                    f"{self._find_temporary_or_final_file(index)} has {size} of {self.file_bytes} bytes; "
                    "is the disk full?"
                )
        drawn = np.random.default_rng(0).integers(self.count, size=len(self.sids))
        for row, (sid, index) in enumerate(zip(self.sids, drawn.tolist())):
            own = convert_to_hu(np.asarray(load_array(self.layout.patch(sid), mapped=True)[index]))
            with open(self._find_temporary_or_final_file(index), "rb") as stream:
                stream.seek(len(self.header) + row * self.patch_bytes)
                if stream.read(self.patch_bytes) != own.tobytes():
                    self._remove_files_and_raise(
                        f"{self._find_temporary_or_final_file(index)}, row {row}, is not the patch of {sid}."
                    )

    def _remove_files_and_raise(self, reason: str) -> None:
        shutil.rmtree(self.layout.temporary_grouping_dir, ignore_errors=True)
        raise StoreError(f"{reason} The previous grouped files are unchanged; run group_patches.py again")

    def give_files_final_names(self) -> None:
        """Give the files their final names.

        subjects.csv is removed first and written last, so that the store counts as incomplete in between.
        """
        self.verify_new_files()
        self.layout.subjects_csv.unlink(missing_ok=True)
        self.done_file.unlink(missing_ok=True)
        for index in range(self.count):
            with contextlib.suppress(FileNotFoundError):  # an interrupted run may have moved this file already
                os.replace(self.get_temporary_path(index), self.layout.grouped_patch_file(index))
        write_text(self.layout.subjects_csv, pd.DataFrame({"sid": self.sids}).to_csv(index=False, lineterminator="\n"))
        _write_state_json(self.done_file, {"key": self.key})
        shutil.rmtree(self.layout.temporary_grouping_dir)


def group_patches_by_location(args: argparse.Namespace) -> int:
    """Run the stage with its flags and return the exit status."""
    layout = StoreLayout(args.root_dir)
    count = len(load_locations(layout.find_atlas_patch_loc()))
    with hold_lock_or_raise(layout.grouping_lock, f"{layout.grouped_dir}, the output folder of group_patches.py,"):
        return _group_patches_by_location(args, layout, count)


def _group_patches_by_location(args: argparse.Namespace, layout: StoreLayout, location_count: int) -> int:
    sids, shape = find_complete_subjects_and_patch_shape(layout, location_count)
    grouping = Grouping(layout, sids, shape, location_count)
    found = f"{len(sids)} subjects at {location_count} locations"
    if grouping.is_done():
        print(f"group_patches: already done, {found}; {layout.grouped_dir}")
        return 0
    row = grouping.start_or_resume_grouping()
    bar = progress_bar(args.no_progress, total=len(sids), initial=row, desc="group_patches", unit="subject")
    with bar:
        while row < len(sids):
            written = grouping.write_subject_chunk(row)
            row += written
            bar.update(written)
    grouping.give_files_final_names()
    print(f"group_patches: {found}, {grouping.file_bytes * location_count / 1e9:.2f} GB; {layout.grouped_dir}")
    return 0


def _write_state_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content))


def main() -> int:
    return group_patches_by_location(parse_flags(__doc__, add_store_flag, add_progress_flag))


if __name__ == "__main__":
    run(main)
