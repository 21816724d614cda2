"""Test NIfTI, NRRD and MetaImage: a consistent header is read; otherwise, an error or a warning names the fault."""

import gzip
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess.scan import limit_threads, load_scan, read_image, read_scan

from .phantoms import array, chest, image_of, nifti, refused, sform_of


@pytest.fixture(scope="module")
def image():
    return chest()


def srow(image, changes=(), scale=1.0):
    """Return the twelve numbers of an sform, some of them changed by the given amounts."""
    form = sform_of(image) * scale
    for place, by in dict(changes).items():
        form[place] += by
    return form.ravel()


HEADERS = {
    "shear in z, both forms": (dict(changes={(1, 2): 0.67}), {}, ("sheared axes (y and z", "15.0 degrees", "tilted")),
    "shear in x, sform only": (dict(changes={(0, 1): 0.3}), dict(qform_code=0), ("sform has sheared axes (x and y",)),
    "a little shear": (dict(changes={(0, 2): 0.02}), {}, ("sheared", "0.5 degrees")),
    "origins apart": (dict(changes={(0, 3): 40}), {}, ("contradict", "up to 40.0 mm")),
    "origins 2 mm apart": (dict(changes={(2, 3): 2}), {}, ("contradict", "up to 2.0 mm")),
    "a side mirrored": (dict(changes={(0, 0): 6.0}), {}, ("contradict",)),
    "sizes apart": (dict(scale=1.1), {}, ("contradict",)),
    "sizes apart, sform only": (dict(scale=1.1), dict(qform_code=0), ("pixdim", "sform")),
    "no numbers": (dict(changes={(0, 3): np.nan}), {}, ("not finite",)),
    "an axis without length": (dict(changes={(2, 2): -2.5}), {}, ("axis of length 0",)),
    "metres": ({}, dict(xyzt_units=1), ("in metres",)),
    "micrometres": ({}, dict(xyzt_units=3), ("in micrometres",)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("kind", HEADERS)
def test_contradictory_headers_are_refused(image, tmp_path, kind, suffix):
    form, fields, words = HEADERS[kind]
    refused(nifti(image, tmp_path / f"scan.{suffix}", srow=srow(image, **form), **fields), *words)


def test_an_incomplete_header_is_a_warning(image, tmp_path):
    none = load_scan(nifti(image, tmp_path / "none.nii", qform_code=0, sform_code=0)).facts["warnings"]
    assert "does not give the patient's orientation (codes of sform and qform are 0)" in none
    bare = image_of(array(image), (1, 1, 1), (0, 0, 0))
    for suffix in ("nii.gz", "nrrd", "mha"):
        sitk.WriteImage(bare, str(tmp_path / f"bare.{suffix}"))
        assert "bare array" in load_scan(tmp_path / f"bare.{suffix}").facts["warnings"]
    half = nifti(image, tmp_path / "half.nii", srow=srow(image, {(1, 3): 0.7}))
    assert "0.70 mm apart" in load_scan(half).facts["warnings"]
    assert load_scan(nifti(image, tmp_path / "plain.nii")).facts["warnings"] == ""


def test_itk_warnings_are_kept_and_the_setting_is_restored(image, tmp_path):
    """The scales of the sform and pixdim differ by less than 0.1 mm over the volume, and ITK issues a warning."""
    path = nifti(image, tmp_path / "scan.nii", pixdim=np.array([1, 3, 3.5, 2.502, 0, 0, 0, 0]))
    limit_threads(1)
    for _ in range(2):
        assert "ITK: " in load_scan(path).facts["warnings"] and "0x" not in load_scan(path).facts["warnings"]
        assert not sitk.ProcessObject.GetGlobalWarningDisplay()


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd"])
@pytest.mark.parametrize(("row", "by"), [(1, 0.25), (0, 0.01)])
def test_sheared_axes_in_other_formats_are_refused(image, tmp_path, suffix, row, by):
    sheared = sitk.Image(image)
    direction = np.eye(3)
    direction[row, 2] = by
    sheared.SetDirection(direction.ravel())
    sitk.WriteImage(sheared, str(tmp_path / f"scan.{suffix}"))
    refused(tmp_path / f"scan.{suffix}", "sheared axes", f"{'xy'[row]} and z")


@pytest.mark.parametrize("scale", [0.001, 10.0])
def test_implausible_lengths_are_refused(image, tmp_path, scale):
    other = image_of(array(image), tuple(length * scale for length in image.GetSpacing()))
    sitk.WriteImage(other, str(tmp_path / "scan.nrrd"))
    refused(tmp_path / "scan.nrrd", "impossible for a CT")


# ------------------------------------------------------------ encodings that give the same volume


def turned(code):
    return lambda image, folder: nifti(sitk.DICOMOrient(image, code), folder / "scan.nii.gz")


def written(name, **how):
    def make(image, folder):
        sitk.WriteImage(image, str(folder / name), **how)
        return folder / name

    return make


def cast(pixel):
    return lambda image, folder: written("scan.nii.gz")(sitk.Cast(image, pixel), folder)


def of_four_dimensions(image, folder):
    sitk.WriteImage(sitk.JoinSeries([image]), str(folder / "scan.nii"))
    return folder / "scan.nii"


def by_its_data_file(image, folder):
    sitk.WriteImage(image, str(folder / "scan.hdr"))
    return folder / "scan.img"


def scaled(image, folder):
    raw = sitk.Cast((image + 2000) * 2, sitk.sitkUInt16)
    return nifti(raw, folder / "scan.nii.gz", scl=[0.5, -2000])


def oblique(image, folder):
    """Write a file whose sform and qform differ by 0.004 mm, as after rounding."""
    return nifti(image, folder / "scan.nii", srow=srow(image, {(0, 3): 0.004}))


def plain_but_named_gz(image, folder):
    sitk.WriteImage(image, str(folder / "a.nii"))
    shutil.move(folder / "a.nii", folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def in_capitals(image, folder):
    return shutil.move(written("scan.nii.gz")(image, folder), folder / "SCAN.NII.GZ")


FORMS = {
    "nii": written("scan.nii"),
    "nii.gz": written("scan.nii.gz"),
    "capitals": in_capitals,
    "sform only": lambda i, f: nifti(i, f / "scan.nii", qform_code=0),
    "qform only": lambda i, f: nifti(i, f / "scan.nii", sform_code=0),
    "another code": lambda i, f: nifti(i, f / "scan.nii", sform_code=2),
    "units unknown": lambda i, f: nifti(i, f / "scan.nii", xyzt_units=0),
    "rounding": oblique,
    "RAS": turned("RAS"),
    "LAS": turned("LAS"),
    "RPI": turned("RPI"),
    "SPL": turned("SPL"),
    "hdr": written("scan.hdr"),
    "hdr.gz": written("scan.hdr.gz"),
    "img": by_its_data_file,
    "scl_slope": scaled,
    "4-D of one volume": of_four_dimensions,
    "int32": cast(sitk.sitkInt32),
    "float32": cast(sitk.sitkFloat32),
    "float64": cast(sitk.sitkFloat64),
    "not packed, though named so": plain_but_named_gz,
    "nrrd": written("scan.nrrd"),
    "nrrd packed": written("scan.nrrd", useCompression=True),
    "nhdr": written("scan.nhdr"),
    "mha": written("scan.mha"),
    "mha packed": written("scan.mha", useCompression=True),
    "mhd": written("scan.mhd"),
}


@pytest.mark.parametrize("form", FORMS)
def test_encodings_of_one_scan(image, tmp_path, form):
    found = sitk.DICOMOrient(read_scan(FORMS[form](image, tmp_path)), "LPS")
    np.testing.assert_array_equal(array(found), array(image))
    np.testing.assert_allclose(found.GetOrigin(), image.GetOrigin(), atol=5e-3)
    np.testing.assert_allclose(found.GetSpacing(), image.GetSpacing(), atol=1e-5)


def test_oblique_headers_are_accepted(image, tmp_path):
    """Test random rotations, including angles near 180 degrees, where a quaternion is least accurate."""
    rng = np.random.default_rng(3)
    for axis in rng.normal(size=(6, 3)):
        for angle in (0.2, 1.5, np.pi - 1e-4):
            turn = sitk.VersorTransform((axis / np.linalg.norm(axis)).tolist(), angle).GetMatrix()
            other = sitk.Image(image)
            other.SetDirection(turn)
            sitk.WriteImage(other, str(tmp_path / "scan.nii"))
            found = read_image(tmp_path / "scan.nii")
            np.testing.assert_allclose(found.GetDirection(), turn, atol=1e-3)


# ------------------------------------------------------------ other file types


def test_files_of_other_types_are_refused(image, tmp_path):
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    for source, name, words in (
        ("a.nii.gz", "packed.nii", "does not end in .gz; rename it to packed.nii.gz"),
        ("a.nii.gz", "nosuffix", "a name that ends in .nii.gz"),
        ("a.nii", "scan.dat", "a name that ends in .nii"),
        ("a.nrrd", "scan", "a name that ends in .nrrd"),
    ):
        shutil.copy(tmp_path / source, tmp_path / name)
        refused(tmp_path / name, words)
    for name, content, words in (
        ("empty.nii", b"", "is empty"),
        ("page.nii.gz", b"<!DOCTYPE html><html>", "a web page"),
        ("scan.nii", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("scan.zip", b"PK\x03\x04" + b"\0" * 100, "unpack it"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)
    second = bytearray(600)
    second[:12] = (540).to_bytes(4, "little") + b"n+2\0\r\n\x1a\n"
    (tmp_path / "second.nii").write_bytes(bytes(second))
    refused(tmp_path / "second.nii", "NIfTI-2")
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "a.nii.gz", "copy it again")
    (tmp_path / "slice.dcm.gz").write_bytes(gzip.compress(b"\0" * 128 + b"DICM" + b"\0" * 500))
    refused(tmp_path / "slice.dcm.gz", "unpack it")
