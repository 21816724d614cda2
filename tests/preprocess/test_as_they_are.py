"""Test unusual scans, masks, names and file systems that could be misread without an error."""

import errno
import fcntl
import gzip
import html
import os
import shutil
import struct
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from data.layout import StoreError, StoreLayout
from misc import files, process
from misc.page import write_page
from preprocess.lungs import check_lungs, lung_mask, lung_volumes, measure_air_share
from preprocess.outputs import make_file_stamp
from preprocess.scan import ScanError, load_scan, read_mask
from preprocess.threshold import segment_lungs

from ..conftest import ROOT
from .phantoms import array, chest, image_of
from .test_threshold import dice, phantom

# ---------------------------------------------------------------- files that ITK would read instead of the given file


@pytest.mark.parametrize(
    ("own", "twin"), [("ct.nii.gz", "ct.nii"), ("ct.nii", "ct.nii.gz"), ("ct.hdr", "ct.nii"), ("ct.img", "ct.nii.gz")]
)
def test_a_file_of_the_same_name_in_another_format_is_not_read(tmp_path, own, twin):
    first, second = chest(seed=0), chest(seed=1)
    sitk.WriteImage(second, str(tmp_path / twin))
    sitk.WriteImage(first, str(tmp_path / own))
    assert np.array_equal(array(load_scan(tmp_path / own).image), array(first))
    assert np.array_equal(array(load_scan(tmp_path / twin).image), array(second))


def test_a_mask_of_the_same_name_in_another_format_is_not_read(tmp_path):
    mask = image_of((array(chest()) < -700).astype(np.uint8))
    sitk.WriteImage(mask, str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(mask * 0, str(tmp_path / "a.nii"))
    assert array(read_mask(tmp_path / "a.nii.gz")).any()


# ---------------------------------------------------------------- headers without orientation or voxel size

PLAIN = "type: int16\ndimension: 3\nsizes: {}\nspacings: 3 3.5 2.5\nendian: little\nencoding: raw\n"
DIRECTED = (
    "sizes: {}\nspace directions: (3,0,0) (0,3.5,0) (0,0,2.5)\nspace origin: (1,2,3)\nendian: little\nencoding: raw\n"
)


@pytest.mark.parametrize(
    ("header", "warned"),
    [
        (PLAIN, "it has no space"),
        ("type: int16\ndimension: 3\nspace dimension: 3\n" + DIRECTED, "it has no space"),
        ("type: int16\ndimension: 3\nspace: scanner-xyz\n" + DIRECTED, "space is scanner-xyz"),
        ("type: int16\ndimension: 3\nspace: 3D-right-handed\n" + DIRECTED, "space is 3D-right-handed"),
        ("type: int16\ndimension: 3\nspace: left-posterior-superior\n" + DIRECTED, None),
        ("type: int16\ndimension: 3\nspace: RAS\n" + DIRECTED, None),
    ],
)
def test_a_nrrd_without_patient_axes_is_a_warning(tmp_path, header, warned):
    image = chest()
    text = "NRRD0005\n" + header.format(" ".join(map(str, image.GetSize()))) + "\n"
    (tmp_path / "a.nrrd").write_bytes(text.encode() + array(image).astype("<i2").tobytes())
    said = load_scan(tmp_path / "a.nrrd").facts["warnings"]
    assert ("does not give the patient's orientation" in said) == (warned is not None) and (warned or "") in said


@pytest.mark.parametrize(
    ("dropped", "warned"),
    [
        (("ElementSpacing",), "no voxel sizes (ElementSpacing); 1 mm is assumed"),
        (("TransformMatrix",), "AnatomicalOrientation RAI without TransformMatrix"),
        (("TransformMatrix", "AnatomicalOrientation"), "it has no TransformMatrix"),
        ((), ""),
    ],
)
def test_a_metaimage_without_geometry_is_a_warning(tmp_path, dropped, warned):
    sitk.WriteImage(chest(spacing=(1.5, 1.5, 1.5)), str(tmp_path / "a.mhd"))
    lines = (tmp_path / "a.mhd").read_text().splitlines(keepends=True)
    (tmp_path / "a.mhd").write_text("".join(line for line in lines if not line.startswith(dropped or ("?",))))
    said = load_scan(tmp_path / "a.mhd").facts["warnings"]
    assert warned in said and bool(said) == bool(warned)


def nifti(path, edits):
    """Write a NIfTI file with a qform but no sform, and set the header values in ``edits``."""
    sitk.WriteImage(chest(), str(path))
    content = bytearray(path.read_bytes())
    struct.pack_into("<h", content, 254, 0)
    for offset, kind, value in edits:
        struct.pack_into(kind, content, offset, value)
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize(
    "edits",
    [[(88, "<f", 0.0)], [(88, "<f", float("nan"))], [(80, "<f", 0.0), (84, "<f", 0.0)], [(84, "<f", float("inf"))]],
)
def test_a_nifti_without_a_voxel_size_is_refused(tmp_path, edits):
    with pytest.raises(ScanError, match=r"has no voxel size|not finite"):
        load_scan(nifti(tmp_path / "a.nii", edits))
    assert load_scan(nifti(tmp_path / "b.nii", [])).facts["warnings"] == ""


@pytest.mark.parametrize("offset", [0.0, 100.0, 348.0])
def test_a_voxel_offset_within_the_header_is_refused(tmp_path, offset):
    """If vox_offset is below 352, ITK reads voxels from byte 348; the file's length shows whether they start there."""
    path = nifti(tmp_path / "a.nii", [(108, "<f", offset)])
    with pytest.raises(ScanError, match=rf"begin at byte {offset:g} \(vox_offset\), within the header"):
        load_scan(path)
    content = path.read_bytes()
    path.write_bytes(content[:348] + content[352:])
    assert np.array_equal(array(load_scan(path).image), array(chest()))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels * 0.5, "up to 0.50"),
        (lambda labels: np.where(labels == 1, 1.02, labels), "up to 0.02"),
        (lambda labels: np.where(labels == 1, 0.99607849, labels), None),
        (lambda labels: np.where(labels == 2, 1.9999, labels), None),
    ],
)
def test_masks_with_fractional_labels(tmp_path, change, message):
    labels = np.zeros((6, 8, 8))
    labels[:, 2:6, 1:4], labels[:, 2:6, 5:7] = 1, 2
    sitk.WriteImage(image_of(change(labels).astype(np.float32)), str(tmp_path / "m.nii.gz"))
    if message:
        with pytest.raises(ScanError, match=f"labels {message} away from a whole number"):
            read_mask(tmp_path / "m.nii.gz")
    else:
        assert np.array_equal(array(read_mask(tmp_path / "m.nii.gz")), labels)


