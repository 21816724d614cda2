"""Test label tables as they occur in practice: words, codes for missing values, and dates."""

import json

import numpy as np
import pandas as pd
import pytest

from data.labels import read_numbers_and_words
from tools.evaluation.kinds import describe_date_format_of_times, find_missing_code

N = 90
SIDS = [f"s{row:03d}" for row in range(N)]


@pytest.fixture
def study(tmp_path):
    """Write features with one informative column; return the folder and a table of labels in words."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=N)
    features = rng.normal(size=(N, 6))
    features[:, 0] = signal + 0.3 * rng.normal(size=N)
    table = pd.DataFrame(features, columns=[f"f{index}" for index in range(6)])
    table.insert(0, "sid", SIDS)
    table.to_csv(tmp_path / "f.csv", index=False)
    third = np.digitize(signal, np.quantile(signal, [1 / 3, 2 / 3]))
    labels = pd.DataFrame(
        {
            "sid": SIDS,
            "sex": np.where(signal > 0, "M", "F"),
            "smoker": np.where(signal > 0.5, "Yes", "no"),
            "Histology": np.array(["adeno", "squamous", "other"])[third],
            "Stage": np.array(["II", "I", "IIIa"])[third],
            "name": [f"person {row}" for row in range(N)],
            "FEV1pp": np.round(70 + 10 * signal, 1),
            "years": np.round(np.exp(-signal) + 0.1, 3),
            "died": np.where(rng.random(N) < 0.8, "yes", "no"),
        }
    )
    return tmp_path, labels


def evaluate(run_here, study, labels, *flags):
    folder, _ = study
    labels.to_csv(folder / "l.csv", index=False)
    given = ("--features", folder / "f.csv", "--labels", folder / "l.csv", "--json", folder / "e.json", "--no-progress")
    (folder / "e.json").unlink(missing_ok=True)
    done = run_here("tools/evaluate.py", *given, "--patient-vector", "mean", *flags)
    found = json.loads((folder / "e.json").read_text()) if (folder / "e.json").is_file() else None
    return done, found


def test_words_are_classes_and_ordered_words_are_grades(study, run_here):
    _, labels = study
    asked = ("--columns", "sex", "smoker", "Histology", "Stage", "--order", "Stage=II,I,IIIa")
    done, found = evaluate(run_here, study, labels, *asked)
    assert done.returncode == 0, done.stderr
    assert found["sex"]["features"]["auroc"]["mean"] > 0.9 and found["smoker"]["features"]["auroc"]["mean"] > 0.9
    assert "auroc" in found["Histology"]["features"] and found["Histology"]["features"]["auroc"]["mean"] > 0.75
    # Stage is a grade, because --order ranks the words of this column; kappa is a metric for grades.
    assert found["Stage"]["features"]["kappa"]["mean"] > 0.6
    assert "column 'sex': 0 is F, 1 is M" in done.stderr and "column 'smoker': 0 is no, 1 is Yes" in done.stderr
    assert "column 'Stage': 0 is II, 1 is I, 2 is IIIa" in done.stderr
    refused, _ = evaluate(run_here, study, labels, "--columns", "name")
    assert refused.returncode == 2 and "no numeric column 'name'" in refused.stderr


def test_words_as_covariates_and_events(study, run_here):
    _, labels = study
    survival = ("--time-column", "years", "--event-column", "died")
    done, found = evaluate(run_here, study, labels, *survival, "--covariates", "sex")
    assert done.returncode == 0 and found["died"]["features"]["c_index"]["mean"] > 0.7
    other = labels.assign(died=labels["died"].map({"yes": "dead", "no": "alive?"}))
    refused, _ = evaluate(run_here, study, other, *survival)
    assert (
        refused.returncode == 2
        and "has the words alive?, dead; write 1 or yes if the event was observed" in refused.stderr
    )


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("Stage=I,II", "--order Stage: .* also has 'IIIa'; list every word"),
        ("stage=I,II,IIIa", "--order stage: .* does not have this column; did you mean Stage"),
        ("Stage=I", "--order: Stage=I: give two or more different words"),
        ("Stage=I,I,II", "give two or more different words"),
    ],
)
def test_bad_orders_are_refused(study, run_here, order, message):
    _, labels = study
    refused, _ = evaluate(run_here, study, labels, "--columns", "Stage", "--order", order)
    assert refused.returncode == 2
    import re

    assert re.search(message, refused.stderr)


def test_events_in_other_languages_and_other_words(study, run_here):
    """The word "yes" in several languages is read as 1.

    For words other than yes and no, --order determines which word is read as 1.
    """
    _, labels = study
    survival = ("--time-column", "years", "--event-column", "died")
    wanted = evaluate(run_here, study, labels, *survival)[1]["died"]["features"]["c_index"]["mean"]
    for no, yes, more in (("Nein", "Ja", ()), ("lebt", "gestorben", ("--order", "died=lebt,gestorben"))):
        other = labels.assign(died=labels["died"].map({"yes": yes, "no": no}))
        done, found = evaluate(run_here, study, other, *survival, *more)
        assert done.returncode == 0 and f"column 'died': 0 is {no}, 1 is {yes}" in done.stderr
        assert found["died"]["features"]["c_index"]["mean"] == wanted


def test_none_is_missing_unless_an_order_lists_it(tmp_path):
    rows = "".join(f"{sid},{('None', 'mild', 'severe')[row % 3]}\n" for row, sid in enumerate(SIDS))
    (tmp_path / "l.csv").write_text("sid,grade\n" + rows)
    told = []
    values, _, words = read_numbers_and_words(tmp_path / "l.csv", SIDS, told.append)
    assert words == {"grade": ["mild", "severe"]} and np.isnan(values).sum() == N / 3
    assert "'none' counts as missing for 30 subjects (use --order grade=... to make it a grade)" in told[0]
    values, _, words = read_numbers_and_words(tmp_path / "l.csv", SIDS, order={"grade": ["None", "mild", "severe"]})
    assert (values[:, 0] == np.arange(N) % 3).all()


def test_numbers_mixed_with_words_are_refused(tmp_path):
    rows = "".join(f"{sid},{'>100' if row == 3 else row}\n" for row, sid in enumerate(SIDS))
    (tmp_path / "l.csv").write_text("sid,age\n" + rows + "x,1\n")
    with pytest.raises(Exception, match="no numeric column"):
        read_numbers_and_words(tmp_path / "l.csv", SIDS)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([60, 70, 80, 999, 999], 999),
        ([0, 1, 0, 1, 9, 9], 9),
        ([0, 1, 2, 3, 9, 9], 9),
        ([1.5, 2.5, 3.5, 88, 88], 88),
        ([60, 70, 80, -999], -999),
        ([60, 70, 80, 999], None),  # a single 999 counts as an outlier, not as a code for missing values
        ([80, 85, 90, 99, 99], None),  # 99 may be a real value, such as an age
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], None),
        ([0, 0, 9, 9], None),
    ],
)
def test_codes_for_missing(values, code):
    assert find_missing_code(np.array(values, dtype=float)) == code


def test_missing_codes_are_reported_and_removed(study, run_here):
    _, labels = study
    coded = labels.assign(FEV1pp=labels["FEV1pp"].where(labels.index % 15 > 0, 999))
    done, worse = evaluate(run_here, study, coded, "--columns", "FEV1pp")
    assert "has 999 for 6 subjects; if that means missing, give --missing 999" in done.stderr
    done, found = evaluate(run_here, study, coded, "--columns", "FEV1pp", "--missing", 999)
    assert "999 for" not in done.stderr and found["FEV1pp"]["features"]["r2"]["mean"] > 0.6
    assert worse["FEV1pp"]["features"]["r2"]["mean"] < 0.2
    binary = labels.assign(smoker=np.where(labels.index % 15 == 0, 9, (labels["smoker"] == "Yes").astype(int)))
    refused, _ = evaluate(run_here, study, binary, "--columns", "smoker")
    assert (
        refused.returncode == 2
        and "has 9 in addition to 0 and 1; give --missing 9 if that means missing" in refused.stderr
    )
    _, found = evaluate(run_here, study, binary, "--columns", "smoker", "--missing", 9)
    assert "auroc" in found["smoker"]["features"]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([20130529, 20141231, 20200101], "dates (year, month, day)"),
        ([41423, 43000, 44100], "Excel dates"),
        ([365, 1200, 2013], ""),
        ([2.5, 41423.5], ""),
        ([20131345, 20140101], ""),
        ([], ""),
    ],
)
def test_dates_are_recognised(values, what):
    assert (
        what in describe_date_format_of_times(np.array(values, dtype=np.float32))
        if what
        else not describe_date_format_of_times(np.array(values, dtype=float))
    )


def test_dates_are_refused_as_follow_up_time(study, run_here):
    _, labels = study
    days = pd.to_datetime("2008-03-01") + pd.to_timedelta(np.arange(N) * 17, unit="D")
    survival = ("--time-column", "years", "--event-column", "died")
    for years in (days.strftime("%Y%m%d"), (days - pd.Timestamp("1899-12-30")).days):
        refused, _ = evaluate(run_here, study, labels.assign(years=years), *survival)
        assert refused.returncode == 2 and "look like" in refused.stderr
