"""Test evaluate.py on labels with planted effects, and the arguments that evaluate.py refuses."""

import json

import numpy as np
import pandas as pd
import pytest

from misc.files import make_safe_name
from tools.evaluation.judge import Label, evaluate_label
from tools.evaluation.learn import MODELS, fit_and_predict_held_out, predict_out_of_fold, prepend_covariate_weights
from tools.evaluation.metrics import r2
from tools.evaluation.report import explain_results

N = 120


def test_a_linear_target_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10))
    signal = features @ rng.normal(size=10)
    noise = rng.normal(size=120) * signal.std()

    def r2(target):
        label = Label("label", "regression", target)
        return evaluate_label(label, {"features": features}, np.arange(120), 5).figures["features"]["r2"]["mean"]

    assert r2(signal) > 0.99
    assert r2(signal + noise) == pytest.approx(0.5, abs=0.15)
    assert r2(rng.normal(size=120)) < 0.1


@pytest.mark.parametrize("kind", ["regression", "grade"])
def test_covariates_are_hardly_penalised(kind):
    """A covariate that equals the label is found among 200 columns of noise."""
    rng = np.random.default_rng(1)
    covariate, noise = np.rint(3 * rng.normal(size=(100, 1))), rng.normal(size=(100, 200))
    label, table = Label("label", kind, covariate[:, 0]), {"features": np.hstack([covariate, noise])}
    metric = "r2" if kind == "regression" else "kappa"

    def found(weights):
        return evaluate_label(label, table, np.arange(100), 5, weights).figures["features"][metric]["mean"]

    weighted = found({"features": prepend_covariate_weights(1, np.ones(200))})
    assert weighted > 0.85 and weighted > found(None) + 0.2


def test_the_gain_from_a_table_is_paired():
    """Predictions from two tables share the label's noise, which narrows the interval of the difference in R2."""
    rng = np.random.default_rng(2)
    known, new, error = rng.normal(size=(3, 200))
    label = Label("label", "regression", known + 0.5 * new + error)
    tables = {"features": new[:, None], "known": known[:, None], "both": np.column_stack([new, known])}
    figures = evaluate_label(label, tables, np.arange(200), 5, base_table_names={"both": "known"}).figures
    one, both = figures["known"]["r2"], figures["both"]["r2"]
    added = both["this_minus_known"]
    assert added["mean"] == pytest.approx(both["mean"] - one["mean"]) and 0 < added["low"] < added["high"]
    assert added["high"] - added["low"] < 0.8 * (both["high"] - both["low"])
    assert "this_minus_known" not in one and both["features_minus_this"]["high"] < 0


def test_r2_does_not_depend_on_the_unit():
    rng = np.random.default_rng(3)
    truth, predicted, weights = rng.normal(size=50), rng.normal(size=50), np.ones((50, 1))
    wanted = r2(truth, predicted, weights)[0]
    for unit, start in ((1e-9, 0), (1e9, 0), (1, 1e6)):
        assert r2(truth * unit + start, predicted * unit + start, weights)[0] == pytest.approx(wanted, abs=1e-6)
    assert np.isnan(r2(np.full(50, 1e-9), predicted, weights)[0]) and np.isnan(r2(np.zeros(50), predicted, weights)[0])


