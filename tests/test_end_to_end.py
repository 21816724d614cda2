"""The whole way through the real command lines: scans, store, training, features, a prediction."""

import json
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
        (("--exp", "mine"), "unrecognized arguments: --exp mine; see --help"),
        (("--augmentation", "az"), "--augmentation 'az' has the unknown letter 'z'"),
        (("--batch-size", 128, "--moco-k", 128), "--batch-size 128: the try-out has 48 subjects"),
    ],
)
def test_a_wrong_flag_of_the_embedded_run_is_told_before_it_begins(run, flags, message):
    result = run("tools/run_demo.sh", sys.executable, *flags, check=False)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}")
    assert not result.stdout and len(result.stderr.splitlines()) == 1


def test_top_level_is_the_layout():
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


@pytest.mark.parametrize(
    "script",
    ["train.py", "extract_feature.py"]
    + [
        f"preprocess/{name}.py"
        for name in ("patchify_atlas", "segment_lung", "register", "patchify_images", "group_patches")
    ]
    + ["tools/make_cohort.py", "tools/evaluate.py", "preprocess/run_preprocess.sh", "run_train.sh"],
)
def test_every_script_explains_itself_from_any_folder(run, tmp_path, script):
    result = run(script, "--help", cwd=tmp_path)
    assert len(result.stdout) > 300
    assert not list(tmp_path.iterdir())
