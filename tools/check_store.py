"""Check every file of a patch store, and compare some patches with their scans.

    python tools/check_store.py --root-dir /data/patches
    python tools/check_store.py --root-dir /data/patches --input-csv dataset.csv --atlas-mask atlas_lung_mask.nii.gz

The first command reads the whole store, which may also be a store made by the published code. The command checks

- that every file has the right shape, dtype and range of values
- that each subject's rows in grouped_patch/ equal its patches in patch/, at --locations random locations per subject
- that no two subjects have the same patches

The second command also cuts the patches of some subjects (--scans) again from their scans, and compares every voxel.

The script prints one line per problem, at most 20 of each kind. The exit status is 1 if the script finds a problem.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout, load_locations
from data.store import PatchFile
from data.tables import read_table
from misc.command import Parser, UserError, at_least, run
from misc.files import load_array
from misc.progress import add_progress_flag, progress_bar
from misc.sizes import HU_MAX, HU_MIN, PATCH_SIZE
from preprocess.atlas import read_affine, read_atlas_mask
from preprocess.patches import cut_scan
from preprocess.scan import read_scan
from preprocess.subjects import read_subjects

SHOWN = 20  # maximum number of problems to print per kind of check
ROWS_AT_ONCE = 64
TOLERANCE = 1  # allowed difference in HU between a stored patch and the same patch cut again from the scan

Report = Callable[[str, str], None]  # takes the kind of a problem and a sentence about it


class Store:
    """A patch store: the subjects, location table and patch files in a folder."""

    def __init__(self, root: str):
        self.layout = StoreLayout(root)
        self.table = load_locations(self.layout.find_atlas_patch_loc())
        self.in_patch = self.layout.patch_sids()
        self.grouped = self.layout.grouped_dir.is_dir() and any(self.layout.grouped_dir.glob("patch_loc_*.npy"))
        if self.layout.subjects_csv.is_file():
            self.sids = read_table(self.layout.subjects_csv, file_names=False)["sid"].tolist()
        else:
            self.sids = self.in_patch
        if not self.grouped and not self.in_patch:
            raise StoreError(f"--root-dir {root} has no patches in patch/ or grouped_patch/")
        self._mapped: deque[PatchFile] = deque()

    def open_patch_file(self, path: Path, rows: int | None) -> PatchFile:
        """Open a file of patches. Raise StoreError if the file is unreadable or its shape is not (rows, 32, 32, 32)."""
        file = PatchFile(path, self._mapped)
        wanted = (file.shape[0] if rows is None and file.shape else rows, *[PATCH_SIZE] * 3)
        if file.shape != wanted:
            raise StoreError(f"{path} has shape {file.shape}; expected {wanted}")
        return file


def describe_invalid_hu_values(patch_file: PatchFile) -> Iterator[str]:
    """Yield one message for each problem with the values in a file of patches."""
    low, high, bad = np.inf, -np.inf, 0
    constant: list[int] = []
    for start in range(0, patch_file.shape[0], ROWS_AT_ONCE):
        block = patch_file.read_rows_in_stored_dtype(np.arange(start, min(start + ROWS_AT_ONCE, patch_file.shape[0])))
        if block.dtype.kind == "f":
            bad += int((~np.isfinite(block)).sum())
            block = np.nan_to_num(block, nan=HU_MIN, posinf=HU_MIN, neginf=HU_MIN)
        flat = block.reshape(len(block), -1)
        lowest, highest = flat.min(axis=1), flat.max(axis=1)
        low, high = min(low, lowest.min()), max(high, highest.max())
        constant += (start + np.flatnonzero((lowest == highest) & (lowest != HU_MIN))).tolist()
    if bad:
        yield f"{patch_file.path} has {bad} values that are not finite; they are read as {HU_MIN}"
    if low < HU_MIN or high > HU_MAX:
        yield (
            f"{patch_file.path} has values from {low:g} to {high:g}, outside [{HU_MIN}, {HU_MAX}] HU; "
            "values outside are clipped when the file is read"
        )
    if low >= 0:
        yield f"{patch_file.path} has no value below 0, so its values are not Hounsfield units"
    if constant:
        yield (
            f"{patch_file.path}: row {constant[0]} and {len(constant) - 1} more rows have the same value in every voxel"
        )


def check_grouped_files(
    store: Store, report_problem: Report, advance_progress: Callable[[], object]
) -> dict[int, PatchFile]:
    """Check every file of grouped_patch/. Return the readable files in a dictionary with the location as key."""
    files = {}
    rows = len(store.sids) or None
    for location in range(len(store.table)):
        try:
            files[location] = store.open_patch_file(store.layout.grouped_patch_file(location), rows)
            for sentence in describe_invalid_hu_values(files[location]):
                report_problem("grouped_patch/", sentence)
        except StoreError as error:
            report_problem("grouped_patch/", str(error))
        advance_progress()
    if store.layout.grouped_patch_file(len(store.table)).exists():
        extra = store.layout.grouped_patch_file(len(store.table))
        report_problem("grouped_patch/", f"{extra} exists, but the location table has only {len(store.table)} rows")
    return files


def check_subjects(
    store: Store,
    files: dict[int, PatchFile],
    locations_per_subject: int,
    seed: int,
    report_problem: Report,
    advance_progress: Callable[[], object],
) -> None:
    """Check every file of patch/ and patch_loc/, and each subject's rows in the grouped files."""
    row_of = {sid: row for row, sid in enumerate(store.sids)}
    seen: dict[bytes, str] = {}
    for number, sid in enumerate(store.in_patch):
        try:
            file = store.open_patch_file(store.layout.patch(sid), len(store.table))
            for sentence in describe_invalid_hu_values(file):
                report_problem("patch/", sentence)
            _check_patch_corner_file_shape(store, sid)
        except StoreError as error:
            report_problem("patch/", str(error))
            advance_progress()
            continue
        sample = file.read_first_and_last_bytes()
        if sample in seen and len(set(sample)) > 4:  # not only padding
            report_problem(
                "patch/", f"{file.path} has the same patches as {seen[sample]}; check whether one scan has two names"
            )
        seen.setdefault(sample, sid)
        if files and sid not in row_of:
            report_problem(
                "rows", f"{sid} is in patch/ but not in grouped_patch/; run preprocess/group_patches.py again"
            )
        elif files:
            drawn = np.random.default_rng([seed, number]).permutation(sorted(files))[:locations_per_subject]
            _check_grouped_rows(store, file, sid, row_of[sid], {int(one): files[one] for one in drawn}, report_problem)
        advance_progress()


