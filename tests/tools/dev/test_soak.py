"""Run a short soak test of the quick jobs. A job whose results differ after a kill is reported."""

import csv
import random
import shutil
import sys

import pytest

from tools.dev.soak import Job, make_fingerprint_function, run_interrupted_job_and_compare

SLOWLY = "import os, time, pathlib\nfor n in range(6):\n    time.sleep(0.1)\n"


def job(text):
    return Job((sys.executable, "-c", SLOWLY + text), (), make_fingerprint_function("made/*"))


def results(job, folder, wanted, count=4):
    found = []
    for number in range(count):
        (folder / str(number)).mkdir()
        found.append(run_interrupted_job_and_compare(job, folder / str(number), wanted, 0.7, random.Random(number)))
    return found


def test_jobs_that_do_and_do_not_survive_a_kill(tmp_path):
    careful = "    pathlib.Path('made').mkdir(exist_ok=True)\npathlib.Path('made/a').write_text('whole')"
    reference = tmp_path / "reference"
    (reference / "made").mkdir(parents=True)
    (reference / "made" / "a").write_text("whole")
    wanted = make_fingerprint_function("made/*")(reference)
    good = results(job(careful), tmp_path, wanted)
    assert not any(wrong for _, wrong in good) and sum(bool(sent) for sent, _ in good) >= 2
    # A job that appends to its file keeps the lines of a killed run, so the result differs from the reference.
    careless = "    pathlib.Path('made').mkdir(exist_ok=True)\n    open('made/a', 'a').write('line')\n"
    (tmp_path / "more").mkdir()
    (reference / "made" / "a").write_text("line" * 6)
    bad = results(job(careless), tmp_path / "more", make_fingerprint_function("made/*")(reference))
    assert {wrong for _, wrong in bad} - {""} == {"differs in made/a"}
    # A job that leaves a child process behind is reported.
    left = "import subprocess\nsubprocess.Popen(['sleep', '60'])\n"
    (tmp_path / "left").mkdir()
    orphans = Job((sys.executable, "-c", left), (), make_fingerprint_function("made/*"))
    import tools.dev.soak as module

    before, module.LINGER = module.LINGER, 1.0
    try:
        assert results(orphans, tmp_path / "left", {}, 1)[0][1] == "left 1 processes"
    finally:
        module.LINGER = before


@pytest.mark.slow
def test_a_short_soak(cohort, tmp_path, run):
    """Run one trial of the job that groups patches. A second call of soak.py must not run the finished trial again."""
    prepared = tmp_path / "s" / "prepared"
    shutil.copytree(cohort[1], prepared / "store")
    (prepared / "trained").mkdir()  # this folder must exist, but group_patches does not read it
    flags = ("--work-dir", tmp_path / "s", "--trials", 1, "--num-subjects", 4, "--no-progress")
    flags += ("--jobs", "group_patches")
    shown = run("tools/dev/soak.py", *flags).stdout
    assert "| group_patches | 1 | " in shown
    with open(tmp_path / "s" / "trials.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 1 and not any(row["wrong"] for row in rows)
    assert run("tools/dev/soak.py", *flags).stdout == shown
