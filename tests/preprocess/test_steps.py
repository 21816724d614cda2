"""Test preprocessing stages 2 to 5 on the command line: failures, skipping, resuming and reports."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from data.layout import StoreError, StoreLayout
from data.store import PatchStore
from misc.files import hold_lock_or_raise

from ..conftest import ROOT


def report(store, script):
    table = pd.read_csv(store / "report" / f"{script}.csv", dtype=str, keep_default_na=False)
    return table.set_index("sid")


def test_all_stages_succeed_on_the_cohort(cohort):
    folder, store = cohort
    sids = pd.read_csv(folder / "dataset.csv", dtype=str)["sid"].tolist()
    table = np.load(store / "atlas_patch_loc.npy")
    assert 20 <= len(table) <= 40
    for script in ("segment_lung", "register", "patchify_images"):
        assert report(store, script)["status"].tolist() == ["ok"] * 6
    assert (report(store, "register")["dice"].astype(float) > 0.85).all()
    figures = report(store, "patchify_images")
    inside, atlas = (figures[name].astype(float) for name in ("centres_in_lungs", "centres_in_atlas_lungs"))
    assert (abs(inside - atlas) < 0.15).all()
    opened = PatchStore(store)
    assert opened.sids == sids and opened.grouped
    for row, sid in enumerate(sids):
        patches = np.load(store / "patch" / f"{sid}_patch.npy")
        assert patches.shape == (len(table), 32, 32, 32) and patches.dtype == np.int16
        assert patches.min() >= -1024 and patches.max() <= 240
        for location in range(len(table)):
            np.testing.assert_array_equal(opened.read(location, np.array([row]))[0], patches[location])
        corners = np.load(store / "patch_loc" / f"{sid}_patch_loc.npy")
        assert corners.shape == (len(table), 3) and corners.dtype == np.int64
        mask = sitk.ReadImage(str(store / "lung_mask" / f"{sid}.nii.gz"))
        assert mask.GetPixelID() == sitk.sitkUInt8 and set(np.unique(sitk.GetArrayFromImage(mask))) == {0, 1, 2}
        assert (store / "qc" / f"{sid}.png").read_bytes().startswith(b"\x89PNG")


def test_patches_equal_the_scan_at_their_positions(cohort):
    """Compare patch voxels with the scan at the same physical points, for any orientation."""
    folder, store = cohort
    table = pd.read_csv(folder / "dataset.csv", dtype=str)
    for sid, name in zip(table["sid"], table["image"]):
        scan = sitk.Cast(sitk.ReadImage(str(folder / name)), sitk.sitkFloat32)
        transform = sitk.ReadTransform(str(store / "transform" / f"{sid}_Reg_Atlas_Affine_0GenericAffine.mat"))
        atlas = sitk.ReadImage(str(folder / "atlas_lung_mask.nii.gz"))
        corners = np.load(store / "atlas_patch_loc.npy")
        patches = np.load(store / "patch" / f"{sid}_patch.npy")
        differences = []
        for corner, patch in zip(corners, patches):
            point = np.array(transform.TransformPoint(atlas.TransformIndexToPhysicalPoint([int(v) for v in corner])))
            # The atlas is LAS with 1 mm voxels: x points to the left, y to the front, z to the head.
            for z, y, x in ((0, 0, 0), (16, 16, 16), (31, 5, 20)):
                place = point + np.array([x, -y, z])
                index = scan.TransformPhysicalPointToContinuousIndex(place)
                if all(1 <= i < n - 2 for i, n in zip(index, scan.GetSize())):
                    value = np.clip(scan.EvaluateAtPhysicalPoint(place, sitk.sitkLinear), -1024, 240)
                    differences.append(abs(value - patch[z, y, x]))
        # Patch corners are rounded to whole voxels of the resampled scan, so the patch and the scan differ slightly.
        assert np.median(differences) < 60 and len(differences) > 30


def test_finished_work_is_skipped(cohort, run):
    folder, store = cohort
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.n*") if path.is_file()}
    result = run(
        "preprocess/run_preprocess.sh",
        *("--input-csv", folder / "dataset.csv", f"--root-dir={store}", "--method", "threshold"),
        *("--atlas-mask", folder / "atlas_lung_mask.nii.gz"),
    )
    assert result.stdout.count("0 ok, 6 skipped, 0 failed") == 3 and "already done" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*.n*") if path.is_file()}
    assert float(report(store, "register")["dice"].iloc[0]) > 0.8  # recorded values are kept


def test_registration_is_reproducible(cohort, run, tmp_path):
    """ANTs compares a random half of the voxels, which must be the same voxels in every run."""
    folder, store = cohort
    name = "0001_Reg_Atlas_Affine_0GenericAffine.mat"
    again = tmp_path / "s" / "lung_mask"
    again.mkdir(parents=True)
    (again / "0001.nii.gz").write_bytes((store / "lung_mask" / "0001.nii.gz").read_bytes())
    (tmp_path / "one.csv").write_text(f"sid,image\n0001,{folder}/image/0001.nii.gz\n")
    atlas = ("--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    run("preprocess/register.py", "--input-csv", tmp_path / "one.csv", "--root-dir", tmp_path / "s", *atlas)
    assert (tmp_path / "s" / "transform" / name).read_bytes() == (store / "transform" / name).read_bytes()


@pytest.fixture
def small(cohort, tmp_path):
    """Make a table with two valid subjects of the cohort and five that cannot be processed."""
    folder, _ = cohort
    broken, four, scaled = tmp_path / "broken.nii.gz", tmp_path / "four.nii.gz", tmp_path / "scaled.nii.gz"
    whole = (folder / "image" / "0001.nii.gz").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])  # ITK would fill the missing half with a constant
    image = sitk.ReadImage(str(folder / "image" / "0001.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(four))
    sitk.WriteImage(image + 1024, str(scaled))
    (tmp_path / "table.csv").write_text(
        "sid,image\n"
        f"001,{folder}/image/0001.nii.gz\n002,{folder}/image/0002.nii.gz\n"
        "absent,nowhere.nii.gz\nnone,\nbroken,broken.nii.gz\nfour,four.nii.gz\nscaled,scaled.nii.gz\n"
    )
    return folder, tmp_path


@pytest.mark.slow
def test_a_bad_scan_fails_only_its_subject(small, run):
    folder, tmp_path = small
    command = ("--input-csv", tmp_path / "table.csv", "--root-dir", tmp_path / "s", "--method", "threshold")
    atlas = ("--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    result = run("preprocess/run_preprocess.py", *command, *atlas, cwd=tmp_path)
    assert "Traceback" not in result.stderr
    # A failed subject is listed once, in the stage where it fails. Later stages only count the failure.
    assert result.stdout.count("  broken  failed  ") == 1 and "broken" not in result.stderr
    assert result.stdout.count("5 of the failed subjects failed in an earlier stage; the first is absent") == 2
    assert "cut short or damaged" in report(tmp_path / "s", "segment_lung").loc["broken", "message"]
    figures = report(tmp_path / "s", "segment_lung")
    assert figures["status"].to_dict() == {
        **{"001": "ok", "002": "ok"},
        **dict.fromkeys(("absent", "none", "broken", "four", "scaled"), "failed"),
    }
    for sid, words in {
        "absent": "does not exist",
        "none": "no image for this subject",
        "broken": "broken.nii.gz",
        "four": "4 dimensions",
        "scaled": "rescale intercept",
    }.items():
        assert words in figures.loc[sid, "message"]
    repeated = report(tmp_path / "s", "register").loc["absent", "message"]
    assert repeated.startswith("failed in an earlier stage: ") and repeated.endswith("does not exist")
    assert "no transform at" in report(tmp_path / "s", "patchify_images").loc["absent", "message"]
    assert PatchStore(tmp_path / "s").sids == ["001", "002"]

    strict = run("preprocess/segment_lung.py", *command, "--strict", check=False)
    assert strict.returncode == 1
    # A replaced scan is processed again by all stages.
    image = folder / "image" / "0003.nii.gz"
    table = (tmp_path / "table.csv").read_text().splitlines()[:3]
    table[1] = f"001,{image}"
    (tmp_path / "table.csv").write_text("\n".join(table) + "\n")
    again = run("preprocess/run_preprocess.py", *command, *atlas, "--strict").stdout
    assert again.count("1 ok, 1 skipped, 0 failed") == 3
    assert "2 subjects" in again.splitlines()[-2] and "qc_page" in again.splitlines()[-1]


def two_subjects(folder, tmp_path):
    (tmp_path / "t.csv").write_text(f"sid,image\na,{folder}/image/0001.nii.gz\nb,{folder}/image/0002.nii.gz\n")
    return "--input-csv", tmp_path / "t.csv", "--root-dir", tmp_path / "s"


@pytest.mark.slow
def test_outputs_of_a_killed_run_are_made_again(cohort, tmp_path, run):
    """A transform that a killed run wrote but did not report does not count as the user's own file."""
    folder, store = cohort
    atlas = ("--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    flags = two_subjects(folder, tmp_path)
    run("preprocess/segment_lung.py", *flags, "--method", "threshold")
    other = (store / "transform" / "0003_Reg_Atlas_Affine_0GenericAffine.mat").read_bytes()
    targets = {sid: tmp_path / "s" / "transform" / f"{sid}_Reg_Atlas_Affine_0GenericAffine.mat" for sid in "ab"}
    targets["a"].parent.mkdir()
    for target in targets.values():
        target.write_bytes(other)
    claims = tmp_path / "s" / "report" / ".claims-register"
    claims.mkdir()
    (claims / "a").touch()
    run("preprocess/register.py", *flags, *atlas)
    assert report(tmp_path / "s", "register")["status"].to_dict() == {"a": "ok", "b": "skipped"}
    assert targets["a"].read_bytes() != other and targets["b"].read_bytes() == other
    assert not list(claims.iterdir())
    run("preprocess/register.py", *flags, *atlas)
    assert report(tmp_path / "s", "register")["status"].to_dict() == {"a": "skipped", "b": "skipped"}


def test_each_stage_claims_an_output_before_writing_it(cohort, tmp_path, monkeypatch):
    from preprocess import patchify_images, register, registration, segment_lung
    from preprocess.subjects import Subject

    folder, _ = cohort
    layout, mask = StoreLayout(tmp_path), str(folder / "atlas_lung_mask.nii.gz")
    one = Subject("a", str(folder / "image" / "0001.nii.gz"))

    def killed(*_, **__):
        raise KeyboardInterrupt

    def check(script):
        assert [path.name for path in layout.subjects_in_progress_dir(script).iterdir()] == ["a"]

    settings = dict(root_dir=str(tmp_path), overwrite=False)
    segmenting = dict(settings, method="threshold", weights=None, settings="threshold")
    with monkeypatch.context() as patch:
        patch.setattr(segment_lung, "write_image", killed)
        with pytest.raises(KeyboardInterrupt):
            segment_lung.segment_subject(one, {}, **segmenting)
        check("segment_lung")
    segment_lung.segment_subject(one, {}, **segmenting)
    np.save(tmp_path / "atlas_patch_loc.npy", np.array([[0, 0, 0], [20, 20, 20]]))
    registering = dict(settings, atlas_mask=mask, atlas="x", min_dice=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(registration.sitk, "WriteTransform", killed)
        with pytest.raises(KeyboardInterrupt):
            register.register_subject(one, {}, **registering)
        check("register")
    register.register_subject(one, {}, **registering)
    with monkeypatch.context() as patch:
        patch.setattr(patchify_images, "save_array", killed)
        with pytest.raises(KeyboardInterrupt):
            patchify_images.patchify_subject(one, {}, **settings, atlas_mask=mask, atlas="x", patch_size=32, qc=False)
        check("patchify_images")


def test_registration_without_a_transform_fails_in_that_stage(cohort, tmp_path, monkeypatch):
    import ants

    from preprocess import register
    from preprocess.scan import EarlierFailure, ScanError
    from preprocess.subjects import Subject

    folder, store = cohort
    target = StoreLayout(tmp_path).lung_mask("a")
    target.parent.mkdir()
    target.write_bytes(StoreLayout(store).lung_mask("0001").read_bytes())
    monkeypatch.setattr(ants, "registration", lambda *_, **__: {})
    flags = dict(root_dir=str(tmp_path), overwrite=False, atlas="x", min_dice=0.5)
    with pytest.raises(ScanError, match="wrote no transform") as caught:
        register.register_subject(Subject("a", ""), {}, atlas_mask=str(folder / "atlas_lung_mask.nii.gz"), **flags)
    # The summary counts each EarlierFailure, but does not list it.
    assert not isinstance(caught.value, EarlierFailure)
    assert not list((tmp_path / "transform").glob("*"))


def processes_of(folder):
    """Return all command lines of running processes in which a folder's name occurs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return [line for line in found if str(folder).encode() in line]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("script", "number", "to_group"),
    [
        ("run_preprocess.sh", signal.SIGTERM, False),
        pytest.param("run_preprocess.sh", signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_running_stage(cohort, tmp_path, script, number, to_group):
    """A batch system sends SIGTERM to the launcher's shell only. Ctrl-C reaches the whole process group."""
    folder, _ = cohort
    command = ["sh" if script.endswith("sh") else sys.executable, str(ROOT / "preprocess" / script)]
    more = ["--input-csv", str(folder / "dataset.csv"), "--root-dir", str(tmp_path / "s")]
    if script.endswith("sh"):
        more += ["--atlas-mask", str(folder / "atlas_lung_mask.nii.gz")]
    process = subprocess.Popen(
        [*command, *more, "--method", "threshold", "--num-workers", "2"],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Restore SIGINT, because shells make background commands ignore SIGINT and the tests may run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: list((tmp_path / "s").glob("lung_mask/*.nii.gz")))
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.strip() == "stopped; start again to continue"
    wait_until(lambda: not processes_of(tmp_path / "s"), seconds=10)
    # Every finished mask has a row in the report or an in-progress file.
    made = {path.name.removesuffix(".nii.gz") for path in (tmp_path / "s" / "lung_mask").glob("*.nii.gz")}
    claimed = {path.name for path in (tmp_path / "s" / "report" / ".claims-segment_lung").iterdir()}
    path = tmp_path / "s" / "report" / "segment_lung.csv"
    reported = set(report(tmp_path / "s", "segment_lung").index) if path.exists() else set()
    assert made and made <= claimed | reported


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_two_runs_share_a_report(tmp_path):
    """Runs with different tables, as in a job array, keep each other's rows in the report."""
    from preprocess.report import write_report

    row = {"status": "ok", "seconds": 1.0, "message": ""}
    layout = StoreLayout(tmp_path)
    for sids in ("ab", "cd", "b"):
        write_report(layout, "register", {sid: {"sid": sid, **row} for sid in sids})
    assert list(report(tmp_path, "register").index) == ["a", "b", "c", "d"]


def test_old_leftovers_of_killed_runs_are_removed(tmp_path):
    from misc.files import LEFTOVER_SECONDS, remove_old_partial_files

    names = ("transform/.partial-old", "transform/.partial-new", "patch/.x_patch.npy.12.partial", "patch/x_patch.npy")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if "partial-" in name else path.touch()
        if "new" not in name:
            os.utime(path, (0, time.time() - LEFTOVER_SECONDS - 1))
    remove_old_partial_files(*StoreLayout(tmp_path).dirs_with_files_per_subject)
    assert [name for name in names if (tmp_path / name).exists()] == [names[1], names[3]]


def test_a_slice_replaced_in_a_folder_changes_its_stamp(tmp_path):
    from preprocess.outputs import make_file_stamp

    (tmp_path / "1.dcm").write_bytes(b"a")
    before = make_file_stamp(str(tmp_path))
    assert make_file_stamp(str(tmp_path)) == before
    (tmp_path / "1.dcm").write_bytes(b"b")
    os.utime(tmp_path / "1.dcm", (0, 1))
    assert make_file_stamp(str(tmp_path)) != before


def test_a_few_slices_are_refused(tmp_path, run):
    values = np.full((4, 200, 200), -1000, dtype=np.int16)
    values[:, 50:150, 50:150] = 40
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "thin.nii.gz"))
    (tmp_path / "t.csv").write_text("sid,image\nthin,thin.nii.gz\n")
    flags = ("--input-csv", "t.csv", "--root-dir", "s", "--method", "threshold")
    result = run("preprocess/segment_lung.py", *flags, cwd=tmp_path, check=False)
    assert result.returncode == 1 and "spans 200 x 200 x 4 mm in 4 slices, which is not a whole chest" in result.stdout