def _check_patch_corner_file_shape(store: Store, sid: str) -> None:
    path = store.layout.patch_loc(sid)
    if not path.is_file():
        return  # the published code does not write files in patch_loc/
    try:
        shape = load_array(path, mapped=True).shape
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as an array of patch corners") from error
    if shape != store.table.shape:
        raise StoreError(f"{path} has shape {shape}, but the location table has shape {store.table.shape}")


def _check_grouped_rows(
    store: Store,
    patch_file: PatchFile,
    sid: str,
    subject_row: int,
    grouped_files: dict[int, PatchFile],
    report_problem: Report,
) -> None:
    """Report the first grouped file in which a subject's row is not the subject's patch, and where that patch is."""
    for location, grouped in grouped_files.items():
        own = patch_file.read_rows(np.array([location]))[0]
        if np.array_equal(grouped.read_rows(np.array([subject_row]))[0], own):
            continue
        other = next(
            (n for n in range(grouped.shape[0]) if np.array_equal(grouped.read_rows(np.array([n]))[0], own)), None
        )
        found = "in no row" if other is None else f"in row {other}, listed as {store.sids[other]}"
        report_problem(
            "rows",
            f"{grouped.path}: row {subject_row} is listed as {sid} but holds another patch; the right one is {found}. "
            "Run preprocess/group_patches.py again",
        )
        return


