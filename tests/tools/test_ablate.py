"""Test that the ablation study finds planted effects and does not repeat finished runs."""

import sys

import numpy as np
import pandas as pd
import pytest

from misc.run.flags import parse_arguments
from tools import ablate
from tools.evaluation.ablation import format_markdown, summarize_runs
from tools.evaluation.learn import MODELS, compute_held_out_ridge_r2, fit_and_predict_held_out, make_even_table_weights


def test_differences_are_paired_by_seed():
    rows = [
        {"arm": arm, "seed": seed, "column": "age", "table": "features", "r2": 0.5 + 0.1 * seed + gain}
        for arm, gain in (("full", 0.0), ("less", -0.2))
        for seed in range(3)
    ]
    rows.append({"arm": "baseline", "seed": 0, "column": "age", "table": "density", "r2": 0.4})
    table = summarize_runs(pd.DataFrame(rows), "full").set_index("arm")
    assert table.loc["less", "difference"] == pytest.approx(-0.2)
    assert table.loc["less", "difference_sd"] == pytest.approx(0, abs=1e-9) and table.loc["full", "sd"] > 0.09
    assert np.isnan(table.loc["full", "difference"]) and np.isnan(table.loc["baseline", "sd"])
    text = format_markdown(summarize_runs(pd.DataFrame(rows), "full"), np.array([True, False, False]))
    assert "1 held-out subjects, fitted to 2" in text
    assert "| age | 0.60 ± 0.10 | 0.40 ± 0.10 (-0.20 ± 0.00) | 0.40 |" in text


def test_held_out_subjects_are_not_used_for_fitting():
    """Random labels get a low score, and labels that depend on a feature get a high score.

    If the labels of the held-out subjects are given the opposite sign, the score is negative."""
    rng = np.random.default_rng(0)
    features, held = rng.normal(size=(80, 20)), np.arange(80) >= 50
    assert compute_held_out_ridge_r2(features, rng.normal(size=80), held) < 0.2
    signal = features[:, 0] + 0.1 * rng.normal(size=80)
    assert compute_held_out_ridge_r2(features, signal, held) > 0.8
    signal[held] = -signal[held]
    assert compute_held_out_ridge_r2(features, signal, held) < -1


def test_joined_tables_average_two_models():
    """One model is fitted to the second table, and the other to both.

    The labels of held-out subjects have no effect on the predictions.
    """
    rng, model = np.random.default_rng(0), MODELS["regression"]
    one, other, held = rng.normal(size=(120, 60)), rng.normal(size=(120, 4)), np.arange(120) >= 60
    target = one[:, 0] + other.sum(axis=1) + rng.normal(size=120)
    both = np.hstack([one, other])
    found = fit_and_predict_held_out(model, both, target, held, make_even_table_weights(60, 4))
    evenly = np.repeat([np.sqrt(4 / 60), 1], [60, 4])  # the squared weights of each table sum to 4
    each = [
        fit_and_predict_held_out(model, other, target, held),
        fit_and_predict_held_out(model, both, target, held, evenly),
    ]
    np.testing.assert_allclose(found, (each[0] + each[1]) / 2, rtol=1e-9)
    target[held] = rng.normal(size=60)
    assert (fit_and_predict_held_out(model, both, target, held, make_even_table_weights(60, 4)) == found).all()


def test_a_wide_table_does_not_drown_a_narrow_one():
    """In a model of three tables, the squared column weights of each table have the same sum."""
    weights = make_even_table_weights(2000, 7, 30)
    assert weights.shape == (2, 2037) and (weights[0] == np.repeat([0, 0, 1], [2000, 7, 30])).all()
    shares = [float(part @ part) for part in np.split(weights[1], [2000, 2007])]
    assert shares == pytest.approx([30, 30, 30])


