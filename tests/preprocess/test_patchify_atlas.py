"""Test stage 1: compare the location grid with a literal loop and with the published table."""

import numpy as np
import pytest
import SimpleITK as sitk

from data.layout import StoreError
from preprocess.patchify_atlas import find_grid_locations


def literal_grid(lung, patch, step):
    threshold = 1
    while True:
        found = []
        for x in range(0, lung.shape[0] - patch, step):
            for y in range(0, lung.shape[1] - patch, step):
                for z in range(0, lung.shape[2] - patch, step):
                    count = int(lung[x : x + patch, y : y + patch, z : z + patch].sum())
                    if 10 * count > threshold * patch**3:
                        found.append((x, y, z))
        if len(found) < 1000:
            return np.array(found)
        threshold += 1


@pytest.mark.parametrize(
    ("shape", "patch", "step"), [((30, 25, 28), 10, 4), ((60, 55, 62), 8, 13), ((26, 24, 25), 4, 2)]
)
def test_grid_is_the_rule_written_out(shape, patch, step):
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    lung = (x**2 + y**2 + z**2 < 0.9) & (rng.random(shape) < 0.7)
    ours = find_grid_locations(lung, patch, step)
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, literal_grid(lung, patch, step))


def test_the_threshold_rises_while_a_thousand_locations_remain():
    lung = np.zeros((26, 26, 26), dtype=bool)
    lung[:, :, ::4] = True  # a quarter of each patch is lung, so thresholds of 0.1 and 0.2 keep the patch
    with pytest.raises(StoreError, match="no patch"):
        find_grid_locations(lung, 4, 2)  # all 11**3 patches pass thresholds 0.1 and 0.2; none passes 0.3
    # A threshold of 0.1 gives fewer than 1000 locations, so it is not raised.
    assert len(find_grid_locations(lung, 4, 3)) == 8**3


def test_a_share_equal_to_the_threshold_is_dropped():
    lung = np.zeros((21, 21, 21), dtype=bool)
    lung[:10, :10, 0] = True  # 100 of 1000 voxels of the first patch are lung
    lung[15, 15, 15] = True
    with pytest.raises(StoreError, match="no patch"):
        find_grid_locations(lung, 10, 10)
    lung[0, 0, 1] = True
    assert find_grid_locations(lung, 10, 10).tolist() == [[0, 0, 0]]


def test_scan_order_stops_before_the_edge():
    lung = np.ones((21, 20, 25), dtype=bool)
    # Patches start at x = 0, 5, 10 (below 21 - 10), y = 0, 5 (below 20 - 10) and z = 0, 5, 10 (below 25 - 10).
    # z varies fastest.
    ours = find_grid_locations(lung, 10, 5)
    assert ours.tolist() == [[x, y, z] for x in (0, 5, 10) for y in (0, 5) for z in (0, 5, 10)]


def test_atlas_smaller_than_a_patch():
    with pytest.raises(StoreError, match="has no room for patches of 32"):
        find_grid_locations(np.ones((40, 32, 40), dtype=bool), 32, 26)


@pytest.fixture
def atlas(tmp_path):
    """Write an atlas mask of 70 x 64 x 60 voxels with a block for each lung."""
    labels = np.zeros((60, 64, 70), dtype=np.int16)  # (z, y, x)
    labels[5:55, 5:60, 5:33] = 50
    labels[5:55, 5:60, 37:66] = 100
    path = tmp_path / "atlas.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(path))
    return path


def test_the_command_writes_or_adopts_a_table_and_never_overwrites(tmp_path, run, atlas):
    def call(*flags, check=True):
        command = ("preprocess/patchify_atlas.py", "--atlas-mask", atlas, "--root-dir", tmp_path / "s", *flags)
        return run(*command, cwd=tmp_path, check=check)

    call()
    table = np.load(tmp_path / "s" / "atlas_patch_loc.npy")
    assert table.dtype == np.int64 and table[0].tolist() == [0, 0, 0]
    assert "exists already" in call().stdout
    other = tmp_path / "other.npy"
    np.save(other, table[:-1].astype(np.int32))
    refused = call("--atlas-patch-loc", other, check=False)
    assert refused.returncode == 2 and "holds another table" in refused.stderr and "Traceback" not in refused.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "s" / "atlas_patch_loc.npy"), table)
    adopted = run(
        "preprocess/patchify_atlas.py", "--atlas-mask", atlas, "--root-dir", tmp_path / "t", "--atlas-patch-loc", other
    )
    assert "locations" in adopted.stdout
    kept = np.load(tmp_path / "t" / "atlas_patch_loc.npy")
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, table[:-1])
    np.save(other, table + 100)
    outside = run(
        "preprocess/patchify_atlas.py",
        "--atlas-mask",
        atlas,
        "--root-dir",
        tmp_path / "u",
        "--atlas-patch-loc",
        other,
        check=False,
    )
    assert outside.returncode == 2 and "is outside the atlas" in outside.stderr


