"""Test that the benchmark's literal implementations equal the method, and that its table contains the measurements."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.cnn3d import Encoder
from tools.dev.apart import LiteralProcess
from tools.dev.literal import LiteralAugmentation, encode_sample_by_sample, make_views_sample_by_sample
from tools.timing import scans
from tools.timing.data import measure_augmentation, measure_reading
from tools.timing.extraction import measure_extraction
from tools.timing.measure import Row, format_timing_table, make_comparison_row
from tools.timing.runs import measure_memory
from tools.timing.store import DISTINCT_FILES, make_store
from tools.timing.training import measure_training


def test_the_literal_encoder_equals_the_encoder():
    torch.manual_seed(0)
    encoder = Encoder(8, 4, 2, 1).double().eval()
    x, locs = torch.randn(2, 1, 32, 32, 32, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    with torch.no_grad():
        for ours, slow in zip(encoder(x, locs), encode_sample_by_sample(encoder, x, locs)):
            torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-10)


def test_literal_views_have_the_right_shapes_and_range():
    patches = torch.randint(-1024, 241, (3, 32, 32, 32), dtype=torch.int16)
    neighbors = torch.randint(-1024, 241, (3, 2, 32, 32, 32), dtype=torch.int16)
    query, key, around = make_views_sample_by_sample(patches, neighbors, LiteralAugmentation("ac"))
    assert query.shape == key.shape == (3, 1, 32, 32, 32) and around.shape == (3, 2, 32, 32, 32)
    assert not torch.equal(query, key)
    for view in (query, key, around):
        assert -1.01 <= float(view.min()) < float(view.max()) <= 1.01


def test_a_row_shows_the_measurement():
    row = make_comparison_row(
        "x", "samples/s", [2.0, 1.0, 4.0], [8.0, 8.0, 8.0], 10, 5, gflop_per_work=3.0, machine_gflop_per_s=100.0
    )
    assert row.ours == pytest.approx(5) and row.literal == pytest.approx(0.625)
    assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx((8, 4, 16))
    assert row.of_matrix_rate == pytest.approx(0.15)
    row = make_comparison_row("x", "s", [2.0], [12.0], 4.0, 1.0)
    assert row.ours == pytest.approx(0.5) and row.literal == pytest.approx(12) and row.ratio == pytest.approx(24)
    assert "unmeasured" in format_timing_table([Row("gpu", "samples/s", note="unmeasured: no GPU at hand")])


def test_the_store_has_every_location(tmp_path):
    store = make_store(tmp_path, 20, 4)
    assert (store.num_locations, store.num_subjects) == (20, 4)
    first, again = store.read(1, np.arange(4)), store.read(1 + DISTINCT_FILES, np.arange(4))
    assert np.array_equal(first, again) and not np.array_equal(first, store.read(2, np.arange(4)))
    assert first.min() >= -1024 and first.max() <= 240 and first.std() > 50


@pytest.fixture
def args(tmp_path):
    """Return the smallest possible benchmark settings."""
    return SimpleNamespace(device=torch.device("cpu"), batch=4, rounds=1, steps=1, reading_subjects=8)


@pytest.mark.slow
def test_rows_of_training_and_extraction(tmp_path, args):
    """This package and the literal implementation compute the same first loss and the same features."""
    store, report = make_store(tmp_path / "store", 8, 4), {}
    machine = {"fast_bf16": False, "matrix_gflops_float32": 100.0}
    apart = LiteralProcess(store, 8, args)
    try:
        rows = measure_training(store, 8, apart, args, machine, report) + measure_extraction(
            store, apart, args, machine
        )
    finally:
        apart.close()
    losses = report["first_step_loss"]
    assert losses["ours"] == pytest.approx(losses["literal"], rel=1e-4)
    measured = [row for row in rows if row.ours is not None]
    assert len(measured) == 3 and all(row.ours > 0 and row.literal > 0 for row in measured)
    assert all(row.note for row in rows if row.ours is None) and len(rows) == 6
    assert {"reading", "copying", "augmenting", "backward", "update", "queue"} <= set(report["profile_ms"]["float32"])


@pytest.mark.slow
def test_rows_of_data_and_memory(tmp_path, args):
    rows = [*measure_augmentation(args), *measure_reading(tmp_path / "reading", args)]
    assert len(rows) == 5 and all(row.ours > 0 and row.literal > 0 for row in rows)
    memory = measure_memory(make_store(tmp_path / "store", 8, 16), 8, tmp_path / "run", args)
    assert 0.1 < memory.ours < 8, memory.note


@pytest.mark.slow
def test_times_of_the_parts_of_a_scan(tmp_path, run, cohort, monkeypatch):
    """The test skips segmentation with lungmask's network, which takes half a minute and is covered by another test."""
    folder, _ = cohort
    monkeypatch.setattr(scans, "segment_with_network", lambda image, weights: image)
    flags = ("--scan", folder / "image" / "0002.nii.gz", "--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    run("tools/benchmark.py", *flags, "--rounds", 1, "--json", tmp_path / "scan.json")
    rows = {row["what"]: row for row in json.loads((tmp_path / "scan.json").read_text())["rows"]}
    assert len(rows) == 8 and all(row["ours"] > 0 for row in rows.values())
    cutting = next(row for what, row in rows.items() if what.startswith("cutting"))
    assert cutting["ratio"] > 1 and cutting["note"].endswith(("patches to 0 HU", "patches to 1 HU"))
    parts = [row["ours"] for row in rows.values() if row["unit"] == "core-seconds"]
    assert sum(parts) == pytest.approx(2 * rows["all of these"]["ours"])


def test_a_scan_needs_an_atlas(run_here, tmp_path):
    refused = run_here("tools/benchmark.py", "--scan", "x.nii.gz", cwd=tmp_path)
    assert refused.returncode == 2 and "--scan and --atlas-mask need each other" in refused.stderr
    refused = run_here("tools/benchmark.py", "--scan", "x.nii.gz", "--atlas-mask", "m.nii.gz", cwd=tmp_path)
    assert refused.returncode == 2 and "--scan x.nii.gz does not exist" in refused.stderr
