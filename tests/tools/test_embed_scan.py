"""Test that embed_scan.py gives the same features as the five stages and the extraction, even after a bad scan."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from misc.command import UserError
from misc.files import hash_file
from models.builder import DrasCLR
from models.checkpoint import add_module_prefix, save_checkpoint
from models.cnn3d import Encoder
from preprocess.registration import check_overlap
from preprocess.scan import ScanError
from tests.conftest import calibrate
from tools.embedding.embed import Embedder, derive_sid_from_path, embed_scans
from tools.evaluation.vectors import FILES, Standardization


@pytest.fixture(scope="module")
def study(cohort, tmp_path_factory, run):
    """Make a checkpoint for the cohort's atlas and extract one scan's features; return (folder, cohort)."""
    folder, _ = cohort
    root = tmp_path_factory.mktemp("embed")
    table = pd.read_csv(folder / "dataset.csv", dtype=str)[:1]
    table["image"] = [str(folder / image) for image in table["image"]]
    table.to_csv(root / "dataset.csv", index=False)
    atlas = folder / "atlas_lung_mask.nii.gz"
    run(
        "preprocess/run_preprocess.py",
        *("--input-csv", root / "dataset.csv", "--root-dir", root / "store", "--atlas-mask", atlas),
        *("--method", "threshold", "--strict", "--no-qc"),
    )
    locations = len(np.load(root / "store" / "atlas_patch_loc.npy"))
    torch.manual_seed(0)
    model = DrasCLR(Encoder, locations, 12, 5, 3, 1, 8, 0.9, 0.2, True)
    calibrate(model.encoder_q)
    save_checkpoint(root / "c_0003.pth.tar", {"epoch": 3, "state_dict": add_module_prefix(model.state_dict())})
    flags = ("--exp-name", root, "--checkpoint-patch", "c_0003.pth.tar", "--root-dir", root / "store")
    run("extract_feature.py", *flags, "--device", "cpu", "--layers", "--out-dir", root / "features")
    return root, folder


def flags_of(study):
    root, folder = study
    given = ("--checkpoint", root / "c_0003.pth.tar", "--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    return (*given, "--method", "threshold", "--device", "cpu")


def test_features_are_bit_identical_to_the_five_stages(study, run, tmp_path):
    root, folder = study
    scan = folder / "image" / "0001.nii.gz"
    (tmp_path / "broken.nii.gz").write_bytes(scan.read_bytes()[:5000])
    flags = (*flags_of(study), "--out", "f.csv", "--patch-dir", "patches")
    shown = run("tools/embed_scan.py", scan, "broken.nii.gz", *flags, cwd=tmp_path)
    assert "0001: fine" in shown.stdout and "broken: broken.nii.gz" not in shown.stdout
    assert "embed_scan: 1 of 2 scans embedded; f.csv" in shown.stdout
    assert (tmp_path / "f.csv").read_bytes() == (root / "features" / "patient_features.csv").read_bytes()
    patches = np.load(tmp_path / "patches" / "0001.npy")
    assert np.array_equal(patches, np.load(root / "features" / "pred_arr_patch_full.npy")[0])
    assert (tmp_path / "f.csv.qc" / "0001.png").read_bytes().startswith(b"\x89PNG")
    report = pd.read_csv(tmp_path / "f.csv.report.csv", dtype={"sid": str}).set_index("sid")
    assert report["status"].to_dict() == {"0001": "ok", "broken": "failed"} and report.loc["0001", "dice_left"] > 0.8
    assert "cut short" in report.loc["broken", "message"]

    # A second call keeps finished rows unchanged and processes the repaired scan.
    before = (tmp_path / "f.csv.qc" / "0001.png").stat().st_mtime_ns
    shutil.copy(folder / "image" / "0002.nii.gz", tmp_path / "broken.nii.gz")
    again = run("tools/embed_scan.py", scan, "broken.nii.gz", *flags, cwd=tmp_path)
    assert "2 of 2 scans" in again.stdout and "0001" not in again.stdout
    assert (tmp_path / "f.csv.qc" / "0001.png").stat().st_mtime_ns == before
    lines = (tmp_path / "f.csv").read_text().splitlines()
    assert lines[1] == (root / "features" / "patient_features.csv").read_text().splitlines()[1] and len(lines) == 3
    assert lines[2].startswith("broken,")


def test_rows_of_other_scans_are_kept_and_another_checkpoint_refused(study, run, tmp_path):
    root, folder = study
    flags = (*flags_of(study), "--out", "f.csv", "--no-qc")
    run("tools/embed_scan.py", folder / "image" / "0001.nii.gz", *flags, cwd=tmp_path)
    first = (tmp_path / "f.csv").read_text().splitlines()
    shown = run("tools/embed_scan.py", folder / "image" / "0002.nii.gz", *flags, cwd=tmp_path).stdout
    assert "1 of 1 scans embedded, 1 other scans kept" in shown
    both = (tmp_path / "f.csv").read_text().splitlines()
    assert both[:2] == first and both[2].startswith("0002,")
    report = pd.read_csv(tmp_path / "f.csv.report.csv", dtype=str)
    assert report["sid"].tolist() == ["0001", "0002"]
    shutil.copy(root / "c_0003.pth.tar", tmp_path / "other.pth.tar")
    with open(tmp_path / "other.pth.tar", "ab") as stream:
        stream.write(b" ")  # now a different file
    other = [flag if flag != root / "c_0003.pth.tar" else tmp_path / "other.pth.tar" for flag in flags]
    refused = run("tools/embed_scan.py", folder / "image" / "0002.nii.gz", *other, cwd=tmp_path, check=False)
    assert (
        refused.returncode == 2 and "f.csv has features from a different checkpoint, atlas or method" in refused.stderr
    )
    assert (tmp_path / "f.csv").read_text().splitlines() == both


def test_a_foreign_table_is_not_overwritten(study, run_here, tmp_path):
    root, folder = study
    mine = "sid,FEV1pp\n0001,80\n0002,70\n"
    (tmp_path / "base.csv").write_text(mine)
    flags = ("--checkpoint", root / "c_0003.pth.tar", "--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    more = ("--method", "threshold", "--out", "base.csv", "--no-progress")
    refused = run_here("tools/embed_scan.py", folder / "image" / "0001.nii.gz", *flags, *more, cwd=tmp_path)
    assert (
        refused.returncode == 2 and "--out base.csv already exists, but without base.csv.report.csv" in refused.stderr
    )
    assert (tmp_path / "base.csv").read_text() == mine


@pytest.mark.parametrize("kind", ["moments", "layers"])
def test_moments_and_layers_of_a_single_scan(study, run_here, tmp_path, rel, kind):
    """embed_scan.py computes the same patient vector as extraction from the store.

    A standardisation file for a different checkpoint or a different kind of patient vector is refused.
    """
    root, folder = study
    patches = np.load(root / "features" / FILES[kind])
    rng = np.random.default_rng(0)
    around = patches + rng.normal(size=(20, *patches.shape[1:])) * 0.1
    kept = Standardization.fit(kind, around, np.arange(20))
    kept.save(tmp_path / "s.npz", hash_file(root / "c_0003.pth.tar"))
    flags = (folder / "image" / "0001.nii.gz", *flags_of(study), "--out", "f.csv", "--no-qc", "--patient-vector", kind)
    told = run_here("tools/embed_scan.py", *flags, cwd=tmp_path)
    assert told.returncode == 2 and f"--patient-vector {kind} needs --standardization FILE" in told.stderr
    assert run_here("tools/embed_scan.py", *flags, "--standardization", "s.npz", cwd=tmp_path).returncode == 0
    table = pd.read_csv(tmp_path / "f.csv")
    assert table.shape == (1, 1 + 2 * patches.shape[2])
    assert rel(table.iloc[0, 1:].to_numpy(float), kept.compute_patient_vectors(patches)[0]) < 1e-5
    given = (str(root / "c_0003.pth.tar"), str(folder / "atlas_lung_mask.nii.gz"))
    for change, message in (
        (dict(patient_vector="mean"), "has no effect with --patient-vector mean"),
        (dict(patient_vector={"moments": "layers", "layers": "moments"}[kind]), f"is for --patient-vector {kind}"),
        (dict(sha="0" * 64), "was made for a different checkpoint"),
        (dict(locations=3), "has shape .locations, features."),
    ):
        wrong = kept._replace(mean=kept.mean[: change.pop("locations", None)])
        wrong = wrong._replace(factor=kept.factor[: len(wrong.mean)])
        wrong.save(tmp_path / "w.npz", change.pop("sha", ""))
        choices = dict(method="threshold", patient_vector=kind, standardization=tmp_path / "w.npz") | change
        with pytest.raises(UserError, match=message):
            Embedder(*given, **choices)


def test_from_python(study):
    root, folder = study
    given = (str(root / "c_0003.pth.tar"), str(folder / "atlas_lung_mask.nii.gz"))
    table = embed_scans([folder / "image" / "0001.nii.gz"], *given, method="threshold")
    wanted = pd.read_csv(root / "features" / "patient_features.csv", dtype={"sid": str})
    assert list(table.columns) == list(wanted.columns) and table["sid"].tolist() == ["0001"]
    np.testing.assert_array_equal(table.iloc[0, 1:].to_numpy(np.float32), wanted.iloc[0, 1:].to_numpy(np.float32))


def test_a_verdict_names_the_problems(study):
    root, folder = study
    embedder = Embedder(root / "c_0003.pth.tar", folder / "atlas_lung_mask.nii.gz", method="threshold")
    fine = {"voxels_outside": 0, "patches": 34, "centres_in_lungs": embedder.usual}
    assert embedder.describe_quality_verdict(fine, {"warnings": ""}) == "fine"
    off = embedder.describe_quality_verdict(
        {**fine, "voxels_outside": 34 * 32**3 // 2, "centres_in_lungs": 0.1}, {"warnings": "bare"}
    )
    assert off.startswith("check it: bare; 50% of the patches' voxels lie outside") and "0.10 of the patch" in off


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ((0.4, 0.4, 0.4), "(right 0.40, left 0.40); each of the three values must be at least --min-dice 0.5"),
        ((0.7, 0.9, 0.1), "(right 0.90, left 0.10); each of the three values must be at least --min-dice"),
        ((0.94, 0.0, 0.0), "or the scan is mirrored"),
    ],
)
def test_each_lung_must_overlap(figures, message):
    names = ("dice", "dice_right", "dice_left")
    check_overlap(dict(zip(names, (0.8, 0.8, 0.8))), 0.5, "m")
    with pytest.raises(ScanError) as caught:
        check_overlap(dict(zip(names, figures)), 0.5, "m")
    assert message in str(caught.value)


def test_sids_from_file_names():
    assert [derive_sid_from_path(name) for name in ("a/b.nii.gz", "b.v2.mha", "x/scan.NII", "c.d")] == [
        "b",
        "b.v2",
        "scan",
        "c.d",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give either SCAN arguments or --input-csv"),
        (("a/x.nii.gz", "b/x.nii"), "are both called 'x'"),
        (("x.nii.gz", "--sha256", "0123456789"), "not --sha256 0123456789"),
        (("x.nii.gz", "--atlas-patch-loc", "none.npy"), "none.npy cannot be read"),
    ],
)
def test_bad_arguments_are_refused(study, tmp_path, run_here, flags, message):
    result = run_here("tools/embed_scan.py", *flags, *flags_of(study), "--out", "f.csv", cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and not list(tmp_path.iterdir())