def test_a_mask_with_little_air_is_a_warning():
    scan, truth = phantom(0)
    assert measure_air_share(truth, scan) > 0.9 and check_lungs(truth, scan, "m") == []
    for axis in (0, 1):  # flip the mask upside down, then front to back
        turned = sitk.GetImageFromArray(np.flip(array(truth), axis).copy())
        turned.CopyInformation(truth)
        try:
            said = check_lungs(turned, scan, "m")
        except ScanError as error:
            said = [str(error)]
        assert measure_air_share(turned, scan) < 0.85 and any("belong to another scan" in text or "no air" in text
                                                      for text in said)  # fmt: skip


@pytest.mark.parametrize("apart", [False, True])
def test_later_stages_leave_out_a_failed_subject(cohort, tmp_path, run, apart):
    """A failed subject is left out even if its mask, transform and patches exist from an earlier run."""
    folder, made = cohort
    store, table = tmp_path / "s", tmp_path / "t.csv"
    shutil.copytree(made, store)
    images = pd.read_csv(folder / "dataset.csv", dtype=str).set_index("sid")["image"]
    table.write_text("sid,image\n" + "".join(f"{sid},{folder / images[sid]}\n" for sid in ("0001", "0002")))
    mask = sitk.ReadImage(str(store / "lung_mask" / "0001.nii.gz"))
    shutil.rmtree(store / "report")  # without reports, every output counts as the user's own file
    sitk.WriteImage(mask * 3, str(store / "lung_mask" / "0001.nii.gz"))
    flags = ("--input-csv", table, "--root-dir", store, "--no-progress")
    atlas = ("--atlas-mask", folder / "atlas_lung_mask.nii.gz")
    if apart:
        run("preprocess/segment_lung.py", *flags, "--method", "threshold")
        run("preprocess/register.py", *flags, *atlas)
        run("preprocess/patchify_images.py", *flags, *atlas, "--no-qc")
        shown = run("preprocess/group_patches.py", "--root-dir", store, "--no-progress")
    else:
        shown = run("preprocess/run_preprocess.py", *flags, *atlas, "--method", "threshold", "--no-qc")
    for script in ("segment_lung", "register", "patchify_images"):
        row = (
            pd.read_csv(store / "report" / f"{script}.csv", dtype=str, keep_default_na=False)
            .set_index("sid")
            .loc["0001"]
        )
        assert row["status"] == "failed" and "labels above 2" in row["message"], script
    assert "0001 left out: the subject failed in segment_lung" in shown.stderr
    assert "0001" not in (store / "subjects.csv").read_text() and "0002" in (store / "subjects.csv").read_text()