def test_two_models_together_predict_a_whole_stage():
    """A stage that is computed from the mean spirometry of two models is a whole number.

    The mean of the stages that two models predict may be a fraction."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(150, 4))
    values = x[:, :2] + x[:, 2:] + 0.3 * rng.normal(size=(150, 2))
    target = np.column_stack([np.digitize(values.sum(1), (-2, 0, 2)), values])
    others = np.arange(150) % 3 == 0
    weights = np.stack([np.array([1.0, 1, 0, 0]), np.ones(4)])
    found = fit_and_predict_held_out(MODELS["stage"], x, target, others, weights)
    assert set(found) <= {0.0, 1.0, 2.0, 3.0} and np.abs(found - target[others, 0]).mean() < 0.6
    single = [fit_and_predict_held_out(MODELS["stage"], x, target, others, row) for row in weights]
    assert not np.array_equal(*single)  # the models differ, so the mean of their stages is not always a whole number


def test_row_order_is_irrelevant_and_constant_features_are_reported(run_here, tmp_path):
    rng = np.random.default_rng(5)
    sids = [f"{number:02d}" for number in range(60)]
    features = pd.DataFrame({"sid": sids, "f000": rng.normal(size=60), "f001": rng.normal(size=60)})
    columns = {"a": features["f000"] + rng.normal(size=60), "held_out": np.arange(60) % 2, "survival_years": 3.5}
    columns["survival_years"] += rng.random(60)
    pd.DataFrame({"sid": sids} | columns).to_csv(tmp_path / "l.csv", index=False)
    flags = ("--labels", "l.csv", "--no-progress", "--json", "j.json", "--features")
    found = []
    for order in (np.arange(60), rng.permutation(60)):
        features.iloc[order].to_csv(tmp_path / "f.csv", index=False)
        result = run_here("tools/evaluate.py", *flags, "f.csv", cwd=tmp_path)
        assert "column 'held_out' left out: its name suggests a split into training and test" in result.stderr
        assert "column 'survival_years' left out: its name suggests a follow-up time" in result.stderr
        found.append((tmp_path / "j.json").read_text())
    assert found[0] == found[1] and list(json.loads(found[0])) == ["a"]
    features.assign(f000=1.0, f001=2.0).to_csv(tmp_path / "f.csv", index=False)
    result = run_here("tools/evaluate.py", *flags, "f.csv", cwd=tmp_path)
    assert "f.csv has the same values for every subject" in result.stderr
    result = run_here("tools/explore.py", "--features", "f.csv", "--out", "p.html", cwd=tmp_path)
    assert result.returncode == 2 and "all subjects have the same features" in result.stderr
    kept = (tmp_path / "l.csv").read_text()
    result = run_here("tools/evaluate.py", *flags[:-2], "l.csv", "--features", "f.csv", cwd=tmp_path)
    assert result.returncode == 2 and "--json l.csv already exists" in result.stderr
    assert (tmp_path / "l.csv").read_text() == kept
    kind = ("--columns", "a", "--kind", "held_out=class")
    result = run_here("tools/evaluate.py", *flags, "f.csv", *kind, cwd=tmp_path)
    assert result.returncode == 2 and "--kind held_out has no effect, because" in result.stderr


def test_a_first_fold_may_lack_the_highest_class():
    target = np.array([0, 1] * 12 + [2] * 4, dtype=float)
    fold = np.where(target == 2, 0, np.arange(28) % 2)  # class 2 is only in fold 0
    predicted = predict_out_of_fold(MODELS["class"], np.eye(28), target, fold)
    assert predicted.shape == (28, 3) and np.allclose(predicted.sum(axis=1), 1)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Write features that determine every label by their first column, and a table of uninformative features."""
    folder, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    sids = [f"{index:03d}" for index in range(N)]
    x = rng.normal(size=(N, 6))
    score = x[:, 0]
    death, end = rng.exponential(10 / np.exp(1.5 * score)), rng.uniform(5, 30, N)
    fev1, ratio = 10 ** (1.8 - 0.15 * score), 10 ** (-0.2 - 0.08 * score)
    labels = pd.DataFrame(
        {
            "sid": sids,
            "number": 3 * score + 0.3 * rng.normal(size=N),
            "noise": rng.normal(size=N),
            "grade": np.clip(np.rint(2 + 1.2 * score), 0, 4).astype(int),
            "sick": (score + 0.3 * rng.normal(size=N) > 0).astype(int),
            "FEV1pp": fev1,
            "FEV1_FVC": ratio,
            "GOLD": np.where(ratio >= 0.7, 0, 1 + np.searchsorted([-80, -50, -30], -fev1)),
            "years": np.minimum(death, end),
            "died": (death <= end).astype(int),
            "age": 60 + 5 * rng.normal(size=N),
            "patient": [f"p{index // 2}" for index in range(N)],
        }
    )
    labels.to_csv(folder / "l.csv", index=False)
    for name, values in (("f.csv", x), ("other.csv", rng.normal(size=(N, 6)))):
        table = pd.DataFrame(values, columns=[f"f{i:03d}" for i in range(6)])
        table.insert(0, "sid", sids)
        table.to_csv(folder / name, index=False)
    return folder


