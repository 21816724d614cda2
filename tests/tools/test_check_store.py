"""Test that an intact store has no problems, and that every kind of damage is reported with its file."""

import shutil

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def store(make_store, grid, tmp_path):
    """Write a store of twelve subjects at six locations, in patch/ and in grouped files."""
    root = tmp_path / "store"
    patches = make_store(root, 12, grid)
    (root / "patch").mkdir()
    for index, one in enumerate(patches):
        np.save(root / "patch" / f"{index:03d}_patch.npy", one)
    return root


def check(run_here, root, *flags):
    result = run_here("tools/check_store.py", "--root-dir", root, "--no-progress", *flags, cwd=root)
    return result.returncode, result.stdout + result.stderr


def test_an_intact_store(store, run_here):
    assert check(run_here, store) == (
        0,
        "check_store: 6 locations, 12 subjects; 6 grouped files, 12 files in patch/; compared rows at 5 locations "
        "(--locations), cut 0 scans again; no problems\n",
    )


def test_a_store_of_the_published_code(store, run_here):
    """check_store.py can read a store that the published code made.

    The published code uses a different table name, may write float patches with NaN, and writes no subjects.csv.
    """
    (store / "atlas_patch_loc.npy").rename(store / "its_patch_loc.npy")
    (store / "subjects.csv").unlink()
    for path in (*store.glob("patch/*.npy"), *store.glob("grouped_patch/*.npy")):
        np.save(path, np.load(path).astype(np.float32))
    assert check(run_here, store)[0] == 0
    path = store / "patch" / "003_patch.npy"
    patches = np.load(path)
    patches[2, 0, 0, :3] = np.nan
    np.save(path, patches)
    status, said = check(run_here, store, "--locations", "1")
    assert status == 1 and f"{path} has 3 values that are not finite" in said


def swap(path, first, second):
    rows = np.load(path)
    rows[[first, second]] = rows[[second, first]]
    np.save(path, rows)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "rows exchanged": (
        lambda root: [swap(path, 2, 7) for path in sorted((root / "grouped_patch").glob("*.npy"))],
        "row 2 is listed as 002 but holds another patch; the right one is in row 7, listed as 007",
    ),
    "one file's rows exchanged": (
        lambda root: swap(root / "grouped_patch" / "patch_loc_4.npy", 0, 11),
        "patch_loc_4.npy: row 11 is listed as 011 but holds another patch",
    ),
    "short": (lambda root: shorten(root / "grouped_patch" / "patch_loc_1.npy"), "patch_loc_1.npy is truncated"),
    "missing": (lambda root: (root / "grouped_patch" / "patch_loc_5.npy").unlink(), "patch_loc_5.npy does not exist"),
    "no array": (
        lambda root: (root / "patch" / "004_patch.npy").write_bytes(b"hello"),
        "004_patch.npy is not a complete .npy file",
    ),
    "other shape": (
        lambda root: np.save(root / "patch" / "005_patch.npy", np.zeros((5, 32, 32, 32), np.int16)),
        "005_patch.npy has shape (5, 32, 32, 32); expected (6, 32, 32, 32)",
    ),
    "shifted": (
        lambda root: np.save(
            root / "patch" / "006_patch.npy", np.load(root / "patch" / "006_patch.npy") + np.int16(1024)
        ),
        "006_patch.npy has no value below 0, so its values are not Hounsfield units",
    ),
    "twice": (
        lambda root: shutil.copy(root / "patch" / "001_patch.npy", root / "patch" / "008_patch.npy"),
        "008_patch.npy has the same patches as 001",
    ),
    "empty": (
        lambda root: np.save(
            root / "grouped_patch" / "patch_loc_0.npy", np.full((12, 32, 32, 32), -500, dtype=np.int16)
        ),
        "patch_loc_0.npy: row 0 and 11 more rows have the same value in every voxel",
    ),
    "ungrouped": (
        lambda root: shutil.copy(root / "patch" / "001_patch.npy", root / "patch" / "new_patch.npy"),
        "new is in patch/ but not in grouped_patch/",
    ),
    "more locations": (
        lambda root: shutil.copy(
            root / "grouped_patch" / "patch_loc_0.npy", root / "grouped_patch" / "patch_loc_6.npy"
        ),
        "patch_loc_6.npy exists, but the location table has only 6 rows",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported(store, run_here, kind):
    damage, sentence = DAMAGE[kind]
    damage(store)
    status, said = check(run_here, store, "--locations", "6")
    assert status == 1 and sentence in said and "Traceback" not in said


def test_a_folder_without_a_store_is_refused(tmp_path, run_here):
    status, said = check(run_here, tmp_path)
    assert status == 2 and "is not a patch store" in said


def test_patches_are_compared_with_their_scans(cohort, run_here, tmp_path):
    folder, made = cohort
    root = tmp_path / "store"
    shutil.copytree(made, root)
    flags = ("--input-csv", folder / "dataset.csv", "--atlas-mask", folder / "atlas_lung_mask.nii.gz", "--scans", 2)
    status, said = check(run_here, root, *flags)
    assert status == 0 and "cut 2 scans again; no problems" in said
    # Give each subject the patches of the next subject. The arrays are intact but belong to other scans.
    sids = pd.read_csv(folder / "dataset.csv", dtype=str)["sid"].tolist()
    for folder_name, suffix in (("patch", "_patch.npy"),):
        arrays = [np.load(root / folder_name / f"{sid}{suffix}") for sid in sids]
        for sid, array in zip(sids, arrays[1:] + arrays[:1]):
            np.save(root / folder_name / f"{sid}{suffix}", array)
    shutil.rmtree(root / "grouped_patch")
    status, said = check(run_here, root, *flags)
    assert status == 1 and "patches differ from" in said and "by up to" in said
