"""Test the scores of unusual.py: they are Mahalanobis distances, and only sick subjects have high scores."""

import json

import numpy as np
import pandas as pd
import pytest

from tools.evaluation.normal import HealthyDensity, score_patch_abnormality


def test_scores_are_mahalanobis_distances():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    healthy = rng.normal(size=(4000, 2, 4)) @ mix + np.array([[[5.0]], [[-3.0]]]).reshape(1, 2, 1)
    asked = rng.normal(size=(7, 2, 4)) * 3
    precision = np.linalg.inv(mix.T @ mix)
    away = asked - np.array([5.0, -3.0]).reshape(1, 2, 1)
    wanted = np.einsum("nli,ij,nlj->nl", away, precision, away) / 4
    density = HealthyDensity(healthy, np.arange(4000))
    np.testing.assert_allclose(density.score_by_mahalanobis_distance(asked, np.arange(7)), wanted, rtol=0.15)
    assert density.score_by_mahalanobis_distance(healthy, np.arange(4000)).mean() == pytest.approx(1, abs=0.05)


def test_healthy_subjects_are_scored_without_themselves():
    """With many features, a fit to few subjects would give these subjects lower scores than new subjects."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 3, 40)) @ rng.normal(size=(40, 40))
    healthy = np.arange(60) < 30
    scores = score_patch_abnormality(features, healthy).mean(axis=1)
    spread = scores.std()
    assert abs(scores[healthy].mean() - scores[~healthy].mean()) < 0.5 * spread
    sick, well = np.flatnonzero(~healthy), np.flatnonzero(healthy)
    seen = HealthyDensity(features, well)
    assert (
        seen.score_by_mahalanobis_distance(features, sick).mean()
        - seen.score_by_mahalanobis_distance(features, well).mean()
        > spread
    )


@pytest.fixture
def study(tmp_path):
    rng = np.random.default_rng(2)
    features = rng.normal(size=(50, 6, 8)).astype(np.float32)
    features[30:45, 4] += 2.5  # sick at location 4
    sids = [f"{n:03d}" for n in range(50)]
    np.save(tmp_path / "pred_arr_patch_full.npy", features)
    np.save(tmp_path / "sid_arr_full.npy", np.array(sids))
    healthy = [1] * 30 + [0] * 15 + [""] * 5
    table = pd.DataFrame({"sid": sids, "healthy": healthy, "age": range(50), "few": [1] * 5 + [0] * 45})
    table.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def test_sick_subjects_stand_out_at_the_sick_location(study, run):
    flags = ("--features-dir", ".", "--labels", "labels.csv", "--healthy", "healthy", "--out-dir", "out")
    shown = run("tools/unusual.py", *flags, cwd=study).stdout
    found = json.loads((study / "out" / "unusual.json").read_text())["features"]
    assert found["low"] > 0.9 and "30 healthy subjects to learn from" in shown and "AUROC" in shown
    patients = pd.read_csv(study / "out" / "unusual.csv", dtype={"sid": str})
    assert (patients["worst_patch"][30:45] == 4).all() and patients["score"][:30].mean() == pytest.approx(1, abs=0.2)
    patches = pd.read_csv(study / "out" / "patch_scores.csv", dtype={"sid": str})
    assert len(patches) == 300 and list(patches.columns) == ["sid", "patch", "value"]
    assert patches[patches["sid"] == "031"]["value"].idxmax() % 6 == 4


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("few", "has 5 healthy subjects; at least 10 are needed"),
        ("age", "must be 1 (healthy), 0"),
        ("no", "no numeric column 'no'"),
    ],
)
def test_bad_arguments_are_refused(study, run_here, column, message):
    flags = ("--features-dir", ".", "--labels", "labels.csv", "--healthy", column, "--out-dir", "out")
    result = run_here("tools/unusual.py", *flags, cwd=study)
    assert result.returncode == 2 and message in result.stderr and not (study / "out").exists()
