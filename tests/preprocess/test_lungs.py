"""Test the check that a lung mask matches its scan: cut, dense or swapped lungs are reported."""

import subprocess
import sys
import tempfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from misc.command import UserError
from preprocess import geometry
from preprocess.geometry import write_image, write_transform
from preprocess.lungs import _gpu_lock, check_lungs, reserve_gpu
from preprocess.scan import ScanError, read_mask
from preprocess.threshold import segment_lungs

from .test_threshold import phantom

SIDES = {"right": (0, 0), "left": (0, -1), "front": (1, 0), "back": (1, -1), "bottom": (2, 0), "top": (2, -1)}  # LPS


def make_lungs(orientation="LPS", spacing=(2.0, 2.0, 3.0)):
    """Return a scan with two blocks of lung within a body, and the mask of these blocks."""
    labels = np.zeros((40, 60, 80), dtype=np.uint8)  # (z, y, x)
    labels[8:32, 15:45, 10:35], labels[8:32, 15:45, 45:70] = 1, 2
    values = np.where(labels > 0, -860, 40).astype(np.int16)
    images = []
    for array in (labels, values):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        image.SetOrigin((-80.0, 5.0, 100.0))
        images.append(sitk.DICOMOrient(image, orientation))
    return images


def replace_values(image, values):
    made = sitk.GetImageFromArray(values)
    made.CopyInformation(image)
    return made


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "LAS", "SPL"])
def test_correct_lungs_pass_and_exchanged_lungs_do_not(orientation):
    mask, scan = make_lungs(orientation)
    assert check_lungs(mask, scan, "m.nii.gz") == []
    labels = sitk.GetArrayFromImage(mask)
    swapped = replace_values(mask, np.where(labels > 0, 3 - labels, 0).astype(np.uint8))
    with pytest.raises(ScanError, match=r"m.nii.gz has right and left swapped"):
        check_lungs(swapped, scan, "m.nii.gz")


@pytest.mark.parametrize(("hu", "words"), [(20, "left lung has a median of 20 HU, so it contains no air"), (-400, "")])
def test_an_airless_lung_is_refused_and_a_dense_lung_is_a_warning(hu, words):
    mask, scan = make_lungs()
    values = sitk.GetArrayFromImage(scan)
    values[sitk.GetArrayFromImage(mask) == 2] = hu
    if words:
        with pytest.raises(ScanError, match=words):
            check_lungs(mask, replace_values(scan, values), "m")
    else:
        assert check_lungs(mask, replace_values(scan, values), "m") == [
            "the left lung has a median of -400 HU, denser than a normal lung"
        ]


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "RPI"])
@pytest.mark.parametrize("end", SIDES)
def test_a_cut_lung_is_reported_with_its_side(end, orientation):
    mask, scan = make_lungs()
    axis, low = SIDES[end]
    keep = [slice(None)] * 3
    keep[axis] = slice(20, None) if low == 0 else slice(None, -20)
    cut = [sitk.DICOMOrient(image[tuple(keep)], orientation) for image in (mask, scan)]
    said = " ".join(check_lungs(*cut, "m"))
    assert f"cut by the scan's {end} edge (100% of its largest section is there)" in said
    assert not any(f"scan's {other} edge" in said for other in SIDES if other != end)
    if end in ("right", "left"):
        assert f"the {end} lung" in said and said.count("edge") == 1


def test_lungs_of_very_different_size_are_reported():
    mask, scan = make_lungs()
    labels = sitk.GetArrayFromImage(mask)
    labels[13:][labels[13:] == 2] = 0
    assert "one lung is 5 times as large as the other" in check_lungs(replace_values(mask, labels), scan, "m")


@pytest.mark.parametrize("side", ["left", "right", "front"])
def test_thresholding_keeps_a_lung_cut_by_the_field_of_view(side):
    image, _ = phantom(1)
    whole = segment_lungs(image)
    where = np.argwhere(sitk.GetArrayFromImage(whole) > 0)
    keep = [slice(None)] * 3
    keep[0 if side != "front" else 1] = {
        "left": slice(None, int(where[:, 2].max()) - 5),
        "right": slice(int(where[:, 2].min()) + 6, None),
        "front": slice(int(where[:, 1].min()) + 4, None),
    }[side]
    cut, wanted = image[tuple(keep)], sitk.GetArrayFromImage(whole[tuple(keep)])
    mask = segment_lungs(cut)
    found = sitk.GetArrayFromImage(mask)
    for label in (1, 2):
        assert np.sum(found == label) == pytest.approx(np.sum(wanted == label), rel=0.06)
    assert any(f"{side} edge" in sentence for sentence in check_lungs(mask, cut, "m"))


def test_a_cushion_of_lung_density_is_not_lung():
    """The foam below the patient reaches the image's sides in every slice."""
    image = sitk.ConstantPad(phantom(1)[0], (0, 0, 0), (0, 25, 0), -1000)
    values = sitk.GetArrayFromImage(image)
    values[:, -20:] = np.random.default_rng(0).normal(-900, 15, values[:, -20:].shape)
    found, wanted = segment_lungs(replace_values(image, values)), segment_lungs(image)
    assert np.mean(sitk.GetArrayFromImage(found) != sitk.GetArrayFromImage(wanted)) < 1e-3


@pytest.mark.parametrize("part", [0.3, 0.95])
def test_a_full_disk_leaves_no_partial_mask(tmp_path, monkeypatch, part):
    mask, _ = make_lungs()
    writer = sitk.WriteImage

    def half(image, path, **how):
        writer(image, path, **how)
        with open(path, "r+b") as stream:
            stream.truncate(int(stream.seek(0, 2) * part))

    monkeypatch.setattr(geometry.sitk, "WriteImage", half)
    with pytest.raises(
        UserError, match=r"m.nii.gz could not be written completely; check the disk, which has \d+ MB free"
    ):
        write_image(mask, tmp_path / "m.nii.gz")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_image(mask, tmp_path / "m.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(read_mask(tmp_path / "m.nii.gz")), sitk.GetArrayFromImage(mask))


def test_a_full_disk_leaves_no_partial_transform(tmp_path, monkeypatch):
    transform = sitk.AffineTransform(3)
    transform.SetTranslation((1.0, 2.0, 3.0))
    write_transform(transform, tmp_path / "t.mat")
    assert sitk.ReadTransform(str(tmp_path / "t.mat")).GetParameters() == transform.GetParameters()
    (tmp_path / "t.mat").unlink()
    monkeypatch.setattr(geometry.sitk, "WriteTransform", lambda _, path: open(path, "wb").close())
    with pytest.raises(UserError, match=r"t.mat could not be written completely"):
        write_transform(transform, tmp_path / "t.mat")
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_uses_a_gpu_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with reserve_gpu() as gpu:
        assert gpu is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with reserve_gpu() as gpu:
        assert gpu == "cuda:0"
    hold = (
        f"import fcntl, sys\nstream = open({str(_gpu_lock(0))!r}, 'a')\nfcntl.lockf(stream, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with reserve_gpu() as gpu:
            assert gpu == "cuda:1"
        other.stdin.close()
    with reserve_gpu() as gpu:
        assert gpu == "cuda:0"
