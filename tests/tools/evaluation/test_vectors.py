"""Test that patient vectors equal their definition and use no information about held-out subjects."""

import json
import subprocess

import numpy as np
import pandas as pd
import pytest

from misc.command import UserError
from tools.evaluation import vectors
from tools.evaluation.learn import MODELS, compute_held_out_ridge_r2, fit_and_predict_held_out, predict_out_of_fold
from tools.evaluation.vectors import (
    JoinedTable,
    PatientVectors,
    Standardization,
    get_features_fitted_to_rows,
    join_tables,
)

N, L, D = 30, 7, 5


@pytest.fixture
def patches():
    rng = np.random.default_rng(0)
    found = rng.normal(size=(N, L, D)) * rng.uniform(0.1, 9, (L, D)) + rng.normal(size=(L, D)) * 50
    found[:, :, 3] = 2.5  # this feature is the same for all subjects and locations
    return found.astype(np.float32)


def literal_vectors(patches, fitted):
    """Compute the vectors subject by subject and location by location."""
    found = np.zeros((len(patches), 2 * D))
    for subject in range(len(patches)):
        z = np.zeros((L, D))
        for location in range(L):
            for feature in range(D):
                known = [float(patches[row, location, feature]) for row in range(len(patches)) if fitted[row]]
                sd = np.std(known)
                away = patches[subject, location, feature] - np.mean(known)
                z[location, feature] = 0 if sd < 1e-6 else min(max(away / sd, -10), 10)
        found[subject] = [*z.mean(axis=0), *z.std(axis=0)]
    return found


@pytest.mark.parametrize("at_once", [1, vectors.BYTES_AT_ONCE])
def test_vectors_equal_their_definition(patches, monkeypatch, at_once):
    monkeypatch.setattr(vectors, "BYTES_AT_ONCE", at_once)
    fitted = np.arange(N) % 3 > 0
    ours = PatientVectors("moments", patches, np.arange(N)).compute_standardized_features(fitted)
    np.testing.assert_allclose(ours, literal_vectors(patches, fitted), rtol=1e-9, atol=1e-9)
    some = np.array([4, 9, 11, 2])  # a few rows in a different order, because a label table may be ordered differently
    part = PatientVectors("moments", patches, np.arange(N))[some]
    np.testing.assert_allclose(
        part.compute_standardized_features(np.ones(4, dtype=bool)),
        literal_vectors(patches[some], np.ones(4, dtype=bool)),
    )
    assert part.shape == (4, 2 * D)


def test_a_channel_that_only_held_out_subjects_use_does_not_dominate(patches):
    """Its SD over the fitted subjects is close to 0, so its standardised value would be a million."""
    held_out = np.arange(N) >= 20
    target = patches[:, :, 0].mean(axis=1).astype(np.float64)
    patches[:, :, 3] += np.random.default_rng(1).normal(size=(N, L)) * 1e-5
    patches[20:23, :, 3] = 15.0
    table = PatientVectors("layers", patches, np.arange(N))
    made = table.compute_standardized_features(~held_out)
    assert np.abs(made).max() == 10
    predicted = fit_and_predict_held_out(MODELS["regression"], table, target, held_out)
    assert np.abs(predicted - target[held_out]).max() < 10 * target.std()


def test_held_out_subjects_do_not_change_the_standardisation(patches):
    fitted = np.arange(N) < 20
    before = PatientVectors("layers", patches, np.arange(N)).compute_standardized_features(fitted)
    changed = patches.copy()
    changed[25:] += 100
    after = PatientVectors("layers", changed, np.arange(N)).compute_standardized_features(fitted)
    np.testing.assert_array_equal(before[:25], after[:25])
    assert not np.allclose(before[25:], after[25:])


