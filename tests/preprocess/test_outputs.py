"""Test that a stage keeps a user's own files, and keeps its own outputs if they are complete and up to date."""

import os

import pytest

from data.layout import StoreLayout
from preprocess.outputs import Output, Skip
from preprocess.scan import ScanError


@pytest.fixture
def files(tmp_path):
    """Make the two files of an output, its input file and its picture. The input file is older than the output."""
    paths = {name: tmp_path / name for name in ("first", "second", "source", "picture")}
    for age, path in zip((1000, 1000, 500, 1000), paths.values()):
        path.write_text(path.name)
        os.utime(path, (age, age))
    return paths


def make_output(tmp_path, files, previous, **stamps):
    targets = [files["first"], files["second"]]
    stamps = stamps or {"atlas": "a"}
    return Output(StoreLayout(tmp_path), "step", "x", previous, targets, stamps, [files["source"]], [files["picture"]])


def verify_whole():
    return {"dice": 0.9}


def verify_torn():
    raise ScanError("it is torn")


def keep_output(output, verify=verify_whole, overwrite=False):
    """Return the recorded values of an output that is kept, or None if the output must be made again."""
    try:
        output.skip_if_valid(verify, overwrite)
    except Skip as skip:
        return skip.figures
    output.claim_and_remove_old_files()
    return None


def test_an_unchanged_output_of_ours_is_kept(tmp_path, files):
    assert keep_output(make_output(tmp_path, files, {"atlas": "a"})) == {"dice": 0.9, "atlas": "a"}
    assert files["first"].exists() and not (tmp_path / "report").exists()


@pytest.mark.parametrize("change", ["stamp", "newer input", "no input", "no picture", "torn", "overwrite"])
def test_ours_is_removed_and_made_again(tmp_path, files, change):
    previous, verify = {"atlas": "a", "dice": "0.9"}, verify_whole
    if change == "stamp":
        previous["atlas"] = "b"
    elif change == "newer input":
        os.utime(files["source"], (2000, 2000))
    elif change == "no input":
        files["source"].unlink()
    elif change == "no picture":
        files["picture"].unlink()
    elif change == "torn":
        verify = verify_torn
    assert keep_output(make_output(tmp_path, files, previous), verify, overwrite=change == "overwrite") is None
    assert not any(files[name].exists() for name in ("first", "second", "picture"))
    assert [path.name for path in StoreLayout(tmp_path).subjects_in_progress_dir("step").iterdir()] == ["x"]


def test_a_missing_file_remakes_the_output(tmp_path, files):
    files["second"].unlink()
    assert keep_output(make_output(tmp_path, files, {"atlas": "a"})) is None and not files["first"].exists()


@pytest.mark.parametrize("change", ["", "newer input", "no input", "no picture"])
def test_the_users_own_file_is_kept_at_any_age(tmp_path, files, change):
    """An output without stamps in the report is the user's own file and is kept, whatever its age."""
    if change == "newer input":
        os.utime(files["source"], (2000, 2000))
    elif change:
        files["source" if change == "no input" else "picture"].unlink()
    assert keep_output(make_output(tmp_path, files, {})) == {"dice": 0.9}


def test_a_broken_file_of_the_user_fails_the_subject_and_stays(tmp_path, files):
    with pytest.raises(ScanError, match="it is torn"):
        keep_output(make_output(tmp_path, files, {}), verify_torn)
    assert files["first"].exists()


def test_overwrite_keeps_the_users_file_until_the_new_one_exists(tmp_path, files):
    assert keep_output(make_output(tmp_path, files, {}), overwrite=True) is None
    assert files["first"].exists()  # the old file stays until the stage has made a new one


def test_any_stamp_marks_an_output_as_ours(tmp_path, files):
    previous = {"atlas": "a"}  # the report row of a failed subject keeps the columns in STAMPS
    assert keep_output(make_output(tmp_path, files, previous, atlas="a", image_stamp="1")) is None


def test_a_stamp_without_a_report_column_is_refused(tmp_path, files):
    """After a stage fails for a subject, the report row keeps only the stamp columns that are listed in STAMPS.

    An output without a stamp in the report counts as the user's own file.
    """
    with pytest.raises(ValueError, match=r"report columns \['threshold'\] would be lost if a subject fails"):
        make_output(tmp_path, files, {}, threshold="-950")