def test_the_table_of_an_older_store_is_kept(tmp_path, run, atlas):
    store = tmp_path / "s"
    store.mkdir()
    np.save(store / "19676E_patch_loc.npy", np.array([[0, 0, 0], [26, 0, 0]]))
    flags = ("--atlas-mask", atlas, "--root-dir", store)
    refused = run("preprocess/patchify_atlas.py", *flags, check=False)
    assert refused.returncode == 2 and "19676E_patch_loc.npy holds another table" in refused.stderr
    same = run("preprocess/patchify_atlas.py", *flags, "--atlas-patch-loc", store / "19676E_patch_loc.npy")
    assert "exists already, 2 locations" in same.stdout and not (store / "atlas_patch_loc.npy").exists()


def test_atlas_with_other_labels(tmp_path, run):
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((40, 40, 40), dtype=np.uint8)), str(tmp_path / "a.nii.gz"))
    wrong = run(
        "preprocess/patchify_atlas.py", "--atlas-mask", tmp_path / "a.nii.gz", "--root-dir", tmp_path, check=False
    )
    assert wrong.returncode == 2 and "50 (right lung), 100 (left lung)" in wrong.stderr


def test_a_lung_mask_becomes_an_atlas(tmp_path, run_here):
    """Resampling a mask of two half-ellipsoids to 1 mm keeps their shape; the labels become 50 and 100."""
    z, y, x = np.meshgrid(np.arange(30) * 3.0, np.arange(50) * 2.0, np.arange(60) * 2.0, indexing="ij")
    body = ((z - 43) / 40) ** 2 + ((y - 49) / 45) ** 2 + ((x - 59) / 55) ** 2 < 1
    mask = sitk.GetImageFromArray((body * np.where(x < 59, 1, 2)).astype(np.uint8))
    mask.SetSpacing((2, 2, 3))
    mask.SetOrigin((-10, 5, 7))
    sitk.WriteImage(mask, str(tmp_path / "lung.nii.gz"))
    flags = ("--lung-mask", tmp_path / "lung.nii.gz", "--output", tmp_path / "atlas.nii.gz")
    assert run_here("preprocess/make_atlas_mask.py", *flags, cwd=tmp_path).returncode == 0
    atlas = sitk.ReadImage(str(tmp_path / "atlas.nii.gz"))
    assert atlas.GetSpacing() == (1, 1, 1) and atlas.GetSize() == (119, 99, 88) and atlas.GetOrigin() == (-10, 5, 7)
    array = sitk.GetArrayFromImage(atlas)
    assert set(np.unique(array)) == {0, 50, 100}
    for label, own in ((50, 1), (100, 2)):
        where, was = np.argwhere(array == label), np.argwhere(sitk.GetArrayFromImage(mask) == own) * [3, 2, 2]
        np.testing.assert_allclose(where.mean(0), was.mean(0), atol=1)
        assert abs(len(where) / (len(was) * 12) - 1) < 0.02
    refused = run_here("preprocess/make_atlas_mask.py", *flags, cwd=tmp_path)
    assert refused.returncode == 2 and "exists already" in refused.stderr
    step1 = ("--root-dir", tmp_path / "s", "--patch-size", 8, "--step-size", 8)
    fine = run_here("preprocess/patchify_atlas.py", "--atlas-mask", tmp_path / "atlas.nii.gz", *step1, cwd=tmp_path)
    assert fine.returncode == 0 and "warning" not in fine.stderr
    coarse = sitk.GetImageFromArray(array)
    coarse.SetSpacing((1.5, 1.5, 1.5))
    sitk.WriteImage(coarse, str(tmp_path / "coarse.nii.gz"))
    warned = run_here("preprocess/patchify_atlas.py", "--atlas-mask", tmp_path / "coarse.nii.gz", *step1, cwd=tmp_path)
    assert "coarse.nii.gz has voxels of 1.5 x 1.5 x 1.5 mm" in warned.stderr


@pytest.mark.reference
def test_published_mask_and_table(reference):
    from preprocess.atlas import read_atlas_mask

    lung = sitk.GetArrayFromImage(read_atlas_mask(reference / "atlas_lung_mask.nii.gz")).transpose(2, 1, 0) > 0
    published = np.load(reference / "atlas_patch_loc.npy")
    ours = find_grid_locations(lung, 32, 26)
    assert len(ours) == 575
    np.testing.assert_array_equal(ours, np.delete(published, [296, 297, 299, 303, 304, 369], axis=0))
    centres = published + 16
    assert float(lung[tuple(centres.T)].mean()) == pytest.approx(0.64, abs=0.005)