def test_every_fold_is_standardised_separately(patches):
    """Cross-validate a table that is standardised in each fold, and compare the result with a loop over the folds."""
    target, fold = patches[:, 2, 1].astype(float), np.arange(N) % 3
    table = join_tables(PatientVectors("moments", patches, np.arange(N)), np.arange(N, dtype=float)[:, None])
    assert isinstance(table, JoinedTable) and table.shape == (N, 2 * D + 1)
    ours = predict_out_of_fold(MODELS["regression"], table, target, fold)
    for number in range(3):
        own = fold == number
        plain = np.hstack([literal_vectors(patches, ~own), np.arange(N)[:, None]])
        np.testing.assert_allclose(
            ours[own], fit_and_predict_held_out(MODELS["regression"], plain, target, own), rtol=1e-6
        )
    assert compute_held_out_ridge_r2(table, target, fold == 0) == pytest.approx(
        compute_held_out_ridge_r2(
            np.hstack([literal_vectors(patches, fold > 0), np.arange(N)[:, None]]), target, fold == 0
        ),
        abs=1e-6,
    )


def test_vectors_are_cached_and_shared_with_a_joined_table(patches, monkeypatch):
    counted, fit = [], Standardization.fit
    monkeypatch.setattr(Standardization, "fit", lambda *given: counted.append(1) or fit(*given))
    alone = PatientVectors("moments", patches, np.arange(N))
    joined, known = join_tables(alone, np.zeros((N, 2))), np.arange(N) > 3
    for _ in range(2):
        for table in (alone[known], joined[known]):
            get_features_fitted_to_rows(table, np.arange(N - 4) < 12)
    assert len(counted) == 1
    monkeypatch.setattr(vectors, "KEPT_BYTES", 1)
    get_features_fitted_to_rows(alone, np.arange(N) < 9), get_features_fitted_to_rows(alone, np.arange(N) < 10)
    assert len(alone._kept) == 1


@pytest.mark.parametrize("kind", ["regression", "class", "survival"])
def test_wide_tables_predict_the_same_in_their_row_space(kind, monkeypatch):
    rng = np.random.default_rng(1)
    features, held = rng.normal(size=(40, 90)), np.arange(40) >= 28
    signal = features[:, 0] + 0.3 * rng.normal(size=40)
    target = {
        "regression": signal,
        "class": (signal > 0).astype(int),
        "survival": np.stack([np.exp(-signal), rng.random(40) < 0.8], axis=1),
    }[kind]
    ours = fit_and_predict_held_out(MODELS[kind], features, target, held)
    monkeypatch.setattr(
        "tools.evaluation.learn._reduce_to_row_space", lambda fitted, asked, target: (fitted, target, asked)
    )
    wanted = fit_and_predict_held_out(MODELS[kind], features, target, held)
    tolerance = 1e-9 if kind == "regression" else 2e-3  # the other models are fitted iteratively
    np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance)


def test_a_standardisation_can_be_saved_and_loaded(patches, tmp_path):
    kept = Standardization.fit("layers", patches, np.arange(10))
    kept.save(tmp_path / "s.npz", "abc")
    read, checkpoint = Standardization.load_with_checkpoint_sha256(tmp_path / "s.npz")
    assert checkpoint == "abc" and read.kind == "layers"
    np.testing.assert_array_equal(read.compute_patient_vectors(patches), kept.compute_patient_vectors(patches))
    (tmp_path / "other.npz").write_bytes(b"no")
    np.savez(
        tmp_path / "wrong.npz", kind=np.array("layers"), mean=np.zeros(3), factor=np.zeros(3), checkpoint_sha256=""
    )
    for name in ("other.npz", "wrong.npz", "none.npz"):
        with pytest.raises(UserError, match=f"--standardization .*{name} is not a (valid )?standardization.npz"):
            Standardization.load_with_checkpoint_sha256(tmp_path / name)


# ---------------------------------------------------------------- the commands


