"""Run the complete pipeline with the real commands: scans, store, training, features and a prediction."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from .conftest import ROOT


@pytest.mark.slow
def test_from_scans_to_patient_features(cohort, run, tmp_path):
    folder, store = cohort
    run(
        "train.py",
        *("--root-dir", store, "--exp-name", "tiny", "--epochs", 1, "--batch-size", 3, "--moco-k", 6, "--workers", 1),
        *("--rep-dim", 16, "--moco-dim", 8, "--num-experts", 2, "--no-progress"),
        cwd=tmp_path,
    )
    run(
        "extract_feature.py",
        *(
            "--exp-name=ssl_exp/tiny",
            "--checkpoint-patch=checkpoint_patch_0001.pth.tar",
            "--labels",
            folder / "labels.csv",
        ),
        cwd=tmp_path,
    )
    out = tmp_path / "ssl_exp" / "tiny" / "patch_rep" / "0001"
    features = pd.read_csv(out / "patient_features.csv", dtype={"sid": str})
    labels = pd.read_csv(folder / "labels.csv", dtype={"sid": str})
    assert features["sid"].tolist() == labels["sid"].tolist()
    values = features.drop(columns="sid").to_numpy()
    assert values.shape == (6, 16) and np.isfinite(values).all() and (values.std(0) > 0).all()
    names = json.loads((out / "label_names.json").read_text())
    np.testing.assert_allclose(np.load(out / "feature_arr_patch_full.npy"), labels[names].to_numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--k-neighbours", 2), "unrecognized arguments: --k-neighbours 2; see --help"),
        (("--batch-size", 128, "--moco-k", 128), "--batch-size 128 exceeds the 80 subjects of the demo"),
    ],
)
def test_a_wrong_training_flag_is_refused_before_the_start(run, flags, message):
    result = run("tools/run_demo.sh", sys.executable, *flags, check=False)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}")
    assert not result.stdout and len(result.stderr.splitlines()) == 1


def test_top_level_has_no_unknown_files():
    allowed = {
        "README.md",
        "requirements.txt",
        "run_train.sh",
        "train.py",
        "extract_feature.py",
        "LICENSE",
        "pyproject.toml",
    }
    allowed |= {"models", "data", "preprocess", "tools", "misc", "tests", "ssl_exp", "__pycache__"}
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} <= allowed


EXPLAIN = """
import io, pathlib, runpy, sys
from contextlib import redirect_stdout
first = set(sys.modules)
for script in sys.argv[1:]:
    for name in set(sys.modules) - first:  # drop project modules, so each script imports its own
        if name.split(".")[0] in ("misc", "data", "models", "preprocess", "tools"):
            del sys.modules[name]
    sys.path[0], sys.argv = str(pathlib.Path(script).parent), [script, "--help"]
    sys.path[1:] = [path for path in sys.path[1:] if path != str(pathlib.Path(script).parent.parent)]
    output = io.StringIO()
    try:
        with redirect_stdout(output):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        print(script, left.code or 0, len(output.getvalue()))
"""


def test_every_script_prints_help_from_any_folder(tmp_path):
    """The scripts need no PYTHONPATH and leave no file behind."""
    folders = ("preprocess", "tools", "tools/dev")
    scripts = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    scripts = [path for path in scripts if "run(main" in path.read_text(encoding="utf-8")]
    scripts += [ROOT / "train.py", ROOT / "extract_feature.py"]
    command = [sys.executable, "-P", "-c", EXPLAIN, *map(str, scripts)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    told = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert [path for path, _, _ in told] == list(map(str, scripts)) and len(scripts) > 20
    assert all(code == "0" and int(length) > 200 for _, code, length in told), told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["preprocess/run_preprocess.sh", "run_train.sh"])
def test_every_shell_script_prints_help(run, tmp_path, script):
    assert len(run(script, "--help", cwd=tmp_path).stdout) > 300
    assert not list(tmp_path.iterdir())