def test_a_modification_time_in_the_future_counts_as_now(tmp_path):
    from preprocess.outputs import _read_earlier_of_mtime_and_ctime_ns

    (tmp_path / "m").write_text("")
    os.utime(tmp_path / "m", (time.time() + 3600,) * 2)
    assert _read_earlier_of_mtime_and_ctime_ns(tmp_path / "m") <= time.time_ns()
    os.utime(tmp_path / "m", (time.time() - 3600,) * 2)
    assert _read_earlier_of_mtime_and_ctime_ns(tmp_path / "m") <= time.time_ns() - 3599 * 10**9


# ---------------------------------------------------------------- air outside the body, and padding


def with_couch(image, thick, foam, width=0.7, gap=0, shell=3.0):
    """Add a couch below the patient (LPS): foam in a shell of -150 HU that is closed in every slice."""
    values, step = array(image).astype(float), image.GetSpacing()[1]
    rows, columns = values.shape[1:]
    below = int((thick + gap + 20) / step)
    values = np.pad(values, ((0, 0), (0, below), (0, 0)), constant_values=-1000)
    start, half, wall = rows + int(gap / step), int(width * columns / 2), max(1, round(shell / step))
    couch = values[:, start : start + int(thick / step), columns // 2 - half : columns // 2 + half]
    couch[:] = -150
    inner = couch[:, wall:-wall, wall:-wall]
    inner[:] = foam + 20 * np.random.default_rng(0).normal(size=inner.shape)
    made = sitk.GetImageFromArray(np.clip(values, -1024, 3071).astype(np.int16))
    made.SetSpacing(image.GetSpacing())
    made.SetOrigin(image.GetOrigin())
    return made, below


@pytest.mark.parametrize(("thick", "foam", "gap"), [(40, -900, 6), (25, -940, 0), (30, -700, 3)])
def test_couch_foam_is_not_lung(thick, foam, gap):
    scan, truth = phantom(0)
    image, below = with_couch(scan, thick, foam, gap=gap)
    mask = array(segment_lungs(image))[:, :-below]
    found = sitk.GetImageFromArray(mask)
    for label in (1, 2):
        assert dice(found, truth, label) > 0.97
    assert not array(segment_lungs(image))[:, -below:].any()


@pytest.mark.parametrize("width", [((0, 7), (0, 9), (0, 11)), ((0, 0), (0, 16), (0, 0)), ((5, 0), (0, 0), (0, 0))])
def test_zeros_at_one_end_are_padding(width, tmp_path):
    scan, _ = phantom(1)
    padded = sitk.GetImageFromArray(np.pad(array(scan), width))
    padded.SetSpacing(scan.GetSpacing())
    sitk.WriteImage(padded, str(tmp_path / "a.nii.gz"))
    found = load_scan(tmp_path / "a.nii.gz")
    assert "are 0: this padding is treated as air" in found.facts["warnings"]
    volumes, wanted = (lung_volumes(lung_mask(image, "threshold"), "m") for image in (found.image, scan))
    assert all(abs(volumes[side] / wanted[side] - 1) < 0.02 for side in wanted)


# ---------------------------------------------------------------- names and disks


def test_names_that_are_not_utf8_are_refused(tmp_path):
    odd = os.fsdecode(b"M\xfcller")
    (tmp_path / odd).mkdir()
    with pytest.raises(StoreError, match="has a name that is not UTF-8"):
        StoreLayout(tmp_path / odd)
    with pytest.raises(ScanError, match="has a name that is not UTF-8"):
        load_scan(tmp_path / odd)
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / f"{odd}.txt").write_text("a stray file")
    assert make_file_stamp(str(tmp_path / "dicom")).startswith("1-")