@pytest.fixture
def extracted(tmp_path, patches):
    """Write feature files as extract_feature.py --layers does, and a label: the SD of each subject's features."""
    rng = np.random.default_rng(3)
    spread = rng.uniform(0.2, 2, 40)
    h = rng.normal(size=(40, 9, 6)) * spread[:, None, None]
    sids = [f"s{row:02d}" for row in range(40)]
    folder = tmp_path / "f"
    folder.mkdir()
    np.save(folder / "pred_arr_patch_full.npy", h.astype(np.float32))
    np.save(folder / "layer_arr_patch_full.npy", np.concatenate([h, h**2], axis=2).astype(np.float32))
    np.save(folder / "sid_arr_full.npy", np.array(sids))
    table = pd.DataFrame(h.mean(axis=1), columns=[f"f{index:03d}" for index in range(6)])
    table.insert(0, "sid", sids)
    table.to_csv(folder / "patient_features.csv", index=False)
    pd.DataFrame({"sid": sids, "spread": spread}).to_csv(tmp_path / "l.csv", index=False)
    return folder


def evaluate(run_here, folder, *more) -> tuple[subprocess.CompletedProcess, dict]:
    out = folder.parent / "o"
    flags = ("--features", folder / "patient_features.csv", "--labels", folder.parent / "l.csv", "--out-dir", out)
    done = run_here("tools/evaluate.py", *flags, "--no-progress", *more)
    return done, json.loads((out / "evaluation.json").read_text()) if done.returncode == 0 else {}


def test_evaluate_uses_the_best_available_vector(extracted, run_here):
    done, found = evaluate(run_here, extracted)
    assert list(found["spread"]) == ["features", "mean"] and "note" not in done.stderr
    assert found["spread"]["features"]["r2"]["mean"] > 0.7 > 0.3 > found["spread"]["mean"]["r2"]["mean"]
    out = extracted.parent / "o"
    assert Standardization.load_with_checkpoint_sha256(out / "standardization.npz")[0].mean.shape == (9, 12)
    (extracted / "layer_arr_patch_full.npy").unlink()
    done, found = evaluate(run_here, extracted)
    assert "extract_feature.py --layers): using --patient-vector moments" in done.stderr
    assert found["spread"]["features"]["r2"]["mean"] > 0.7
    done, found = evaluate(run_here, extracted, "--patient-vector", "mean")
    assert list(found["spread"]) == ["features"] and not (out / "standardization.npz").exists()
    wanted, _ = evaluate(run_here, extracted, "--patient-vector", "layers")
    assert wanted.returncode == 2 and "extract_feature.py --layers writes it" in wanted.stderr
    elsewhere = extracted.parent / "p.npy"
    (extracted / "pred_arr_patch_full.npy").rename(elsewhere)
    done, found = evaluate(run_here, extracted)
    assert "using --patient-vector mean, which is the table itself" in done.stderr and list(found["spread"]) == [
        "features"
    ]


def test_explore_and_unusual_use_the_layer_features(extracted, run_here):
    labels = pd.read_csv(extracted.parent / "l.csv").assign(healthy=(np.arange(40) < 25).astype(int))
    labels.to_csv(extracted.parent / "l.csv", index=False)
    page = extracted.parent / "page.html"
    flags = ("--features", extracted / "patient_features.csv", "--out", page, "--no-tsne", "--no-progress")
    run_here("tools/explore.py", *flags)
    assert "24 features (layers, standardised" in page.read_text(encoding="utf-8")
    run_here("tools/explore.py", *flags, "--patient-vector", "mean")
    assert "6 features (mean, standardised" in page.read_text(encoding="utf-8")
    found = {}
    for kind in ("layers", "mean"):
        out = extracted.parent / kind
        flags = ("--features-dir", extracted, "--labels", extracted.parent / "l.csv", "--healthy", "healthy")
        run_here("tools/unusual.py", *flags, "--out-dir", out, "--no-progress", "--patient-vector", kind)
        found[kind] = pd.read_csv(out / "unusual.csv")["score"]
    assert not np.allclose(found["layers"], found["mean"])


def test_a_wide_table_of_constants_predicts_the_mean():
    target = np.arange(12.0)
    ours = fit_and_predict_held_out(MODELS["regression"], np.full((12, 40), 3.0), target, target >= 8)
    np.testing.assert_allclose(ours, np.full(4, target[:8].mean()))
