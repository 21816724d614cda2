"""Test reading patch stores: the current layout, the published layout and damaged stores."""

import os
import shutil

import numpy as np
import pytest

from data import store as store_module
from data.labels import read_labels
from data.layout import StoreError
from data.store import PatchStore


@pytest.mark.parametrize("grouped", [True, False])
def test_patches_are_read_as_written(tmp_path, make_store, grid, grouped):
    patches = make_store(tmp_path, 5, grid, grouped=grouped)
    store = PatchStore(tmp_path)
    assert (store.num_subjects, store.num_locations, store.grouped) == (5, 6, grouped)
    assert store.sids == ["000", "001", "002", "003", "004"]
    rows = np.array([4, 0, 3])
    for location in range(6):
        read = store.read(location, rows)
        assert read.dtype == np.int16
        np.testing.assert_array_equal(read, patches[rows, location])


def test_the_published_layout_is_read(tmp_path, make_store, grid):
    """The published layout has a different table name and no subjects.csv, so sorted file names give the row order."""
    make_store(tmp_path, 2, grid)
    (tmp_path / "atlas_patch_loc.npy").rename(tmp_path / "19676E_INSP_patch_loc.npy")
    (tmp_path / "subjects.csv").unlink()
    (tmp_path / "patch").mkdir()
    for sid in ("b_INSP", "b"):  # sorted by file name, "b_INSP" comes first; sorted by sid, "b" comes first
        np.save(tmp_path / "patch" / f"{sid}_patch.npy", np.zeros((6, 32, 32, 32), dtype=np.int16))
    store = PatchStore(tmp_path)
    assert store.sids == ["b_INSP", "b"]
    np.save(tmp_path / "another_patch_loc.npy", grid)
    with pytest.raises(StoreError, match=r"no atlas_patch_loc\.npy; rename one of .* to"):
        PatchStore(tmp_path)


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", ">f4", "<i4", ">i2", "<i8", "<u2", "u1", "<i1"])
def test_every_real_dtype_is_read(tmp_path, make_store, grid, dtype):
    make_store(tmp_path, 2, grid[:2])
    values = np.full((2, 32, 32, 32), 100, dtype=dtype)
    values[0, 0, 0, 0] = 120
    if values.dtype.kind == "f":
        values[0, 0, 0, 1:4] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "grouped_patch" / "patch_loc_0.npy", values)
    read = PatchStore(tmp_path).read(0, np.array([0]))
    assert read[0, 0, 0, 0] == 120 and read[0, 1, 1, 1] == 100
    assert read.dtype == (np.float32 if values.dtype.kind == "f" else np.int16)
    if values.dtype.kind == "f":
        assert read[0, 0, 0, 1:4].tolist() == [-1024, 240, -1024]


def test_wide_integers_are_clipped_not_wrapped(tmp_path, make_store, grid):
    make_store(tmp_path, 1, grid[:2])
    values = np.full((1, 32, 32, 32), 70000, dtype=np.int32)
    values[0, 0, 0, 0] = -70000
    np.save(tmp_path / "grouped_patch" / "patch_loc_0.npy", values)
    read = PatchStore(tmp_path).read(0, np.array([0]))
    assert read[0, 0, 0, 0] == -1024 and read[0, 1, 1, 1] == 240


def test_fortran_order_is_read(tmp_path, make_store, grid):
    patches = make_store(tmp_path, 5, grid)
    np.save(tmp_path / "grouped_patch" / "patch_loc_3.npy", np.asfortranarray(patches[:, 3]))
    rows = np.array([4, 0, 2])
    np.testing.assert_array_equal(PatchStore(tmp_path).read(3, rows), patches[rows, 3])


def damage_truncate(root):
    path = root / "grouped_patch" / "patch_loc_3.npy"
    path.write_bytes(path.read_bytes()[:-10])


def damage_rows(root):
    np.save(root / "grouped_patch" / "patch_loc_3.npy", np.zeros((4, 32, 32, 32), dtype=np.int16))


def damage_header(root):
    (root / "grouped_patch" / "patch_loc_3.npy").write_bytes(b"nothing")


def damage_kind(root):
    np.save(root / "grouped_patch" / "patch_loc_3.npy", np.zeros((5, 32, 32, 32), dtype=np.complex64))


def damage_missing(root):
    (root / "grouped_patch" / "patch_loc_3.npy").unlink()


