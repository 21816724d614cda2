"""Cross-validated R² on data whose answer is known."""

import numpy as np
import pytest

from tools.evaluate import cross_validated_r2


def test_a_linear_target_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10))
    signal = features @ rng.normal(size=10)
    noise = rng.normal(size=120) * signal.std()
    assert cross_validated_r2(features, signal)[0] > 0.99
    mean, spread = cross_validated_r2(features, signal + noise)
    assert mean == pytest.approx(0.5, abs=0.15) and spread < 0.1
    assert cross_validated_r2(features, rng.normal(size=120))[0] < 0.1


def test_command(tmp_path, run):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(40, 3))
    lines = ["sid,f000,f001,f002", *(f"{i:03d}," + ",".join(map(str, row)) for i, row in enumerate(features))]
    (tmp_path / "f.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "l.csv").write_text(
        "sid,good\n" + "".join(f"{i:03d},{row[0] * 3 - row[2]}\n" for i, row in enumerate(features))
    )
    result = run("tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", cwd=tmp_path)
    name, subjects, mean, _, _ = result.stdout.splitlines()[1].split()
    assert (name, subjects) == ("good", "40") and float(mean) > 0.98
    wrong = run(
        "tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", "--columns", "bad", cwd=tmp_path, check=False
    )
    assert wrong.returncode == 2 and "no numeric column 'bad'" in wrong.stderr


def write_features(path, sids, value="0.5"):
    path.write_text("sid,f000\n" + "".join(f"{sid},{value}\n" for sid in sids))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "others.csv"), "f.csv and others.csv have no sid in common"),
        (("--compare", "nan.csv"), "nan.csv has nan in column f000 of sid s01"),
        (("--compare", "text.csv"), "text.csv has a cell that is no number"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json: its folder does not exist"),
        (("--columns", "few"), "column 'few' is known for 3 subjects"),
        (("--columns", "same"), "column 'same' is 7 for every subject"),
        (("--columns", "far"), "no numeric column 'far'"),
        (("--held-out", "far"), "no numeric column 'far' for --held-out"),
        (("--held-out", "age"), "--held-out age must be 0 or 1 for every subject"),
    ],
)
def test_refusals(tmp_path, run, flags, message):
    sids = [f"s{index:02d}" for index in range(12)]
    write_features(tmp_path / "f.csv", sids)
    write_features(tmp_path / "others.csv", [f"t{index:02d}" for index in range(12)])
    (tmp_path / "nan.csv").write_text("sid,f000\ns00,1\ns01,nan\n")
    (tmp_path / "text.csv").write_text("sid,f000\ns00,1\ns01,high\n")
    write_labels(tmp_path / "l.csv", sids)
    result = run("tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and not result.stdout
    *notes, error = result.stderr.splitlines()
    assert message in error and all("column 'far' left out" in note for note in notes)


def write_labels(path, sids):
    """age is known for all, few for three; same never varies, far has an infinite cell."""
    rows = [f"{sid},{n},{n if n < 3 else ''},7,{'inf' if n == 2 else n}\n" for n, sid in enumerate(sids)]
    path.write_text("sid,age,few,same,far\n" + "".join(rows))


def test_without_columns_what_cannot_be_predicted_is_left_out_with_a_note(tmp_path, run):
    sids = [f"s{index:02d}" for index in range(12)]
    write_features(tmp_path / "f.csv", sids)
    write_labels(tmp_path / "l.csv", sids)
    result = run("tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", cwd=tmp_path)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["column", "age"]
    for words in ("'few' left out, it is known for 3", "'same' left out, it is 7 for every", "'inf' of sid s02"):
        assert words in result.stderr


def test_held_out_subjects_are_reported_on(tmp_path, run):
    """What the others show is of no use where the held-out subjects are otherwise."""
    rng = np.random.default_rng(0)
    sids = [f"s{index:02d}" for index in range(40)]
    values = rng.normal(size=40)
    (tmp_path / "f.csv").write_text("sid,f000\n" + "".join(f"{sid},{value}\n" for sid, value in zip(sids, values)))
    sign = [1 if index % 4 else -1 for index in range(40)]
    rows = [f"{sid},{value},{value * s},{int(s < 0)}\n" for sid, value, s in zip(sids, values, sign)]
    (tmp_path / "l.csv").write_text("sid,same,turned,test\n" + "".join(rows))
    shown = run(
        "tools/evaluate.py", "--features", "f.csv", "--labels", "l.csv", "--held-out", "test", cwd=tmp_path
    ).stdout
    found = {line.split()[0]: float(line.split()[2]) for line in shown.splitlines()[1:]}
    assert found["same"] > 0.99 and found["turned"] < -1 and set(found) == {"same", "turned"}