def test_every_kind_of_label_is_recognised_and_predicted(study, run, tmp_path):
    columns = ("--columns", "number", "noise", "grade", "sick", "GOLD")
    survival = ("--time-column", "years", "--event-column", "died")
    flags = ("--features", "f.csv", "--compare", "null=other.csv", "--labels", "l.csv", "--no-progress")
    shown = run("tools/evaluate.py", *flags, *columns, *survival, "--out-dir", tmp_path / "out", cwd=study).stdout
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(found) == ["number", "noise", "grade", "sick", "GOLD", "GOLD_from_spirometry", "died"]
    for column, metric, least in (
        ("number", "r2", 0.95),
        ("grade", "kappa", 0.85),
        ("grade", "within_one", 0.98),
        ("sick", "auroc", 0.9),
        ("GOLD", "within_one", 0.8),
        ("GOLD_from_spirometry", "exact", 0.7),
        ("GOLD_from_spirometry", "kappa", 0.85),
        ("died", "c_index", 0.72),
    ):
        ours, null = found[column]["features"][metric], found[column]["null"][metric]
        assert ours["low"] <= ours["mean"] <= ours["high"] and ours["mean"] > least, (column, metric, ours)
        assert ours["permuted"] < ours["mean"] - 0.05 and null["mean"] < ours["mean"] - 0.05
    assert found["number"]["null"]["r2"]["features_minus_this"]["low"] > 0
    assert found["noise"]["features"]["r2"]["mean"] < 0.05 and abs(found["sick"]["null"]["auroc"]["mean"] - 0.5) < 0.2
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "R2 below 0 (noise)" in shown and all(line in text for line in shown.splitlines() if line.startswith("|"))
    assert f"| number | r2 | null | {found['number']['null']['r2']['mean']:.2f} (" in text
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"{column}.png" for column in found}


def test_covariates_are_added_to_every_model_and_tested_alone(study, run, tmp_path):
    flags = ("--features", "other.csv", "--labels", "l.csv", "--columns", "number", "--no-progress")
    run("tools/evaluate.py", *flags, "--covariates", "FEV1pp", "age", "--json", tmp_path / "j.json", cwd=study)
    tables = json.loads((tmp_path / "j.json").read_text())["number"]
    assert set(tables) == {"features", "covariates"}
    assert tables["covariates"]["r2"]["mean"] > 0.8 and tables["features"]["r2"]["mean"] > 0.8


def test_a_patients_scans_stay_in_one_fold(run, tmp_path):
    """Features that only identify the patient predict any label, unless all scans of a patient are in the same fold."""
    rng, folder = np.random.default_rng(1), tmp_path
    patients = np.repeat(np.arange(40), 3)
    sids = [f"s{patient:02d}_{scan}" for patient, scan in zip(patients, [1, 2, 3] * 40)]
    who = rng.normal(size=(40, 60))[patients] + 0.1 * rng.normal(size=(120, 60))
    table = pd.DataFrame(who, columns=[f"f{i:03d}" for i in range(60)])
    table.insert(0, "sid", sids)
    table.to_csv(folder / "f.csv", index=False)
    label = rng.normal(size=40)[patients]
    pd.DataFrame({"sid": sids, "label": label, "patient": patients}).to_csv(folder / "l.csv", index=False)
    flags = ("--features", "f.csv", "--labels", "l.csv", "--columns", "label", "--json", "j.json", "--no-progress")
    loose = run("tools/evaluate.py", *flags, cwd=folder)
    assert "s00_1, s00_2, s00_3 look like scans of one patient" in loose.stderr
    assert json.loads((folder / "j.json").read_text())["label"]["features"]["r2"]["mean"] > 0.7
    kept = run("tools/evaluate.py", *flags, "--group-column", "patient", cwd=folder)
    assert "look like" not in kept.stderr
    assert json.loads((folder / "j.json").read_text())["label"]["features"]["r2"]["mean"] < 0.15