def test_gain_from_an_added_table():
    """A table with new information improves the prediction.

    With an added table of noise, the average of two models predicts better than one model of both tables.
    """
    rng = np.random.default_rng(0)
    known, noise, held = rng.normal(size=(120, 4)), rng.normal(size=(120, 60)), np.arange(120) >= 60
    hidden = rng.normal(size=120)
    target = known.sum(axis=1) + hidden
    alone, weights = compute_held_out_ridge_r2(known, target, held), make_even_table_weights(60, 4)
    telling, beside_noise = np.hstack([hidden[:, None] + 0.3 * noise, known]), np.hstack([noise, known])
    assert compute_held_out_ridge_r2(telling, target, held, weights) > alone + 0.1
    plainly = compute_held_out_ridge_r2(beside_noise, target, held)
    assert alone > compute_held_out_ridge_r2(beside_noise, target, held, weights) > (alone + plainly) / 2


@pytest.mark.slow
def test_a_study_by_command_line(make_store, grid, tmp_path, run):
    make_store(tmp_path / "store", 40, grid[:3], seed=3)
    sids = pd.read_csv(tmp_path / "store" / "subjects.csv", dtype=str)["sid"]
    labels = pd.DataFrame({"sid": sids, "held_out": [0, 0, 0, 1] * 10, "age": np.arange(40.0), "same": 7})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--out-dir", "study", "--root-dir", "store", "--labels", "labels.csv", "--seeds", 1, "--epochs", 1)
    arms = ("--arms", "random", "--arm", "narrow=--rep-dim 8 --moco-dim 8")
    shown = run("tools/ablate.py", *flags, *arms, cwd=tmp_path).stdout
    rows = pd.read_csv(tmp_path / "study" / "ablation.csv")
    assert set(rows["arm"]) == {"baseline", "random", "narrow"} and set(rows["column"]) == {"age"}
    assert (tmp_path / "study" / "ablation.png").stat().st_size > 5000
    assert shown.strip() == (tmp_path / "study" / "ablation.md").read_text(encoding="utf-8").strip()
    trained = (tmp_path / "study" / "trained_on.csv").read_text().split()[1:]
    assert trained == [sid for n, sid in enumerate(sids) if n % 4 != 3]
    log = (tmp_path / "study" / "rows" / "narrow-0.log").read_text()
    assert "30 subjects" in log

    (tmp_path / "study" / "rows" / "narrow-0.csv").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "rows").glob("*.log")}
    assert run("tools/ablate.py", *flags, *arms, cwd=tmp_path).stdout == shown
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"narrow-0.log"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arms", "ful"), "--arms ful must be one of full, no-neighbours"),
        (("--arms",), "--arms is empty; give at least one"),
        (("--arm", "cold"), "--arm cold: give NAME=FLAGS"),
        (("--root-dir", "store"), "--root-dir and --labels must be given together"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, run_here, flags, message):
    result = run_here("tools/ablate.py", "--out-dir", "study", *flags, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and not (tmp_path / "study").exists()


@pytest.mark.parametrize("recipe", ["small", "published"])
def test_arms_differ_from_full_only_as_named(monkeypatch, recipe):
    """With any recipe, each arm differs from the full arm only in the settings that the arm's name states.

    User-defined arms also start from the full arm.
    """
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--out-dir", "o", "--arm", "cold=--moco-t 0.1"])
    arms = ablate.parse_arguments().arms
    given = {
        name: parse_arguments(None, ["--root-dir", "p", "--exp-name", "e", "--recipe", recipe, *flags])
        for name, flags in arms.items()
    }
    full = vars(given["full"])
    assert (full["beta"], full["k_neighbors"]) == (1, 2)
    changed = {name: {key for key, value in vars(args).items() if value != full[key]} for name, args in given.items()}
    assert changed["no-neighbours"] == {"beta"} and changed["one-expert"] == {"num_experts"}
    assert changed["cold"] == {"moco_t"} and "beta" not in changed["queues"] | changed["one-queue"]
