"""Test the density and histogram baselines on a store with known densities."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from data.store import PatchStore
from tools.evaluation.baselines import BINS, make_baseline_tables
from tools.evaluation.tables import describe_store_mismatch


@pytest.fixture
def store(tmp_path, grid):
    """Write three subjects with a quarter, half and none of the lung below -950 HU. The last location has no lung."""
    (tmp_path / "grouped_patch").mkdir(parents=True)
    np.save(tmp_path / "atlas_patch_loc.npy", grid)
    patches = np.full((3, len(grid), 32, 32, 32), -850, dtype=np.int16)
    patches[0, :, :8], patches[1, :, :16] = -980, -980
    patches[:, -1] = 40
    for location in range(len(grid)):
        np.save(tmp_path / "grouped_patch" / f"patch_loc_{location}.npy", patches[:, location])
    (tmp_path / "subjects.csv").write_text("sid\na\nb\nc\n")
    return tmp_path


def test_shares_and_histograms(store, grid):
    tables = make_baseline_tables(PatchStore(store), no_progress=True)
    assert tables["density"][0].tolist() == [0.25, 0.5, 0.0] and tables["density"].index.tolist() == ["a", "b", "c"]
    by_location = tables["density_by_location"].to_numpy()
    assert by_location.shape == (3, len(grid)) and (by_location[:2, :-1] == [[0.25], [0.5]]).all()
    assert (by_location[:, -1] == 0).all()
    histogram = tables["histogram"].to_numpy()
    assert histogram.shape == (3, BINS) and histogram.sum(1) == pytest.approx([1, 1, 1])
    assert histogram[0, 1] == pytest.approx(0.25 * 5 / 6)  # this bin covers -984.5 to -945 HU
    assert tables["histogram_by_location"].shape == (3, BINS * len(grid))
    quick = make_baseline_tables(PatchStore(store), no_progress=True, smoothed=False)
    assert list(quick) == [name for name in tables if name != "histogram_smoothed"]
    assert all(quick[name].equals(tables[name]) for name in quick)


def test_smoothing_takes_noise_out_of_a_histogram(store, grid):
    """Smoothing more than doubles the share of voxels in the largest bin, for noise of SD 60 HU around -850 HU.

    The smoothed histogram equals the result of scipy's Gaussian filter.
    """
    noise = np.random.default_rng(0).normal(-850, 60, (3, len(grid), 32, 32, 32)).astype(np.int16)
    for location in range(len(grid)):
        np.save(store / "grouped_patch" / f"patch_loc_{location}.npy", noise[:, location])
    tables = make_baseline_tables(PatchStore(store), no_progress=True)
    plain, smoothed = (tables[name].to_numpy() for name in ("histogram", "histogram_smoothed"))
    assert smoothed.shape == (3, BINS) and smoothed.sum(1) == pytest.approx([1, 1, 1])
    assert smoothed.max() > 2 * plain.max()
    sigma = np.sqrt(1 + 1 / 12)  # plus 1/12, because the tested kernel is integrated over each voxel
    values = np.stack([gaussian_filter(patch.astype(float), sigma, mode="constant") for patch in noise[0]])
    values /= gaussian_filter(np.ones((32, 32, 32)), sigma, mode="constant")  # correct for scipy's zero padding
    wanted = np.histogram(values, np.linspace(-1024, 240, BINS + 1))[0] / values.size
    assert smoothed[0] == pytest.approx(wanted, abs=0.002)


def test_command(tmp_path, make_store, grid, run):
    """The histogram predicts a label that rises with HU. Random features predict this label only with the histogram."""
    rng = np.random.default_rng(0)
    patches = make_store(tmp_path / "s", 24, grid)
    for location in range(len(grid)):
        shift = np.linspace(-100, 100, 24)[:, None, None, None]
        moved = np.clip(patches[:, location] // 4 - 800 + shift, -1024, 240).astype(np.int16)
        np.save(tmp_path / "s" / "grouped_patch" / f"patch_loc_{location}.npy", moved)
    sids = [f"{n:03d}" for n in range(24)]
    features = pd.DataFrame(rng.normal(size=(24, 3)), columns=["f000", "f001", "f002"])
    features.insert(0, "sid", sids)
    features.to_csv(tmp_path / "f.csv", index=False)
    pd.DataFrame({"sid": sids, "density": np.linspace(0, 1, 24)}).to_csv(tmp_path / "l.csv", index=False)
    flags = ("--features", "f.csv", "--labels", "l.csv", "--baselines", "s", "--json", "e.json")
    version = PatchStore(tmp_path / "s").version
    (tmp_path / "features.json").write_text(json.dumps({"store_version": version, "root_dir": "there"}))
    result = run("tools/evaluate.py", *flags, "--out-dir", "o", cwd=tmp_path)
    assert "different store" not in result.stderr
    assert "Adding the features to the histogram improves 0 of 1 label(s)" in result.stdout
    (row,) = [
        line for line in (tmp_path / "o" / "evaluation.md").read_text().splitlines() if "| r2 | features+h" in line
    ]
    assert "Adding the features to the histogram" in (tmp_path / "o" / "evaluation.md").read_text()
    # The row has three intervals: the metric, the gain over features alone, and the gain over the histogram alone.
    assert row.count(" to ") == 3
    scores = {name: row["r2"]["mean"] for name, row in json.loads((tmp_path / "e.json").read_text())["density"].items()}
    assert scores["histogram"] > 0.95 and scores["features+histogram"] > 0.9 and scores["features"] < 0.2
    names = ("density", "density_by_location", "histogram", "histogram_smoothed", "histogram_by_location")
    for name in (*names, "features+histogram"):
        assert name in scores and f" {name} |" in result.stdout.splitlines()[0]


def test_another_store_with_the_same_sids_is_reported(tmp_path, make_store, grid):
    make_store(tmp_path / "a", 3, grid)
    make_store(tmp_path / "b", 3, grid)
    np.save(tmp_path / "b" / "grouped_patch" / "patch_loc_0.npy", np.zeros((3, 32, 32, 32), dtype=np.int16))
    mine, theirs = PatchStore(tmp_path / "a"), PatchStore(tmp_path / "b")
    made = {"store_version": mine.version, "root_dir": "/data/a"}
    (tmp_path / "features.json").write_text(json.dumps(made))
    assert describe_store_mismatch(tmp_path / "f.csv", mine, "--baselines") == ""
    told = describe_store_mismatch(tmp_path / "f.csv", theirs, "--baselines")
    assert "f.csv was extracted from /data/a, but --baselines" in told and "is a different store" in told
    for text in ("", "[]", "{}"):  # not written by extract_feature.py
        (tmp_path / "features.json").write_text(text)
        assert describe_store_mismatch(tmp_path / "f.csv", theirs, "--baselines") == ""