def test_a_file_system_without_locks_is_noted_once(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(files, "_noted", set())
    with files.wait_for_lock(tmp_path / "a"), files.hold_lock_or_raise(tmp_path / "b", "it"):
        pass
    said = capsys.readouterr().err
    assert said.count("does not support file locks") == 1 and str(tmp_path) in said


@pytest.mark.parametrize("value", ["0", "gpu", "2x", "-1", "1.5", "00"])
def test_an_invalid_ngpus_is_refused(tmp_path, value):
    environment = {**os.environ, "ROOT_DIR": str(tmp_path), "NGPUS": value}
    environment["VENV"] = os.path.dirname(os.path.dirname(os.sys.executable))
    done = subprocess.run(["sh", ROOT / "run_train.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: NGPUS={value} must be a whole number of at least 1"


@pytest.mark.parametrize("name", ["a.NII.GZ", "a.Nii", "a.nii.Gz", "a.MHA", "a.Nrrd"])
def test_upper_case_suffixes_are_read(tmp_path, name):
    sitk.WriteImage(chest(), str(tmp_path / f"b{name[1:].lower()}"))
    (tmp_path / f"b{name[1:].lower()}").rename(tmp_path / name)
    found = load_scan(tmp_path / name)
    assert np.array_equal(array(found.image), array(chest())) and found.facts["warnings"] == ""


def test_a_doubly_gzipped_file_is_refused(tmp_path):
    sitk.WriteImage(chest(), str(tmp_path / "a.nii.gz"))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii.gz").read_bytes()))
    with pytest.raises(ScanError, match="is compressed with gzip twice; unpack it once"):
        load_scan(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("name", ["a.nrrd.gz", "a.mha.gz", "a.nrrd"])
def test_a_gzipped_nrrd_or_metaimage_is_refused_with_advice_that_helps(tmp_path, name):
    whole = tmp_path / f"whole.{name.split('.')[1]}"
    sitk.WriteImage(chest(), str(whole))
    (tmp_path / name).write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(ScanError, match=r"not supported; unpack it with gunzip$"):
        load_scan(tmp_path / name)


@pytest.mark.parametrize("title", ["@data", "a @script b", "<@title>"])
def test_a_folder_named_like_a_template_placeholder(tmp_path, title):
    (tmp_path / "p.html").write_text("<h1>@title</h1><script>@script</script><p>@data</p>")
    (tmp_path / "p.js").write_text("own()")
    write_page(tmp_path / "out.html", tmp_path, "p", title, {"a": title})
    text = (tmp_path / "out.html").read_text()
    assert text.count("own()") == 1 and f"<h1>{html.escape(title)}</h1>" in text


def test_a_console_that_is_not_utf8(tmp_path):
    code = "from misc.command import run, UserError\ndef main():\n    print('R²')\n"
    code += "    raise UserError('Müller')\nrun(main)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [os.sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "R\\xb2\n" and done.stderr == "error: M\\xfcller\n"


def test_slow_bf16_is_measured(monkeypatch):
    """The bfloat16 slowdown is measured only on a CPU, without using torch's global random generator."""
    before = torch.get_rng_state()
    assert process.measure_bf16_slowdown(torch.device("cuda")) == 0
    assert process.measure_bf16_slowdown(torch.device("cpu")) >= 0 and torch.equal(torch.get_rng_state(), before)
    clock = iter([0.0, 1.0, 1.0, 7.0])
    monkeypatch.setattr(process.time, "perf_counter", lambda: next(clock))
    assert process.measure_bf16_slowdown(torch.device("cpu")) == pytest.approx(6)


def test_a_gzipped_nifti_is_read(tmp_path):
    sitk.WriteImage(chest(), str(tmp_path / "a.nii"))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    assert load_scan(tmp_path / "b.nii.gz").facts["warnings"] == ""