def damage_subjects(root):
    (root / "subjects.csv").write_text("sid\na\nb\n")


def damage_table(root):
    np.save(root / "atlas_patch_loc.npy", np.array([[0, 0, 0], [1, 1, 1]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "patch_loc_3.npy is truncated"),
        (damage_rows, "patch_loc_3.npy has shape"),
        (damage_header, "patch_loc_3.npy is not a complete .npy file"),
        (damage_kind, "patch_loc_3.npy has dtype complex64"),
        (damage_missing, "patch_loc_3.npy does not exist; run preprocess/group_patches.py"),
        (damage_subjects, "lists 2 subjects"),
        (damage_table, "patch_loc_2.npy exists, but the location table has only 2 rows"),
    ],
)
def test_damage_is_reported(tmp_path, make_store, grid, damage, message):
    make_store(tmp_path, 5, grid)
    damage(tmp_path)
    with pytest.raises(StoreError, match=message):
        PatchStore(tmp_path)


def test_other_folders_are_refused(tmp_path, make_store, grid):
    with pytest.raises(StoreError, match="is not a folder"):
        PatchStore(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file is a file; give a folder"):
        PatchStore(tmp_path / "file")
    with pytest.raises(StoreError, match="is not a patch store"):
        PatchStore(tmp_path)
    make_store(tmp_path, 2, grid, grouped=False)
    with pytest.raises(StoreError, match="group_patches"):
        PatchStore(tmp_path, require_grouped=True)


def test_only_a_few_files_are_open(tmp_path, make_store, grid, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_OPEN", 2)
    for grouped in (True, False):
        patches = make_store(tmp_path / str(grouped), 4, grid, grouped=grouped)
        store = PatchStore(tmp_path / str(grouped))
        for location in (0, 1, 2, 3, 1, 0):
            np.testing.assert_array_equal(store.read(location, np.arange(4)), patches[:, location])
            assert sum(file._array is not None for file in store._files) <= 2


def test_a_partly_renamed_store_is_refused(tmp_path, make_store, grid):
    make_store(tmp_path, 2, grid)
    (tmp_path / "subjects.csv").unlink()
    (tmp_path / "grouped_patch" / ".partial").mkdir()
    with pytest.raises(StoreError, match=r"grouping was interrupted; run .*group_patches\.py"):
        PatchStore(tmp_path)


def test_left_out_label_columns_are_reported(tmp_path):
    (tmp_path / "l.csv").write_text("sid,age,FEV1,sex\n007,61,N/A,F\n12/34,50,null,M\n,40,80,M\n")
    notes = []
    values, names = read_labels(tmp_path / "l.csv", ["007", "12/34"], notes.append)
    assert names == ["age", "FEV1"] and notes == [
        f"{tmp_path / 'l.csv'}: column 'sex' left out: 'F' of sid 007 is not a finite float32 number"
    ]
    np.testing.assert_array_equal(values, np.array([[61, np.nan], [50, np.nan]], dtype=np.float32))


def test_a_label_too_large_for_float32_is_reported(tmp_path):
    (tmp_path / "l.csv").write_text("sid,age,huge\n007,61,1e39\n")
    notes = []
    values, names = read_labels(tmp_path / "l.csv", ["007"], notes.append)
    assert names == ["age"] and "column 'huge' left out: '1e39' of sid 007" in notes[0] and np.isfinite(values).all()


def test_labels_follow_the_order_of_the_subjects(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("sid,age,sex,FEV1pp\n007,61,F,80.5\n010,,M,NA\nzz,50,F,1e2\n")
    notes = []
    values, names = read_labels(path, ["010", "007", "absent"], notes.append)
    assert notes[-1] == f"{path}: no row for 1 of 3 subjects, for example 'absent'"
    assert names == ["age", "FEV1pp"]  # sex is not numeric
    np.testing.assert_array_equal(values, np.array([[np.nan, np.nan], [61, 80.5], [np.nan, np.nan]], dtype=np.float32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,age\n1,2\n", "no column 'sid'"),
        ("sid,sex\n007,F\n", "no numeric column"),
        ("sid,age\n7,2\n", "none of the store's subjects"),
        ("sid,age\n007,2\n007,3\n", "'007' more than once"),
    ],
)
def test_bad_label_tables_are_refused(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(StoreError, match=message):
        read_labels(tmp_path / "labels.csv", ["007"])


@pytest.mark.parametrize("grouped", [True, False])
def test_selected_subjects_keep_the_stores_order(make_store, tmp_path, grid, grouped):
    make_store(tmp_path / "store", 6, grid, grouped=grouped)
    whole = PatchStore(tmp_path / "store")
    names = [whole.sids[row] for row in (4, 1, 2)]
    (tmp_path / "some.csv").write_text("sid,age\n" + "".join(f"{sid},1\n" for sid in names))
    some = PatchStore(tmp_path / "store", subjects=tmp_path / "some.csv")
    assert some.sids == [whole.sids[row] for row in (1, 2, 4)] and some.num_subjects == 3
    np.testing.assert_array_equal(some.read(1, np.array([2, 0])), whole.read(1, np.array([4, 1])))
    (tmp_path / "some.csv").write_text(f"sid\n{names[0]}\n7\n")
    with pytest.raises(StoreError, match=r"some.csv: 1 of its 2 subjects are not in .*, for example '7'"):
        PatchStore(tmp_path / "store", subjects=tmp_path / "some.csv")


def regrouped(path):
    """Replace the file with a new file of the same name, as grouping does."""
    np.save(path.with_name("new.npy"), np.load(path)[::-1])
    path.with_name("new.npy").rename(path)


def written_in_place(path):
    np.lib.format.open_memmap(path, mode="r+")[0] = 7
    os.utime(path)


@pytest.mark.parametrize("change", [regrouped, written_in_place])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_changed_store_stops_a_run(tmp_path, make_store, grid, change, mapped):
    make_store(tmp_path, 5, grid)
    store = PatchStore(tmp_path)
    if mapped:
        store.read(3, np.arange(5))
    change(tmp_path / "grouped_patch" / "patch_loc_3.npy")
    store.read(2, np.arange(5))
    for look in (lambda: store.read(3, np.arange(5)), store.check_store_files_unchanged):
        with pytest.raises(StoreError, match=r"patch_loc_3\.npy has changed since this run opened the store"):
            look()


def test_a_changed_subject_list_stops_a_run(tmp_path, make_store, grid):
    make_store(tmp_path, 2, grid)
    store = PatchStore(tmp_path)
    (tmp_path / "subjects.csv").write_text("sid\n001\n000\n")
    with pytest.raises(StoreError, match=r"subjects\.csv has changed"):
        store.check_store_files_unchanged()


def test_the_version_depends_on_the_content(tmp_path, make_store, grid):
    make_store(tmp_path / "a", 4, grid)
    version = PatchStore(tmp_path / "a").version
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert PatchStore(tmp_path / "b").version == version
    (tmp_path / "some.csv").write_text("sid\n001\n002\n")
    others = {version, PatchStore(tmp_path / "a", subjects=tmp_path / "some.csv").version}
    make_store(tmp_path / "c", 4, grid, seed=1)
    make_store(tmp_path / "d", 4, grid + 1)
    make_store(tmp_path / "e", 4, grid, grouped=False)
    (tmp_path / "b" / "subjects.csv").unlink()  # the published layout has no subjects.csv
    others |= {PatchStore(tmp_path / name).version for name in "bcde"}
    assert len(others) == 6


def test_differences_between_patch_and_grouped_files_are_noted(tmp_path, make_store, grid):
    patches = make_store(tmp_path, 3, grid)
    assert not list(PatchStore(tmp_path).describe_outdated_grouped_files())  # patch/ may be missing
    (tmp_path / "patch").mkdir()
    for sid in ("000", "002", "003", "004", "005", "006"):
        np.save(tmp_path / "patch" / f"{sid}_patch.npy", patches[0])
    new, gone = PatchStore(tmp_path).describe_outdated_grouped_files()
    assert (
        "4 subjects (003, 004, 005, ...) in patch/ but not in grouped_patch/ will not be read" in new
        and "group_patches.py" in new
    )
    assert "1 subject (001) in grouped_patch/ but no longer in patch/ will be read" in gone
    (tmp_path / "grouped_patch" / "grouped.json").write_text("{}")
    os.utime(tmp_path / "patch" / "002_patch.npy", (0, 9e9))
    *_, newer = PatchStore(tmp_path).describe_outdated_grouped_files()
    assert "1 subject (002) in patch/ changed after grouping" in newer