def test_a_stage_without_success_fails(tmp_path, run):
    (tmp_path / "t.csv").write_text("sid,image\na,nowhere.nii\n")
    result = run(
        "preprocess/segment_lung.py",
        "--input-csv",
        tmp_path / "t.csv",
        "--root-dir",
        tmp_path / "s",
        "--method=threshold",
        check=False,
    )
    assert result.returncode == 1 and "no subject succeeded" in result.stderr


@pytest.mark.parametrize(
    ("header", "more", "message"),
    [
        ("sid,path", (), "t.csv has no column 'image'; its columns are sid, path"),
        ("sid,image", ("--method", "thresh"), "--method thresh must be lungmask or threshold"),
        ("sid,image", ("--num-workers", "0"), "--num-workers 0 must be a whole number, at least 1"),
        ("sid,image", ("--min-dice", "7x"), "--min-dice 7x must be between 0 and 1"),
        ("sid,image", ("--min-dice", "1.5"), "--min-dice 1.5 must be between 0 and 1"),
        ("sid,image", ("--lungmask-weights", "no.pth"), "--lungmask-weights no.pth does not exist"),
    ],
)
def test_wrong_tables_and_flags_are_refused_before_writing(tmp_path, cohort, run, header, more, message):
    (tmp_path / "t.csv").write_text(f"{header}\na,b\n")
    flags = ("--input-csv", "t.csv", "--root-dir", "s", "--atlas-mask", cohort[0] / "atlas_lung_mask.nii.gz")
    result = run("preprocess/run_preprocess.py", *flags, *more, cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stderr == f"error: {message}\n"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sid,path\na,b\n", "no column 'image'"),
        ("sid,image\na,b\na,c\n", "'a' more than once"),
        ("sid,image\n../a,b\n", "cannot be a file name"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, run, text, message):
    (tmp_path / "t.csv").write_text(text)
    result = run(
        "preprocess/segment_lung.py", "--input-csv", tmp_path / "t.csv", "--root-dir", tmp_path / "s", check=False
    )
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_users_own_mask_is_kept(cohort, tmp_path, run):
    folder, store = cohort
    (tmp_path / "t.csv").write_text(f"sid,image\nmine,{folder}/image/0001.nii.gz\nother,{folder}/image/0002.nii.gz\n")
    target = tmp_path / "s" / "lung_mask"
    target.mkdir(parents=True)
    own = (store / "lung_mask" / "0001.nii.gz").read_bytes()
    for sid in ("mine", "other"):  # the mask fits the scan of "mine"; the scan of "other" has a different grid
        (target / f"{sid}.nii.gz").write_bytes(own)
    run(
        "preprocess/segment_lung.py",
        "--input-csv",
        tmp_path / "t.csv",
        "--root-dir",
        tmp_path / "s",
        "--method",
        "threshold",
    )
    figures = report(tmp_path / "s", "segment_lung")
    assert figures.loc["mine", "status"] == "skipped" and "not on the grid" in figures.loc["other", "message"]
    assert (target / "mine.nii.gz").read_bytes() == own


def test_missing_lungmask_weights_are_explained(cohort, tmp_path, run):
    folder, _ = cohort
    flags = ("--input-csv", folder / "dataset.csv", "--root-dir", tmp_path / "s")
    # A proxy that refuses connections simulates a machine without internet access.
    offline = {
        "TORCH_HOME": str(tmp_path),
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    result = run("preprocess/segment_lung.py", *flags, check=False, env=offline)
    assert (
        result.returncode == 2 and "--lungmask-weights FILE" in result.stderr and "--method threshold" in result.stderr
    )
    assert "Traceback" not in result.stderr
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    result = run("preprocess/segment_lung.py", *flags, "--lungmask-weights", tmp_path / "bad.pth", check=False)
    assert result.returncode == 2 and "bad.pth" in result.stderr and "Traceback" not in result.stderr


def test_lungmask_weights_are_loaded_and_applied(cohort, tmp_path, run):
    """Run lungmask's network with random weights, and compare the mask with the network's output."""
    from lungmask import LMInferer
    from lungmask.resunet import UNet

    from preprocess.scan import read_scan

    folder, _ = cohort
    torch.manual_seed(0)
    network = UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    image = sitk.ReadImage(str(folder / "image" / "0002.nii.gz"))
    image = sitk.DICOMOrient(image, "RAI")
    middle = image.GetSize()[2] // 2
    some = image[:, :, middle : middle + 3]  # only three slices, because the network takes seconds per slice
    some.SetSpacing((*some.GetSpacing()[:2], 20.0))
    sitk.WriteImage(some, str(tmp_path / "a.nii.gz"))
    (tmp_path / "t.csv").write_text("sid,image\na,a.nii.gz\n")
    flags = ("--input-csv", tmp_path / "t.csv", "--root-dir", tmp_path / "s", "--lungmask-weights", tmp_path / "w.pth")
    result = run("preprocess/segment_lung.py", *flags, check=False)
    scan = read_scan(tmp_path / "a.nii.gz")
    wanted = LMInferer(modelpath=str(tmp_path / "w.pth"), tqdm_disable=True).apply(scan)
    figures = report(tmp_path / "s", "segment_lung").loc["a"]
    volumes = [(wanted == label).sum() * np.prod(scan.GetSpacing()) / 1000 for label in (1, 2)]
    if min(volumes) < 1:  # a network with random weights may find only one lung, which is reported
        assert result.returncode == 1 and "no pair of lungs was found" in figures["message"]
        assert f"has only {min(volumes):.1f} ml" in figures["message"]
    else:
        assert result.returncode == 0 and figures["method"].startswith("lungmask-")
        mask = sitk.ReadImage(str(tmp_path / "s" / "lung_mask" / "a.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), wanted)


def test_registration_recovers_a_known_affine(cohort):
    """Move the atlas's lungs by a known affine transform, and check that registration recovers this transform."""
    from types import SimpleNamespace

    from preprocess.register import register_subject
    from preprocess.registration import measure_overlap

    folder, _ = cohort
    atlas_path = folder / "atlas_lung_mask.nii.gz"
    atlas = sitk.Cast(sitk.ReadImage(str(atlas_path)), sitk.sitkUInt8)
    known = sitk.AffineTransform(3)
    known.SetMatrix((1.12, 0.06, 0, -0.05, 0.9, 0.03, 0, 0.02, 1.05))
    centre = atlas.TransformContinuousIndexToPhysicalPoint([n / 2 for n in atlas.GetSize()])
    known.SetCenter(centre)
    known.SetTranslation((9, -14, 25))  # maps atlas points to scan points
    corner = np.array(known.TransformPoint(atlas.GetOrigin()))
    grid = sitk.Image([int(n * 1.35) for n in atlas.GetSize()], sitk.sitkUInt8)
    grid.SetDirection(atlas.GetDirection())
    grid.SetOrigin((corner + np.array([-8, 12, -8])).tolist())
    moved = sitk.Resample(atlas, grid, known.GetInverse(), sitk.sitkNearestNeighbor, 0)
    moved = sitk.Cast(moved == 50, sitk.sitkUInt8) + 2 * sitk.Cast(moved == 100, sitk.sitkUInt8)
    store = folder.parent / "known"
    (store / "lung_mask").mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(moved, str(store / "lung_mask" / "k.nii.gz"))
    figures = register_subject(
        SimpleNamespace(sid="k", image=""),
        {},
        root_dir=str(store),
        atlas_mask=str(atlas_path),
        atlas="x",
        min_dice=0.5,
        overwrite=True,
    )
    assert figures["dice"] > 0.97 and min(figures["dice_right"], figures["dice_left"]) > 0.96
    found = sitk.ReadTransform(str(store / "transform" / "k_Reg_Atlas_Affine_0GenericAffine.mat"))
    labels = np.argwhere(sitk.GetArrayFromImage(atlas) > 0)[::997, ::-1]
    errors = []
    for index in labels:
        point = atlas.TransformIndexToPhysicalPoint([int(v) for v in index])
        errors.append(np.linalg.norm(np.subtract(found.TransformPoint(point), known.TransformPoint(point))))
    assert np.mean(errors) < 1.5  # mm
    assert measure_overlap(atlas, moved, known)["dice"] > 0.98


def test_grouping_resumes_where_it_stopped(tmp_path, make_store, grid, run, monkeypatch):
    import preprocess.group_patches as step

    patches = make_store(tmp_path, 5, grid, grouped=False)
    monkeypatch.setattr(step, "CHUNK_BYTES", 2 * 6 * 65536)  # group two subjects at a time
    monkeypatch.setattr("sys.argv", ["group_patches.py", "--root-dir", str(tmp_path)])
    notes = []
    original = step._write_state_json

    def stop_after_two_chunks(path, content):
        original(path, content)
        notes.append(content)
        if content.get("rows") == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(step, "_write_state_json", stop_after_two_chunks)
    with pytest.raises(KeyboardInterrupt):
        step.main()
    monkeypatch.setattr(step, "_write_state_json", original)
    untouched = os.stat(tmp_path / "grouped_patch" / ".partial" / "patch_loc_0.npy").st_ino
    time.sleep(0.01)
    assert step.main() == 0
    assert os.stat(tmp_path / "grouped_patch" / "patch_loc_0.npy").st_ino == untouched
    store = PatchStore(tmp_path)
    for location in range(6):
        np.testing.assert_array_equal(store.read(location, np.arange(5)), patches[:, location])
    assert "already done" in run("preprocess/group_patches.py", "--root-dir", tmp_path).stdout
    # After one more subject is added, all subjects are grouped again.
    np.save(tmp_path / "patch" / "zz_patch.npy", patches[0])
    run("preprocess/group_patches.py", "--root-dir", tmp_path)
    store = PatchStore(tmp_path)
    assert store.sids[-1] == "zz" and store.num_subjects == 6
    np.testing.assert_array_equal(store.read(2, np.array([5]))[0], patches[0, 2])


@pytest.mark.parametrize("damage", ["short", "exchanged"])
def test_grouping_is_verified_before_old_files_are_replaced(tmp_path, make_store, grid, monkeypatch, capsys, damage):
    import preprocess.group_patches as step

    make_store(tmp_path, 5, grid, grouped=False)
    monkeypatch.setattr("sys.argv", ["group_patches.py", "--root-dir", str(tmp_path)])
    step.main()
    before = {path.name: path.read_bytes() for path in (tmp_path / "grouped_patch").glob("*.npy")}
    shutil.copy(tmp_path / "patch" / "001_patch.npy", tmp_path / "patch" / "009_patch.npy")
    checked = step.Grouping.verify_new_files

    def spoil(grouping):
        for index in range(grouping.count):
            content = bytearray(grouping.get_temporary_path(index).read_bytes())
            if damage == "exchanged":
                start, size = len(grouping.header), grouping.patch_bytes
                content[start : start + 2 * size] = (
                    content[start + size : start + 2 * size] + content[start : start + size]
                )
            grouping.get_temporary_path(index).write_bytes(content[:-10] if damage == "short" else content)
        checked(grouping)

    monkeypatch.setattr(step.Grouping, "verify_new_files", spoil)
    with pytest.raises(StoreError, match=r"is the disk full\?|is not the patch of 000"):
        step.main()
    assert {path.name: path.read_bytes() for path in (tmp_path / "grouped_patch").glob("*.npy")} == before
    assert not (tmp_path / "grouped_patch" / ".partial").exists()
    monkeypatch.setattr(step.Grouping, "verify_new_files", checked)
    assert step.main() == 0 and "6 subjects" in capsys.readouterr().out


def test_two_runs_cannot_group_one_store(tmp_path, make_store, grid, run, run_apart):
    make_store(tmp_path, 5, grid, grouped=False)
    with hold_lock_or_raise(StoreLayout(tmp_path).grouping_lock, "x"):
        result = run_apart("preprocess/group_patches.py", "--root-dir", tmp_path, check=False)
    assert result.returncode == 2 and "the output folder of group_patches.py, is in use by process" in result.stderr
    assert not (tmp_path / "grouped_patch").exists()
    run("preprocess/group_patches.py", "--root-dir", tmp_path)


def test_grouping_stopped_while_renaming_resumes(tmp_path, make_store, grid, run, monkeypatch):
    import preprocess.group_patches as step

    patches = make_store(tmp_path, 3, grid, grouped=False)
    monkeypatch.setattr("sys.argv", ["group_patches.py", "--root-dir", str(tmp_path)])
    original, renamed = os.replace, []

    def stop_at_the_third(source, target):
        if "patch_loc_" in str(target):
            renamed.append(target)
            if len(renamed) == 3:
                raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(step.os, "replace", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        step.main()
    monkeypatch.setattr(step.os, "replace", original)
    assert step.main() == 0
    store = PatchStore(tmp_path)
    for location in range(6):
        np.testing.assert_array_equal(store.read(location, np.arange(3)), patches[:, location])


def test_grouping_unifies_dtypes_layouts_and_names(tmp_path, make_store, grid, run):
    patches = make_store(tmp_path, 1, grid, grouped=False)[0]
    floats = patches.astype(np.float64)
    floats[0, 0, 0, :3] = np.nan, -5000, 17.4
    np.save(tmp_path / "patch" / "Doe,J_patch.npy", floats)
    np.save(tmp_path / "patch" / "f(1)_patch.npy", np.asfortranarray(patches))
    run("preprocess/group_patches.py", "--root-dir", tmp_path)
    store = PatchStore(tmp_path)
    assert store.sids == ["000", "Doe,J", "f(1)"]
    grouped = np.load(tmp_path / "grouped_patch" / "patch_loc_0.npy")
    assert grouped.dtype == np.int16 and grouped[1, 0, 0, :3].tolist() == [-1024, -1024, 17]
    for location in range(6):
        wanted = np.stack([patches[location]] * 3)
        read = store.read(location, np.arange(3))
        if location == 0:
            wanted[1, 0, 0, :3] = read[1, 0, 0, :3]
        np.testing.assert_array_equal(read, wanted)


@pytest.mark.slow
def test_a_newly_failing_subject_does_not_use_old_outputs(cohort, tmp_path, run):
    """If a new mask is bad, the old transform is not used, and later runs still report the failure."""
    folder, _ = cohort
    store, atlas = tmp_path / "s", ("--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    flags = two_subjects(folder, tmp_path)
    run("preprocess/run_preprocess.py", *flags, *atlas, "--method", "threshold", "--no-qc")
    path = store / "lung_mask" / "a.nii.gz"
    mask = sitk.ReadImage(str(path))
    labels = np.zeros_like(sitk.GetArrayFromImage(mask))
    labels[:12, :12, :12], labels[-12:, -12:, -12:] = 1, 2
    wrong = sitk.GetImageFromArray(labels)
    wrong.CopyInformation(mask)
    time.sleep(0.01)
    sitk.WriteImage(wrong, str(path))
    for _ in range(2):
        run("preprocess/register.py", *flags, *atlas, "--min-dice", 0.8)
        assert report(store, "register")["status"].to_dict() == {"a": "failed", "b": "skipped"}
    assert not list((store / "transform").glob("a_*"))
    run("preprocess/patchify_images.py", *flags, *atlas, "--no-qc")
    run("preprocess/group_patches.py", "--root-dir", store)
    assert PatchStore(store).sids == ["b"]


def test_grouping_leaves_out_mismatched_subjects(tmp_path, make_store, grid, run):
    make_store(tmp_path, 2, grid, grouped=False)
    np.save(tmp_path / "patch" / "short_patch.npy", np.zeros((5, 32, 32, 32), dtype=np.int16))
    (tmp_path / "patch" / "torn_patch.npy").write_bytes(b"x")
    result = run("preprocess/group_patches.py", "--root-dir", tmp_path)
    assert "short left out" in result.stderr and "torn left out" in result.stderr
    assert PatchStore(tmp_path).sids == ["000", "001"]


def test_too_little_disk_space_is_refused(tmp_path, monkeypatch):
    from collections import namedtuple

    from preprocess.patchify_images import check_disk_space
    from preprocess.subjects import Subject

    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "total used free")(10**9, 0, 70 * 10**6))
    check_disk_space(tmp_path, [Subject("a", "")], 500, 32)  # 500 patches take 33 MB and are stored twice
    with pytest.raises(StoreError, match=r"need 0\.1 GB, but .* has 0\.1 GB free"):
        check_disk_space(tmp_path, [Subject("a", ""), Subject("b", "")], 500, 32)


def test_an_unreachable_scheduler_is_reported(cohort, tmp_path, run):
    folder, _ = cohort
    result = run(
        "preprocess/segment_lung.py",
        *("--input-csv", folder / "dataset.csv", "--root-dir", tmp_path / "s", "--method", "threshold"),
        *("--scheduler", "nonsense"),
        check=False,
    )
    assert result.returncode == 2 and "--scheduler nonsense" in result.stderr
