"""Compare the files that feature extraction writes with direct calls of the encoder."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data.pieces
import extract_feature
from data.layout import StoreError
from data.locations import normalize_locations, table_fingerprint
from data.store import PatchStore
from data.views import convert_hu_to_input
from misc import process
from misc.command import run as run_command
from misc.experiment import Experiment
from misc.files import hold_lock_or_raise
from models import fast, frozen
from models.builder import DrasCLR
from models.checkpoint import add_module_prefix, check_sha256, find_epoch_and_step, save_checkpoint
from models.cnn3d import Encoder
from models.frozen import FrozenEncoder

from .conftest import ROOT


def make_checkpoint(path, num_patch=6, seed=0, bare=False, **sizes):
    torch.manual_seed(seed)
    sizes = {"rep_dim": 12, "moco_dim": 5, "num_experts": 3, "mlp": True, **sizes}
    model = DrasCLR(
        Encoder, num_patch, sizes["rep_dim"], sizes["moco_dim"], sizes["num_experts"], 1, 8, 0.9, 0.2, sizes["mlp"]
    )
    # One pass in training mode gives BatchNorm realistic statistics instead of its initial mean 0 and variance 1.
    model.train()
    with torch.no_grad():
        model.encoder_q(torch.randn(8, 1, 32, 32, 32), torch.zeros(1, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    state = (
        model.state_dict()
        if bare
        else {"epoch": 3, "arch": "custom", "state_dict": add_module_prefix(model.state_dict())}
    )
    save_checkpoint(path, state)
    return model.encoder_q.eval()


@torch.no_grad()
def encode_literally(encoder, patches, table):
    """Encode one patch at a time: (N, L, 32, 32, 32) -> (N, L, rep_dim)."""
    locations = torch.from_numpy(normalize_locations(table))
    volumes = torch.from_numpy((np.clip(patches.astype(np.float32), -1024, 240) + 1024) / 632 - 1)
    return np.stack(
        [
            [encoder(volumes[n, i][None, None], locations[i][None])[1][0].numpy() for i in range(len(table))]
            for n in range(len(patches))
        ]
    )


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
def test_features_are_the_encoders(tmp_path, make_store, grid, run, rel, grouped, mlp):
    patches = make_store(tmp_path / "store", 5, grid, grouped=grouped)
    encoder = make_checkpoint(tmp_path / "e x p" / "checkpoint_patch_0003.pth.tar", mlp=mlp)
    (tmp_path / "labels.csv").write_text("sid,FEV1pp,sex\n002,71.5,F\n000,88,M\n")
    run(
        "extract_feature.py",
        *(f"--exp-name={tmp_path / 'e x p'}", "--checkpoint-patch=checkpoint_patch_0003.pth.tar"),
        *("--root-dir", tmp_path / "store", "--labels", tmp_path / "labels.csv", "--batch-size", 2),
    )
    out = tmp_path / "e x p" / "patch_rep" / "0003"
    names = {"sid_arr_full.npy", "pred_arr_patch_full.npy", "pred_arr_patient_full.npy", "feature_arr_patch_full.npy"}
    assert {path.name for path in out.iterdir()} == names | {
        "label_names.json",
        "patient_features.csv",
        "features.json",
    }
    patch, patient, sids, labels = (
        np.load(out / f"{name}_full.npy", allow_pickle=False)
        for name in ("pred_arr_patch", "pred_arr_patient", "sid_arr", "feature_arr_patch")
    )
    wanted = encode_literally(encoder, patches, grid)
    assert patch.shape == (5, 6, 12) and patch.dtype == patient.dtype == np.float32
    assert rel(patch, wanted) < 1e-5
    np.testing.assert_allclose(patient, patch.mean(axis=1), rtol=1e-5, atol=1e-6)
    assert sids.tolist() == ["000", "001", "002", "003", "004"]
    np.testing.assert_array_equal(labels[:, 0], np.array([88, np.nan, 71.5, np.nan, np.nan], dtype=np.float32))
    assert json.loads((out / "label_names.json").read_text()) == ["FEV1pp"]
    with open(out / "patient_features.csv") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["sid", *(f"f{i:03d}" for i in range(12))] and [row[0] for row in rows] == sids.tolist()
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], dtype=np.float32), patient)


def extract(*flags):
    args = extract_feature.parse_arguments([str(flag) for flag in flags])
    extract_feature.extract_features(args, torch.device("cpu"))


def test_another_stores_features_do_not_replace_the_experiments_own(tmp_path, make_store, grid, run_here):
    make_store(tmp_path / "own", 3, grid)
    make_store(tmp_path / "other", 2, grid)
    make_checkpoint(tmp_path / "e" / "checkpoint_patch_0001.pth.tar")
    (tmp_path / "e" / "configs.json").write_text(json.dumps({"root_dir": str(tmp_path / "own")}))
    flags = ("--exp-name", tmp_path / "e", "--checkpoint-patch", "checkpoint_patch_0001.pth.tar")
    assert run_here("extract_feature.py", *flags, cwd=tmp_path).returncode == 0
    refused = run_here("extract_feature.py", *flags, "--root-dir", tmp_path / "other", cwd=tmp_path)
    assert refused.returncode == 2 and "set --out-dir" in refused.stderr
    (kept,) = (tmp_path / "e" / "patch_rep").glob("*/sid_arr_full.npy")
    assert len(np.load(kept)) == 3
    elsewhere = ("--root-dir", tmp_path / "other", "--out-dir", tmp_path / "o")
    assert run_here("extract_feature.py", *flags, *elsewhere, cwd=tmp_path).returncode == 0
    assert len(np.load(tmp_path / "o" / "sid_arr_full.npy")) == 2


@pytest.mark.parametrize("grouped", [True, False])
def test_locations_are_frozen_in_blocks(tmp_path, make_store, grid, monkeypatch, rel, grouped):
    """Extract six locations in blocks of four: the second block is shorter than the first."""
    monkeypatch.setattr(frozen, "LOCATIONS_AT_ONCE", 4)
    patches = make_store(tmp_path / "store", 5, grid, grouped=grouped)
    encoder = make_checkpoint(tmp_path / "c.pth.tar")
    flags = ("--exp-name", tmp_path, "--checkpoint-patch", "c.pth.tar", "--root-dir", tmp_path / "store")
    extract(*flags, "--out-dir", tmp_path / "o", "--device", "cpu")
    made = np.load(tmp_path / "o" / "pred_arr_patch_full.npy")
    wanted = encode_literally(encoder, patches, grid)
    assert all(rel(made[:, index], wanted[:, index]) < 1e-5 for index in range(6))


def test_sigterm_prints_how_to_resume(tmp_path, make_store, grid, monkeypatch, capsys):
    make_store(tmp_path / "store", 3, grid)
    make_checkpoint(tmp_path / "c.pth.tar")
    flags = ("--exp-name", tmp_path, "--checkpoint-patch", "c.pth.tar", "--root-dir", tmp_path / "store")
    monkeypatch.setattr(sys, "argv", ["extract_feature.py", *map(str, flags), "--device", "cpu"])
    monkeypatch.setattr(extract_feature, "encode_pieces", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            run_command(extract_feature.main)
        assert left.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "stopped; start again to continue\n"


def test_a_stopped_extraction_resumes(tmp_path, make_store, grid, monkeypatch):
    monkeypatch.setattr(frozen, "LOCATIONS_AT_ONCE", 4)  # the extraction stops in the middle of a block of locations
    make_store(tmp_path / "store", 4, grid)
    make_checkpoint(tmp_path / "c.pth.tar")
    flags = (
        "--exp-name",
        tmp_path,
        "--checkpoint-patch",
        "c.pth.tar",
        "--root-dir",
        tmp_path / "store",
        "--device",
        "cpu",
    )
    original, seen = extract_feature.encode_pieces, []

    def stop_at_the_fourth(*inputs):
        for piece, features in original(*inputs):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(piece.name)
            yield piece, features

    def follow(*inputs):
        for piece, features in original(*inputs):
            again.append(piece.name)
            yield piece, features

    monkeypatch.setattr(extract_feature, "encode_pieces", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        extract(*flags, "--out-dir", tmp_path / "a")
    assert not (tmp_path / "a" / "pred_arr_patch_full.npy").exists()
    again = []
    monkeypatch.setattr(extract_feature, "encode_pieces", follow)
    extract(*flags, "--out-dir", tmp_path / "a")
    assert len(again) == 3 and not set(again) & set(seen)
    extract(*flags, "--out-dir", tmp_path / "b")
    first, second = (np.load(tmp_path / name / "pred_arr_patch_full.npy") for name in "ab")
    np.testing.assert_array_equal(first, second)
    assert not (tmp_path / "a" / ".pieces").exists()

    # Partial results from different patches or from a different checkpoint are not reused.
    key = extract_feature.hash_inputs(tmp_path / "c.pth.tar", PatchStore(tmp_path / "store"), "off")
    os.utime(tmp_path / "store" / "grouped_patch" / "patch_loc_3.npy")
    assert key != extract_feature.hash_inputs(tmp_path / "c.pth.tar", PatchStore(tmp_path / "store"), "off")
    monkeypatch.setattr(extract_feature, "encode_pieces", stop_at_the_fourth)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        extract(*flags, "--out-dir", tmp_path / "c")
    make_checkpoint(tmp_path / "c.pth.tar", seed=9)
    monkeypatch.setattr(extract_feature, "encode_pieces", original)
    extract(*flags, "--out-dir", tmp_path / "c")
    extract(*flags, "--out-dir", tmp_path / "d")
    third, fourth = (np.load(tmp_path / name / "pred_arr_patch_full.npy") for name in "cd")
    np.testing.assert_array_equal(third, fourth)


def test_blocks_of_subjects_are_joined_in_order(tmp_path, make_store, grid, monkeypatch):
    make_store(tmp_path / "g", 7, grid)
    make_store(tmp_path / "u", 7, grid, grouped=False)
    make_checkpoint(tmp_path / "c.pth.tar")
    monkeypatch.setattr(data.pieces, "PIECE_SUBJECTS", 3)
    monkeypatch.setattr(extract_feature, "ASSEMBLY_BYTES", 2 * 6 * 12 * 4)
    for name in "gu":
        extract(
            "--exp-name",
            tmp_path,
            "--checkpoint-patch",
            "c.pth.tar",
            "--root-dir",
            tmp_path / name,
            "--out-dir",
            tmp_path / f"o{name}",
        )
    for array in ("pred_arr_patch_full", "pred_arr_patient_full"):
        first, second = (np.load(tmp_path / f"o{name}" / f"{array}.npy") for name in "gu")
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_bare_state_dict_given_by_path(tmp_path, make_store, grid, run):
    make_store(tmp_path / "store", 2, grid)
    make_checkpoint(tmp_path / "w" / "weights_0007.pth.tar", bare=True)
    (tmp_path / "e").mkdir()
    run(
        "extract_feature.py",
        "--exp-name",
        "e",
        "--checkpoint-patch",
        "w/weights_0007.pth.tar",
        "--root-dir",
        "store",
        cwd=tmp_path,
    )
    assert (tmp_path / "e" / "patch_rep" / "0007" / "patient_features.csv").is_file()


def test_mid_epoch_features_get_their_own_folder(tmp_path):
    def out(content):
        return Experiment(tmp_path).features(*find_epoch_and_step(content, tmp_path / "x"))

    assert out({"epoch": 3}) == tmp_path / "patch_rep" / "0003"
    assert out({"epoch": 3, "step": 0}) == tmp_path / "patch_rep" / "0003"
    assert out({"epoch": 3, "step": 12}) == tmp_path / "patch_rep" / "0003_step12"


def test_bad_arguments_are_refused(tmp_path, make_store, grid, run_here, monkeypatch):
    make_store(tmp_path / "store", 2, grid)
    make_checkpoint(tmp_path / "e" / "five.pth.tar", num_patch=5)
    make_checkpoint(tmp_path / "e" / "good.pth.tar")
    content = torch.load(tmp_path / "e" / "good.pth.tar", weights_only=True)
    content["state_dict"]["module.encoder_q.conv2.weight"] = torch.zeros(3, 8, 8, 3, 3)
    torch.save(content, tmp_path / "e" / "shape.pth.tar")
    del content["state_dict"]["module.encoder_q.conv2.weight"]
    torch.save(content, tmp_path / "e" / "key.pth.tar")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "e" / "other.pth.tar")
    torch.save({"state_dict": os.getcwd}, tmp_path / "e" / "unsafe.pth.tar")
    (tmp_path / "e" / "table.csv").write_text("sid,age\nabc,1\n")
    (tmp_path / "e" / "empty.pth.tar").touch()
    (tmp_path / "e" / "torn.pth.tar").write_bytes((tmp_path / "e" / "good.pth.tar").read_bytes()[:3000])
    cases = {
        "five.pth.tar": "trained on 5 locations, but --root-dir store has 6",
        "none.pth.tar": "no checkpoint at e/none.pth.tar; e has",
        "shape.pth.tar": "conv2.weight of shape (3, 8, 8, 3, 3), but the model needs (3, 8, 8, 3, 3, 3)",
        "key.pth.tar": "lacks conv2.weight of shape (3, 8, 8, 3, 3, 3)",
        "other.pth.tar": "no key that starts with encoder_q.",
        "unsafe.pth.tar": "cannot be read as a checkpoint: it holds objects other than tensors",
        "torn.pth.tar": "cannot be read as a checkpoint: it is cut short or damaged",
        "table.csv": "cannot be read as a checkpoint: torch.save did not write this file, which begins with b'sid,age",
        "empty.pth.tar": "cannot be read as a checkpoint: it is empty",
    }
    for name, message in cases.items():
        flags = ("--exp-name=e", f"--checkpoint-patch={name}", "--root-dir=store")
        result = run_here("extract_feature.py", *flags, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr, (name, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1
    result = run_here("extract_feature.py", "--exp-name=e", "--checkpoint-patch=good.pth.tar", cwd=tmp_path)
    assert result.returncode == 2 and "give --root-dir" in result.stderr
    flags = ("--exp-name=e", "--checkpoint-patch=good.pth.tar", "--root-dir=store", "--out-dir=e/table.csv")
    result = run_here("extract_feature.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and "--out-dir e/table.csv is a file" in result.stderr
    (tmp_path / "ssl_exp" / "mine").mkdir(parents=True)
    result = run_here("extract_feature.py", "--exp-name=mine", "--checkpoint-patch=good.pth.tar", cwd=tmp_path)
    assert result.returncode == 2 and "use --exp-name ssl_exp/mine" in result.stderr
    monkeypatch.chdir(tmp_path)  # a path to a checkpoint is used unchanged, whatever --exp-name is
    assert Experiment("mine").find_checkpoint("e/good.pth.tar") == Path("e/good.pth.tar")
    flags = ("--exp-name=e", "--checkpoint-patch=good.pth.tar", "--root-dir=store", "--out-dir=e/table.csv/x")
    result = run_here("extract_feature.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and "table.csv" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.reference
def test_published_checkpoint_works_unchanged(reference, tmp_path, make_store, run):
    """The published experiment is read-only, has no configs.json, and uses an atlas with five locations."""
    table = np.array([[0, 0, 0], [26, 0, 0], [0, 26, 0], [0, 0, 26], [26, 26, 26]])
    make_store(tmp_path / "store", 3, table)
    run(
        "extract_feature.py",
        *(f"--exp-name={reference / 'train'}", "--checkpoint-patch=checkpoint_patch_0001.pth.tar"),
        *("--root-dir", tmp_path / "store", "--out-dir", tmp_path / "out"),
    )
    assert np.load(tmp_path / "out" / "pred_arr_patch_full.npy").shape == (3, 5, 32)


@pytest.fixture
def small(tmp_path, make_store, grid):
    """Make a store of three subjects and a checkpoint that records its location table; return the extraction flags."""
    make_store(tmp_path / "store", 3, grid)
    make_checkpoint(tmp_path / "c_0003.pth.tar")
    content = torch.load(tmp_path / "c_0003.pth.tar", weights_only=True)
    save_checkpoint(tmp_path / "c_0003.pth.tar", {**content, "config": {"location_table": table_fingerprint(grid)}})
    flags = ("--exp-name", tmp_path, "--root-dir", tmp_path / "store", "--device", "cpu", "--out-dir", tmp_path / "o")
    return ("--checkpoint-patch", "c_0003.pth.tar", *flags)


def test_another_location_table_of_the_same_size_is_refused(small, tmp_path, grid, run_here):
    told = run_here("extract_feature.py", *small, cwd=tmp_path)
    assert told.returncode == 0 and "note" not in told.stdout
    np.save(tmp_path / "store" / "atlas_patch_loc.npy", grid[::-1])
    refused = run_here("extract_feature.py", *small, cwd=tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "c_0003.pth.tar was trained on a different table of locations" in refused.stderr
    make_checkpoint(tmp_path / "c_0003.pth.tar")  # published weights do not record their table of locations
    (tmp_path / "o" / "features.json").unlink()
    noted = run_here("extract_feature.py", *small, cwd=tmp_path)
    assert noted.returncode == 0 and "c_0003.pth.tar does not record its table of locations" in noted.stdout


@pytest.mark.parametrize("grouped", [True, False])
def test_layer_features_are_channel_means_and_sds(tmp_path, make_store, grid, grouped, rel):
    """Compare the layer features with the outputs of the encoder's layers.

    The patch features h and their mean are bit-identical with and without --layers.
    """
    patches = make_store(tmp_path / "store", 5, grid, grouped=grouped)
    encoder = make_checkpoint(tmp_path / "c.pth.tar")
    flags = ("--exp-name", tmp_path, "--checkpoint-patch", "c.pth.tar", "--root-dir", tmp_path / "store")
    for name, more in (("plain", ()), ("layers", ("--layers",))):
        extract(*flags, "--out-dir", tmp_path / name, "--device", "cpu", *more)
    for name in ("pred_arr_patch_full.npy", "pred_arr_patient_full.npy", "patient_features.csv"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "layers" / name).read_bytes()
    made = np.load(tmp_path / "layers" / "layer_arr_patch_full.npy")
    seen = []
    hooks = [
        norm.register_forward_hook(lambda *given: seen.append(torch.nn.functional.elu(given[2])))
        for _, norm in encoder.layers()
    ]
    locations = torch.from_numpy(normalize_locations(grid))
    with torch.no_grad(), fast.disable_fast_paths():
        encoder(convert_hu_to_input(torch.from_numpy(patches[:, 3])), locations[3:4])
    wanted = torch.cat(
        [part for x in seen for part in (x.mean(dim=(2, 3, 4)), x.std(dim=(2, 3, 4), correction=0))], dim=1
    )
    assert made.dtype == np.float32 and made.shape == (5, len(grid), wanted.shape[1])
    assert rel(made[:, 3], wanted.numpy()) < 1e-4 and len(hooks) == 13
    # Without --layers, the extraction removes an old layer file.
    extract(*flags, "--out-dir", tmp_path / "layers", "--device", "cpu")
    assert not (tmp_path / "layers" / "layer_arr_patch_full.npy").exists()


def test_features_have_the_reported_precision(small, tmp_path, run_here, monkeypatch):
    """By default, torch uses TF32 for convolutions on a GPU. TF32 would change the features by 6e-5."""
    process.set_arithmetic(tf32=True, deterministic=False)
    during, encode = [], FrozenEncoder.__call__
    monkeypatch.setattr(
        FrozenEncoder,
        "__call__",
        lambda self, *given: during.append(process.find_gpu_matmul_precision()) or encode(self, *given),
    )
    for flags, wanted in (((), "float32"), (("--amp", "bf16"), "bf16")):
        assert run_here("extract_feature.py", *small, *flags, cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / "o" / "features.json").read_text())["precision"] == wanted
    assert set(during) == {"float32"}


def test_who_made_the_features_and_nobody_else_replaces_them(small, tmp_path, run_here):
    assert run_here("extract_feature.py", *small, cwd=tmp_path).returncode == 0
    made = json.loads((tmp_path / "o" / "features.json").read_text())
    digest = hashlib.sha256((tmp_path / "c_0003.pth.tar").read_bytes()).hexdigest()
    wanted = {"checkpoint_sha256": digest, "epoch": 3, "step": 0, "amp": "off", "num_subjects": 3, "rep_dim": 12}
    assert {name: made[name] for name in wanted} == wanted and made["git_commit"] and made["source_hash"]
    assert made["store_version"] == PatchStore(tmp_path / "store").version and made["precision"] == "float32"
    before = (tmp_path / "o" / "patient_features.csv").read_bytes()
    make_checkpoint(tmp_path / "superseded_0003.pth.tar", seed=4)
    other = ("--checkpoint-patch", "superseded_0003.pth.tar", *small[2:])
    refused = run_here("extract_feature.py", *other, cwd=tmp_path)
    assert refused.returncode == 2 and "has features from a different checkpoint" in refused.stderr
    assert (tmp_path / "o" / "patient_features.csv").read_bytes() == before
    again = run_here("extract_feature.py", *small, "--amp", "bf16", cwd=tmp_path)
    assert again.returncode == 0 and "amp changed from off to bf16" in again.stdout


def test_non_finite_features_are_refused(small, tmp_path, run_here, monkeypatch):
    content = torch.load(tmp_path / "c_0003.pth.tar", weights_only=True)
    content["state_dict"]["module.encoder_q.conv2.weight"][0, 0, 0, 0, 0, 0] = float("nan")
    torch.save(content, tmp_path / "nan.pth.tar")
    flags = ("--checkpoint-patch", "nan.pth.tar", *small[2:])
    refused = run_here("extract_feature.py", *flags, cwd=tmp_path)
    assert refused.returncode == 2 and "nan.pth.tar has values in conv2.weight that are not finite" in refused.stderr
    store = PatchStore(tmp_path / "store")
    features = np.zeros((3, 1, 12), dtype=np.float32)
    piece = extract_feature.split_store_into_pieces(store)[4]
    assert extract_feature.refuse_nonfinite_features(features, piece, store) is features
    features[2, 0, 5] = np.inf
    with pytest.raises(StoreError, match="features of subject 002 at location 4 are not finite"):
        extract_feature.refuse_nonfinite_features(features, piece, store)


def test_two_extractions_into_one_folder(small, tmp_path, run_here):
    with hold_lock_or_raise(tmp_path / "o" / ".lock", "x"):
        holder = subprocess.Popen(
            [sys.executable, str(ROOT / "extract_feature.py"), *map(str, small)], stderr=subprocess.PIPE, text=True
        )
        assert f"o is in use by process {os.getpid()} on " in holder.communicate(timeout=120)[1]
    assert holder.returncode == 2 and run_here("extract_feature.py", *small, cwd=tmp_path).returncode == 0


def test_regrouping_the_store_stops_an_extraction(small, tmp_path, monkeypatch):
    original = extract_feature.encode_pieces

    def regroup(*inputs):
        for count, piece in enumerate(original(*inputs)):
            if count == 2:
                (tmp_path / "store" / "subjects.csv").write_text("sid\nA\nB\nC\n")
                path = tmp_path / "store" / "grouped_patch" / "patch_loc_5.npy"
                np.save(path, np.load(path)[::-1])
            yield piece

    monkeypatch.setattr(extract_feature, "encode_pieces", regroup)
    with pytest.raises(StoreError, match="has changed since this run opened the store"):
        extract(*small)
    assert not (tmp_path / "o" / "patient_features.csv").exists()


@pytest.mark.parametrize("length", [64, 12])
def test_a_checkpoint_with_another_checksum_is_refused(small, tmp_path, run_here, length):
    path = tmp_path / "c_0003.pth.tar"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:length]
    flags = (*small[:-1], tmp_path / "sum", "--sha256")
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    refused = run_here("extract_feature.py", *flags, wrong, cwd=tmp_path)
    assert refused.returncode == 2 and f"not --sha256 {wrong}: the file is damaged or is not" in refused.stderr
    assert not (tmp_path / "sum").exists()
    nonsense = run_here("extract_feature.py", *flags, "latest", cwd=tmp_path)
    assert nonsense.returncode == 2 and "8 to 64 hexadecimal digits" in nonsense.stderr
    check_sha256(path, digest.upper())
