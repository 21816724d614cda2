"""The one rule: is this output ours, of these inputs, and whole?"""

import os

import pytest

from data.layout import StoreLayout
from preprocess.outputs import Output, Skip
from preprocess.scan import ScanError


@pytest.fixture
def files(tmp_path):
    """An output of two files, an input and a picture, the output newest."""
    paths = {name: tmp_path / name for name in ("first", "second", "source", "picture")}
    for age, path in zip((1000, 1000, 500, 1000), paths.values()):
        path.write_text(path.name)
        os.utime(path, (age, age))
    return paths


def output(tmp_path, files, previous, **stamps):
    targets = [files["first"], files["second"]]
    stamps = stamps or {"atlas": "a"}
    return Output(StoreLayout(tmp_path), "step", "x", previous, targets, stamps, [files["source"]], [files["picture"]])


def whole():
    return {"dice": 0.9}


def torn():
    raise ScanError("it is torn")


def kept(output, verify=whole, overwrite=False):
    """The figures of an output that stays, None of one that is made again."""
    try:
        output.keep(verify, overwrite)
    except Skip as skip:
        return skip.figures
    output.begin()
    return None


def test_ours_stays_while_everything_is_as_it_was(tmp_path, files):
    assert kept(output(tmp_path, files, {"atlas": "a"})) == {"dice": 0.9, "atlas": "a"}
    assert files["first"].exists() and not (tmp_path / "report").exists()


@pytest.mark.parametrize("change", ["stamp", "newer input", "no input", "no picture", "torn", "overwrite"])
def test_ours_is_removed_and_made_again(tmp_path, files, change):
    previous, verify = {"atlas": "a", "dice": "0.9"}, whole
    if change == "stamp":
        previous["atlas"] = "b"
    elif change == "newer input":
        os.utime(files["source"], (2000, 2000))
    elif change == "no input":
        files["source"].unlink()
    elif change == "no picture":
        files["picture"].unlink()
    elif change == "torn":
        verify = torn
    assert kept(output(tmp_path, files, previous), verify, overwrite=change == "overwrite") is None
    assert not any(files[name].exists() for name in ("first", "second", "picture"))
    assert [path.name for path in StoreLayout(tmp_path).claims("step").iterdir()] == ["x"]


def test_a_file_that_is_missing_makes_the_output_again(tmp_path, files):
    files["second"].unlink()
    assert kept(output(tmp_path, files, {"atlas": "a"})) is None and not files["first"].exists()


@pytest.mark.parametrize("change", ["", "newer input", "no input", "no picture"])
def test_the_users_own_stays_whatever_its_age(tmp_path, files, change):
    """And is never stamped, so that it does not become ours."""
    if change == "newer input":
        os.utime(files["source"], (2000, 2000))
    elif change:
        files["source" if change == "no input" else "picture"].unlink()
    assert kept(output(tmp_path, files, {})) == {"dice": 0.9}


def test_the_users_own_that_is_not_whole_costs_the_subject_and_stays(tmp_path, files):
    with pytest.raises(ScanError, match="it is torn"):
        kept(output(tmp_path, files, {}), torn)
    assert files["first"].exists()


def test_overwrite_replaces_the_users_own_only_when_the_new_one_is_there(tmp_path, files):
    assert kept(output(tmp_path, files, {}), overwrite=True) is None
    assert files["first"].exists()  # until the step has made another


def test_any_of_several_stamps_tells_ours(tmp_path, files):
    previous = {"atlas": "a"}  # a failed row keeps what it knows
    assert kept(output(tmp_path, files, previous, atlas="a", image_stamp="1")) is None


def test_a_stamp_that_the_report_does_not_keep_is_refused(tmp_path, files):
    """After a failure or a kill it would be lost, and the output pass for the user's own."""
    with pytest.raises(ValueError, match=r"stamps \['threshold'\] would not outlive a failure"):
        output(tmp_path, files, {}, threshold="-950")