def recut_scans_and_compare_with_store(
    store: Store,
    input_csv: str,
    atlas_mask: str,
    num_subjects: int,
    seed: int,
    report_problem: Report,
    advance_progress: Callable[[], object],
) -> int:
    """Cut the patches of some subjects again and compare them with the store. Return the number of subjects."""
    atlas, there = read_atlas_mask(atlas_mask), set(store.in_patch)
    subjects = [one for one in read_subjects(input_csv) if one.sid in there]
    if not subjects:
        raise StoreError(f"--input-csv {input_csv} has none of the subjects in {store.layout.patch_dir}")
    drawn = np.random.default_rng(seed).permutation(len(subjects))[:num_subjects]
    for number in drawn:
        subject = subjects[number]
        try:
            subject.check_image_exists()
            transform = read_affine(store.layout.transform(subject.sid))
            stored = store.open_patch_file(store.layout.patch(subject.sid), len(store.table)).read_rows(
                np.arange(len(store.table))
            )
            scan = read_scan(subject.image, subject.series)
            cut = cut_scan(scan, transform, atlas, store.table, PATCH_SIZE).patches
            off = np.abs(stored.astype(np.float32) - cut).reshape(len(cut), -1).max(axis=1)
            if (off > TOLERANCE).any():
                report_problem(
                    "scans",
                    f"{store.layout.patch(subject.sid)}: {(off > TOLERANCE).sum()} of {len(cut)} patches differ from "
                    f"{subject.image}, by up to {off.max():.0f} HU in row {off.argmax()}. Remove the file and run "
                    "preprocess/patchify_images.py",
                )
        except UserError as error:
            report_problem("scans", f"{subject.sid}: {error}")
        advance_progress()
    return len(drawn)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--root-dir", required=True, help="folder of the patch store")
    text = (
        "number of locations per subject at which patch/ and grouped_patch/ are compared; after a crash, compare more"
    )
    add("--locations", type=at_least(int, 1), default=5, help=text)
    add(
        "--input-csv",
        help="table of scans; some of their patches are cut again and compared with the store; needs --atlas-mask",
    )
    add("--atlas-mask", help="atlas lung mask that the store was made with")
    add("--scans", type=at_least(int, 1), default=5, help="number of scans to cut again and compare")
    add("--seed", type=at_least(int, 0), default=0, help="random seed for the choice of locations and scans")
    add_progress_flag(parser)
    args = parser.parse_args()
    if bool(args.input_csv) != bool(args.atlas_mask):
        parser.error("--input-csv and --atlas-mask need each other; give both or neither")
    return args


def main() -> int:
    args = parse_arguments()
    store = Store(args.root_dir)
    found: dict[str, list[str]] = {}

    def report_problem(kind: str, sentence: str) -> None:
        found.setdefault(kind, []).append(sentence)

    total = len(store.table) * store.grouped + len(store.in_patch) + (args.scans if args.input_csv else 0)
    with progress_bar(args.no_progress, total=total, desc="check_store", unit="file") as bar:
        files = check_grouped_files(store, report_problem, bar.update) if store.grouped else {}
        check_subjects(store, files, args.locations, args.seed, report_problem, bar.update)
        cut = 0
        if args.input_csv:
            cut = recut_scans_and_compare_with_store(
                store, args.input_csv, args.atlas_mask, args.scans, args.seed, report_problem, bar.update
            )
    subjects = len(store.sids) or "unnamed"
    compared = min(args.locations, len(store.table)) if files and store.in_patch else 0
    print(
        f"check_store: {len(store.table)} locations, {subjects} subjects; {len(files)} grouped files, "
        f"{len(store.in_patch)} files in patch/; compared rows at {compared} locations (--locations), cut {cut} scans "
        f"again; {sum(map(len, found.values())) or 'no'} problems"
    )
    for kind, sentences in found.items():
        print(f"{kind}: {len(sentences)}")
        for sentence in sentences[:SHOWN]:
            print(f"  {sentence}")
        if len(sentences) > SHOWN:
            print(f"  and {len(sentences) - SHOWN} more")
    return 1 if found else 0


if __name__ == "__main__":
    run(main)
