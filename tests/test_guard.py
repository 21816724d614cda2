"""Compare a tiny seeded run with the numbers in guard.json, so that unintended changes are noticed.

The tests in this file need no files from outside the repository. The expected numbers were computed with torch 2.14 and
with code that reproduced the publication's recorded steps (tests/models/test_reference.py). A commit that
changes the expected numbers on purpose must update guard.json and explain why.
"""

import json

import numpy as np
import torch

from models.builder import DrasCLR
from models.checkpoint import add_module_prefix, save_checkpoint
from models.cnn3d import Encoder

from .conftest import ROOT, calibrate

GUARD = json.loads((ROOT / "tests" / "guard.json").read_text(encoding="utf-8"))


def test_five_losses_of_a_seeded_run(tmp_path, make_store, grid, run):
    make_store(tmp_path / "store", 9, grid, seed=3)
    flags = ("--root-dir", "store", "--exp-name", "g", "--epochs", 1, "--batch-size", 4, "--moco-k", 8, "--workers", 0)
    sizes = ("--rep-dim", 16, "--moco-dim", 8, "--num-experts", 2, "--print-freq", 1, "--seed", 5, "--device", "cpu")
    run("train.py", *flags, *sizes, "--augmentation", "fagc", "--bn-groups", 1, cwd=tmp_path)
    lines = map(json.loads, (tmp_path / "ssl_exp" / "g" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [line for line in lines if line["kind"] == "step"][:5]
    # CPUs round differently, and each step doubles the difference.
    # At the fifth step, the losses on a CPU with AVX2 and on an Intel CPU with AVX-512 differ by 4e-4.
    for name in ("loss_patch", "loss_neighbor"):
        np.testing.assert_allclose([step[name] for step in steps], GUARD[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_features_of_a_seeded_checkpoint(tmp_path, make_store, grid, run):
    make_store(tmp_path / "store", 3, grid, seed=4)
    torch.manual_seed(6)
    model = DrasCLR(Encoder, len(grid), 16, 8, 2, 1, 8, 0.9, 0.2, True)
    calibrate(model.encoder_q)
    save_checkpoint(
        tmp_path / "c.pth.tar", {"epoch": 1, "arch": "custom", "state_dict": add_module_prefix(model.state_dict())}
    )
    flags = ("--exp-name", ".", "--checkpoint-patch", "c.pth.tar", "--root-dir", "store", "--out-dir", "out")
    run("extract_feature.py", *flags, "--device", "cpu", cwd=tmp_path)
    features = np.load(tmp_path / "out" / "pred_arr_patient_full.npy")
    np.testing.assert_allclose(features, GUARD["patient_features"], rtol=1e-4, atol=1e-4)
    patches = np.load(tmp_path / "out" / "pred_arr_patch_full.npy")
    np.testing.assert_allclose(np.linalg.norm(patches, axis=2), GUARD["patch_norms"], rtol=1e-4)