def test_held_out_subjects_are_evaluated(tmp_path, run):
    """If the relation between feature and label is opposite in the held-out subjects, their R² is below -1."""
    rng = np.random.default_rng(0)
    sids = [f"s{index:02d}" for index in range(40)]
    values = rng.normal(size=40)
    (tmp_path / "f.csv").write_text("sid,f000\n" + "".join(f"{sid},{value}\n" for sid, value in zip(sids, values)))
    sign = [1 if index % 4 else -1 for index in range(40)]
    rows = [f"{sid},{value},{value * s},{int(s < 0)}\n" for sid, value, s in zip(sids, values, sign)]
    (tmp_path / "l.csv").write_text("sid,same,turned,test\n" + "".join(rows))
    flags = ("--features", "f.csv", "--labels", "l.csv", "--held-out", "test", "--json", "j.json")
    run("tools/evaluate.py", *flags, cwd=tmp_path)
    found = json.loads((tmp_path / "j.json").read_text())
    assert set(found) == {"same", "turned"}
    assert found["same"]["features"]["r2"]["mean"] > 0.99 and found["turned"]["features"]["r2"]["mean"] < -1


def test_missing_codes_and_left_out_subjects_are_reported(tmp_path, run):
    rng = np.random.default_rng(0)
    sids, values = [f"s{index:02d}" for index in range(40)], rng.uniform(1, 2, 40)
    for name, some in (("f.csv", sids), ("g.csv", sids[:30])):
        (tmp_path / name).write_text("sid,f000\n" + "".join(f"{sid},{v}\n" for sid, v in zip(some, values)))
    rows = "".join(f"{sid},{v if n > 2 else -999},{n % 2}\n" for n, (sid, v) in enumerate(zip(sids, values)))
    (tmp_path / "l.csv").write_text("sid,FEV1,sick\n" + rows)
    flags = ("--features", "f.csv", "--compare", "g=g.csv", "--labels", "l.csv")
    said = run("tools/evaluate.py", *flags, cwd=tmp_path).stderr
    assert "30 of 40 subjects with features and labels are in every table" in said
    assert "column 'FEV1' has -999 for 3 subjects; if that means missing" in said
    assert "FutureWarning" not in said  # scikit-learn's warnings for the class label are hidden


def write_features(path, sids, value="0.5"):
    path.write_text("sid,f000\n" + "".join(f"{sid},{value}\n" for sid in sids))


