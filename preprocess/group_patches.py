"""Step 5: one file per location, so that training reads one place of every subject at a time.

    python preprocess/group_patches.py --root-dir /data/patches

Reads <root-dir>/patch/{sid}_patch.npy and writes grouped_patch/patch_loc_{l}.npy, (N, 32, 32, 32),
and subjects.csv, whose row n names row n of every file. Stopped half-way, it goes on where it was.
Run it again after adding subjects.
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.layout import StoreError, StoreLayout, load_locations, to_hu, write_aside
from data.tables import read_table
from preprocess.subjects import one_line_errors, script_main

CHUNK_BYTES = 512 * 2**20  # of patches in memory at a time


def usable_subjects(layout: StoreLayout, count: int) -> tuple[list[str], tuple[int, ...]]:
    """Subjects of patch/, in the order of their files, whose files have the table's number of locations.

    Returns:
        Their names, and the shape of one patch.

    Raises:
        StoreError: there are none.
    """
    good: dict[tuple, list[str]] = {}
    for sid in layout.patch_sids():
        path = layout.patch(sid)
        try:
            patches = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            print(f"group_patches: {sid} left out: {path} cannot be read ({error})", file=sys.stderr)
            continue
        if patches.ndim != 4 or len(patches) != count or patches.dtype.kind not in "iufb":
            print(
                f"group_patches: {sid} left out: {path} is {patches.dtype} {patches.shape}, not {count} patches",
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
                f"group_patches: {len(others)} subjects left out, {others[0]} first: their patches are {other_shape}, "
                f"those of most are {shape}",
                file=sys.stderr,
            )
    return sids, shape


def load_patches(path: Path) -> np.ndarray:
    """One subject's patches as int16 HU; the published implementation allowed other dtypes."""
    patches = to_hu(np.load(path, allow_pickle=False))
    return patches if patches.dtype == np.int16 else np.rint(patches).astype(np.int16)


def fingerprint(layout: StoreLayout, sids: list[str]) -> str:
    """Changes when a subject is added, removed or cut again."""
    digest = hashlib.sha256()
    for sid in sids:
        status = layout.patch(sid).stat()
        digest.update(f"{sid}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def is_done(layout: StoreLayout, state_file: Path, key: str, sids: list[str], count: int, size: int) -> bool:
    """Whether the grouped files are there, whole, and of these subjects."""
    if not (state_file.is_file() and layout.subjects.is_file()):
        return False
    if (
        json.loads(state_file.read_text()).get("key") != key
        or read_table(layout.subjects, file_names=False)["sid"].tolist() != sids
    ):
        return False
    files = [layout.grouped(index) for index in range(count)]
    return all(file.is_file() and file.stat().st_size == size for file in files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_line_errors(parser)
    parser.add_argument("--root-dir", required=True, help="the patch store")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn without a terminal)")
    args = parser.parse_args()

    layout = StoreLayout(args.root_dir)
    count = len(load_locations(layout.find_atlas_patch_loc()))
    sids, shape = usable_subjects(layout, count)
    dtype = np.dtype(np.int16)
    key = fingerprint(layout, sids)
    header = _header((len(sids), *shape), dtype)
    patch_bytes = int(np.prod(shape)) * dtype.itemsize
    file_bytes = len(header) + len(sids) * patch_bytes
    done_file = layout.grouped_dir / "grouped.json"
    if is_done(layout, done_file, key, sids, count, file_bytes):
        print(f"group_patches: done already, {len(sids)} subjects at {count} locations; {layout.grouped_dir}")
        return 0

    # Written in a folder beside the final names, with a note of how far it came.
    aside = layout.grouping
    state_file = aside / "state.json"
    row = 0
    if state_file.is_file():
        state = json.loads(state_file.read_text())
        row = state["rows"] if state["key"] == key else 0
    if row == 0:
        shutil.rmtree(aside, ignore_errors=True)
        free = shutil.disk_usage(layout.root).free
        if file_bytes * count > free:
            raise StoreError(
                f"{len(sids)} subjects at {count} locations need {file_bytes * count / 1e9:.1f} GB, but "
                f"{layout.root} has "
                f"{free / 1e9:.1f} GB free"
            )
        aside.mkdir(parents=True)
        for index in range(count):
            (aside / layout.grouped(index).name).write_bytes(header)
        _note(state_file, {"key": key, "rows": 0})

    chunk = max(1, CHUNK_BYTES // (patch_bytes * count))
    bar = tqdm(
        total=len(sids), initial=row, desc="group_patches", unit="subject", disable=True if args.no_progress else None
    )
    with bar:
        while row < len(sids):
            some = sids[row : row + chunk]
            patches = np.stack([load_patches(layout.patch(sid)) for sid in some], axis=1)  # (L, n, z, y, x)
            for index in range(count):
                with open(aside / layout.grouped(index).name, "r+b") as stream:
                    stream.seek(len(header) + row * patch_bytes)
                    stream.write(np.ascontiguousarray(patches[index]).data)
            row += len(some)
            _note(state_file, {"key": key, "rows": row})
            bar.update(len(some))

    # The table of rows goes first and comes back last: between, the store reads as incomplete.
    layout.subjects.unlink(missing_ok=True)
    done_file.unlink(missing_ok=True)
    for index in range(count):
        with contextlib.suppress(FileNotFoundError):  # moved already, by a run that was stopped here
            os.replace(aside / layout.grouped(index).name, layout.grouped(index))
    table = pd.DataFrame({"sid": sids}).to_csv(index=False, lineterminator="\n")
    write_aside(layout.subjects, lambda stream: stream.write(table.encode()))
    _note(done_file, {"key": key})
    shutil.rmtree(aside)
    print(
        f"group_patches: {len(sids)} subjects at {count} locations, {file_bytes * count / 1e9:.2f} GB; "
        f"{layout.grouped_dir}"
    )
    return 0


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    import io

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def _note(path: Path, content: dict) -> None:
    write_aside(path, lambda stream: stream.write(json.dumps(content).encode()))


if __name__ == "__main__":
    script_main(main)