def write_labels(path, sids):
    """Write labels: `age` is known for all subjects, `few` for three; `same` is constant, `far` has an infinite cell.

    The columns not described here are for tests of classes and survival.
    """
    count = len(sids)
    table = pd.DataFrame({"sid": sids, "age": range(count), "same": 7, "far": range(count), "one": "p"})
    table["few"] = ["0", "1", "2"] + [""] * (count - 3)
    table["far"] = ["inf" if index == 2 else index for index in range(count)]
    table["rare"] = [1, *[0] * (count - 1)]
    table["time"], table["before"] = range(1, count + 1), range(-1, count - 1)
    table["event"], table["none"], table["two"] = [0, 1] * (count // 2), 0, 2
    table.to_csv(path, index=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "others.csv"), "others.csv lacks subject 's00'"),
        (("--compare", "zeros=zeros.csv"), "zeros.csv lacks subject 's00'"),
        (("--compare", "nan.csv"), "nan.csv has nan in column f000 of sid s01"),
        (("--compare", "text.csv"), "text.csv has 'high' in column f000 of sid s01"),
        (("--compare", "a=f.csv", "--compare", "a=f.csv"), "--compare a=f.csv: another table is already called a"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json: its folder does not exist"),
        (("--columns", "few"), "column 'few' cannot be predicted: 3 subjects have a value"),
        (("--columns", "same"), "column 'same' cannot be predicted: it is 7 for every subject"),
        (("--columns", "rare"), "1 subjects have the value 1; 5 are needed"),
        (("--columns", "far"), "no numeric column 'far'"),
        (("--columns", "age", "--kind", "age=log"), "--kind age=log: the kind must be one of regression, log10"),
        (("--columns", "age", "--kind", "age=log10"), "it contains 0, and log10 needs numbers above 0"),
        (("--columns", "age", "--kind", "age=class"), "it has 12 different values, too many for classes"),
        (("--kind", "agee=log10"), "--kind agee: l.csv has no numeric column with this name; did you mean age?"),
        (("--columns", "age", "--covariates", "age"), "--covariates age is also a label to predict"),
        (("--compare", "own=leak.csv"), "leak.csv has column 'age', which is also in l.csv"),
        (("--columns", "age", "--folds", "100"), "100 folds need 200; lower --folds or label more"),
        (("--held-out", "far"), "no numeric column 'far' for --held-out"),
        (("--held-out", "age"), "--held-out age must be 0 or 1 for every subject"),
        (("--group-column", "who"), "no column 'who' for --group-column"),
        (("--group-column", "one"), "column 'one' is 'p' for every scan"),
        (("--covariates", "weight"), "no numeric column 'weight'"),
        (("--time-column", "time"), "--time-column and --event-column must be given together"),
        (
            ("--time-column", "before", "--event-column", "event"),
            "the times contain -1, but follow-up must be 0 or more",
        ),
        (("--time-column", "time", "--event-column", "two"), "the events contain 2; write 1 if it was observed"),
        (("--time-column", "time", "--event-column", "none"), "no event was observed, every subject is censored"),
        (("--time-column", "time", "--event-column", "rare"), "1 events were observed, fewer than the 5 folds"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, run_here, flags, message):
    sids = [f"s{index:02d}" for index in range(12)]
    write_features(tmp_path / "f.csv", sids)
    write_features(tmp_path / "others.csv", [f"t{index:02d}" for index in range(12)])
    write_features(tmp_path / "zeros.csv", [f"s{index}" for index in range(100, 112)])
    (tmp_path / "nan.csv").write_text("sid,f000\ns00,1\ns01,nan\n")
    (tmp_path / "leak.csv").write_text("sid,age\n" + "".join(f"{sid},{n}\n" for n, sid in enumerate(sids)))
    (tmp_path / "text.csv").write_text("sid,f000\ns00,1\ns01,high\n")
    write_labels(tmp_path / "l.csv", sids)
    made = ("--out-dir", "out")
    result = run_here("tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", *made, *flags, cwd=tmp_path)
    assert result.returncode == 2 and not result.stdout and not (tmp_path / "out").exists()
    *notes, error = result.stderr.splitlines()
    assert message in error and all(" left out" in note for note in notes), result.stderr


def test_sids_without_leading_zeros_are_reported(tmp_path, run_here):
    write_features(tmp_path / "f.csv", [f"{index:03d}" for index in range(1, 13)])
    write_labels(tmp_path / "l.csv", [str(index) for index in range(1, 13)])
    result = run_here("tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", cwd=tmp_path)
    assert result.returncode == 2 and "lacks subject '001'; it has '1'" in result.stderr


def test_unusable_columns_are_left_out_with_a_note(tmp_path, run):
    sids = [f"s{index:02d}" for index in range(12)]
    write_features(tmp_path / "f.csv", sids)
    write_labels(tmp_path / "l.csv", sids)
    result = run("tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", cwd=tmp_path)
    assert {line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("| ")} == {
        *("label", "---", "age", "time", "before", "event")
    }
    for words in ("'few' left out: 3 subjects have a value", "'same' left out: it is 7 for every", "'inf' of sid s02"):
        assert words in result.stderr


def test_subjects_without_a_covariate_are_left_out_with_a_note(study, run, tmp_path):
    labels = pd.read_csv(study / "l.csv", dtype=str)
    labels.loc[3, "age"] = ""
    labels.to_csv(tmp_path / "l.csv", index=False)
    flags = ("--features", study / "f.csv", "--labels", "l.csv", "--columns", "number", "--covariates", "age")
    result = run("tools/evaluate.py", *flags, cwd=tmp_path)
    assert "1 of 120 subjects lack a covariate and are left out, such as '003'" in result.stderr
    assert "| number | 119 |" in result.stdout


def held_out_tables(folder, count=60):
    """Write a table with two scans per patient.

    `died` and `cls` vary only where `side` is 1, `sex` is text, and `odd/name` cannot be a file name.
    """
    rng = np.random.default_rng(4)
    sids = [f"{number:04d}" for number in range(count)]
    table = pd.DataFrame({"sid": sids, "patient": np.arange(count) // 2, "y": rng.normal(size=count)})
    table["held"] = np.arange(count) % 2
    table["side"] = (np.arange(count) >= count // 2).astype(int)
    table["odd/name"], table["sex"], table["years"] = table["y"], "M", rng.uniform(1, 5, count)
    table["died"] = table["side"].where(table.index % 3 > 0, 0)  # only on side 1
    table["cls"] = table["side"] * (table.index % 2)
    table["one"] = [1.0] * (count // 2) + [np.nan] * (count // 2)
    table["fitted"] = table["y"].where(table["side"] == 0)
    table["GOLD"], table["FEV1pp"], table["FEV1_FVC"] = table.index % 4, 80.0 - table.index % 4, 0.7
    table.loc[5:, "FEV1pp"] = np.nan
    table.to_csv(folder / "l.csv", index=False)
    features = pd.DataFrame(rng.normal(size=(count, 3)), columns=["f000", "f001", "f002"])
    features.insert(0, "sid", sids)
    features.to_csv(folder / "f.csv", index=False)
    return features, table


SURVIVAL = ("--time-column", "years", "--event-column", "died")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--columns", "y", "--held-out", "held", "--group-column", "patient"),
            "are scans of one patient, who would be in both the training part and the held-out part",
        ),
        (("--held-out", "side", *SURVIVAL), "in the training part, no event was observed"),
        (
            ("--held-out", "side", "--columns", "cls"),
            "in the training part, it is 0 for every subject",
        ),
        (
            ("--held-out", "side", "--columns", "fitted"),
            "in the held-out part, 0 patients have a value; at least 5",
        ),
        (("--columns", "GOLD", "--covariates", "FEV1pp"), "it is derived from --covariates FEV1pp"),
        (("--columns", "y", "--group-column", "sid"), "--group-column sid names scans, not patients"),
        (
            ("--columns", "y", "--covariates", "held", "--compare", "covariates=f.csv"),
            "another table is already called covariates",
        ),
        (("--columns", "y", "--compare", "=f.csv"), "the name before = is empty"),
        (("--columns", "sex"), "no numeric column 'sex': sid 0000 has 'M'; write plain numbers"),
        (("--columns", "died", *SURVIVAL), "--columns died is already predicted as --event-column"),
        (("--columns", "y", "--held-out", "helf"), "no numeric column 'helf' for --held-out; did you mean held?"),
        (("--columns", "y", "--json", "."), "--json . is a folder"),
    ],
)
def test_unusable_columns_and_splits_are_refused(tmp_path, run_here, flags, message):
    held_out_tables(tmp_path)
    given = ("--features", "f.csv", "--labels", "l.csv", "--out-dir", "out")
    result = run_here("tools/evaluate.py", *given, *flags, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_pictures_have_safe_names_and_old_ones_are_removed(tmp_path, run_here):
    held_out_tables(tmp_path)
    given = ("--features", "f.csv", "--labels", "l.csv", "--out-dir", "out")
    first = run_here("tools/evaluate.py", *given, "--columns", "odd/name", "GOLD", cwd=tmp_path)
    assert first.returncode == 0
    assert "GOLD is not predicted through spirometry: in the subjects with FEV1pp, FEV1_FVC" in first.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"{make_safe_name('odd/name')}.png", "GOLD.png"}
    assert run_here("tools/evaluate.py", *given, "--columns", "y", cwd=tmp_path).returncode == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"y.png"}


def test_subjects_missing_from_one_table_are_reported(tmp_path, run_here):
    _, labels = held_out_tables(tmp_path)
    labels["sid"] = [sid if number % 2 else f"{number}.0" for number, sid in enumerate(labels["sid"])]
    labels.to_csv(tmp_path / "l.csv", index=False)
    said = run_here(
        "tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", "--columns", "y", cwd=tmp_path
    ).stderr
    assert "30 of 60 subjects have no row in l.csv, such as '0000'; it has '0.0' instead of '0000'" in said


def test_row_numbers_are_not_features(tmp_path, run_here):
    """pandas saves row numbers as an unnamed column, and calls it 'Unnamed: 0' if the file is read and saved again."""
    features, _ = held_out_tables(tmp_path)
    flags = ("--features", "f.csv", "--labels", "l.csv", "--columns", "y")
    without = run_here("tools/evaluate.py", *flags, cwd=tmp_path).stdout
    features.to_csv(tmp_path / "f.csv")
    assert run_here("tools/evaluate.py", *flags, cwd=tmp_path).stdout == without != ""
    pd.read_csv(tmp_path / "f.csv", dtype=str).to_csv(tmp_path / "f.csv", index=False)
    result = run_here("tools/evaluate.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and "column 'Unnamed: 0' with saved row numbers" in result.stderr


def test_metrics_at_chance_are_explained():
    def figures(metric, low, mean, high):
        return {"features": {metric: {"low": low, "mean": mean, "high": high}}}

    found = {
        "a": figures("auroc", 0.4, 0.5, 0.6),
        "b": figures("auroc", 0.6, 0.7, 0.8),
        "c": figures("kappa", -0.1, 0.1, 0.2),
        "d": figures("r2", -0.2, -0.1, 0.1),
        "e": figures("c_index", 0.2, 0.3, 0.4),
        "f": figures("auroc", float("nan"), float("nan"), float("nan")),
    }
    below, chance = explain_results(found)
    assert "R2 below 0 (d)" in below and "Not distinguishable from chance with these subjects (a, c):" in chance


def test_the_gain_over_a_histogram_is_explained():
    def figures(low, mean, high):
        plain = {"r2": {"low": 0.1, "mean": 0.2, "high": 0.3}}
        added = {"this_minus_histogram": {"low": low, "mean": mean, "high": high}}
        return {"features": plain, "features+histogram": {"r2": plain["r2"] | added}}

    found = {"a": figures(0.1, 0.2, 0.3), "b": figures(-0.1, 0.1, 0.2), "c": figures(-0.3, -0.2, -0.1)}
    (line,) = explain_results(found)
    assert "improves 2 of 3 label(s) by at least 0.005; the interval is above 0 for 1 (a); it is worse for c." in line
    found["d"] = figures(0.0, 1e-15, 0.1)  # equal up to rounding
    found["e"] = figures(float("nan"), float("nan"), float("nan"))
    useless = figures(0.1, 0.2, 0.3)
    useless["features+histogram"]["r2"]["mean"] = -1.1  # the gain is 0.2, so the histogram alone has an r2 of -1.3
    (line,) = explain_results(found | {"f": useless})
    assert "improves 2 of 4 label(s)" in line and "Even together they do not predict f." in line
    assert explain_results({"a": {"features": found["a"]["features"]}}) == []


def test_equal_risks_give_a_picture_without_a_test(tmp_path, run_here):
    features, labels = held_out_tables(tmp_path)
    labels["died"] = labels.index % 2
    labels.to_csv(tmp_path / "l.csv", index=False)
    features[["f000", "f001", "f002"]] = 1.0
    features.to_csv(tmp_path / "f.csv", index=False)
    flags = ("--features", "f.csv", "--labels", "l.csv", "--held-out", "side", *SURVIVAL, "--out-dir", "out")
    result = run_here("tools/evaluate.py", *flags, cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "out" / "died.png").is_file(), result.stderr
