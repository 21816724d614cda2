"""Test DICOM folders: one series is read with each slice at its header's position, or an error names the fault."""

import os
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from preprocess.scan import ScanError, load_scan, read_image, read_scan

from .phantoms import array, chest, enhanced, moved, place, refused, save, slices, store


@pytest.fixture(scope="module")
def image():
    return chest()


def assert_same_image(found, image):
    np.testing.assert_array_equal(array(found), array(image))
    np.testing.assert_allclose(found.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(found.GetSpacing(), image.GetSpacing(), atol=1e-5)
    np.testing.assert_allclose(found.GetDirection(), image.GetDirection(), atol=1e-5)


# ------------------------------------------------------------ geometry


def tilted(image, degrees, about="x"):
    """Tilt the gantry: the slice positions still follow the table, but the slice planes are rotated."""
    made, angle = slices(image), np.deg2rad(degrees)
    turn = [1, 0, 0, 0, np.cos(angle), -np.sin(angle)] if about == "x" else [np.cos(angle), 0, -np.sin(angle), 0, 1, 0]
    for d in made:
        d.ImageOrientationPatient = [f"{v:.6f}" for v in turn]
    return made


def thick_then_thin(image):
    """Keep every second slice of the first 16, and all later slices, so that the spacing changes."""
    return [d for k, d in enumerate(slices(image)) if k > 15 or k % 2 == 0]


def drifting(image):
    made = slices(image)
    for k, d in enumerate(made):
        moved(d, 0, 0, 0.004 * k * k)
    return made


def jump(image):
    made = slices(image)
    for d in made[12:]:
        moved(d, 4, -3, 0)
    return made


def without(numbers):
    return lambda image: [d for k, d in enumerate(slices(image)) if k not in numbers]


def changed(start, **tags):
    def make(image):
        made = slices(image)
        for d in made[start:]:
            for name, value in tags.items():
                setattr(d, name, value)
        return made

    return make


def smaller_matrix(image):
    return slices(image)[:20] + slices(image[:-2], **{})[20:]


def lost(name, only=slice(None)):
    def make(image):
        made = slices(image)
        for d in made[only]:
            delattr(d, name)
        return made

    return make


def near_duplicate(by):
    def make(image):
        made = slices(image)
        again = slices(image)[7]
        moved(again, 0, 0, by)
        return [*made, again]

    return make


def one_place(image):
    made = slices(image)
    for d in made:
        place(d, (0, 0, 0))
    return made


def wrong_number(image):
    made = slices(image)
    made[3].PixelSpacing = [0, 3]
    return made


GEOMETRY = {
    "tilt of 1 degree": (lambda i: tilted(i, 1), ("tilted gantry", "1.0 degrees", "IM0001")),
    "tilt of 20 degrees": (lambda i: tilted(i, -20), ("tilted gantry", "20.0 degrees")),
    "tilt about the other axis": (lambda i: tilted(i, 8, "y"), ("tilted gantry", "8.0 degrees")),
    "thin at the end": (thick_then_thin, ("steps between 2.50 and 5.00 mm", "first between IM0000.dcm and IM0001.dcm")),
    "drifting steps": (drifting, ("unevenly spaced slices",)),
    "a missing slice": (without([11]), ("lacks slices: steps between 2.50 and 5.00 mm", "IM0010.dcm and IM0011.dcm")),
    "missing slices": (without([4, 5, 20]), ("lacks slices", "7.50 mm", "IM0003.dcm and IM0004.dcm")),
    "a jump sideways": (jump, ("IM0012.dcm is shifted sideways", "5.0 mm")),
    "pixel spacing": (changed(17, PixelSpacing=["3.6", "3.1"]), ("pixel spacing of 3.6 x 3.1", "IM0017.dcm")),
    "pixel spacing of one": (changed(29, PixelSpacing=["3.5", "3.01"]), ("pixel spacing", "IM0029.dcm")),
    "matrix": (smaller_matrix, ("matrix of 34 x 40", "IM0020.dcm")),
    "orientation of some": (
        changed(25, ImageOrientationPatient=["1", "0", "0", "0", "0.999848", "0.017452"]),
        ("orientation", "IM0025.dcm", "1.00 degrees"),
    ),
    "rows": (changed(0, ImageOrientationPatient=["1", "0", "0", "0.05", "0.99875", "0"]), ("not orthogonal", "2.87")),
    "rows by a little": (changed(0, ImageOrientationPatient=["1", "0", "0", "0.003", "0.9999955", "0"]), ("not orth",)),
    "no vectors": (changed(0, ImageOrientationPatient=["2", "0", "0", "0", "1", "0"]), ("vectors have lengths",)),
    "no positions": (lost("ImagePositionPatient"), ("no position (0020,0032)", "IM0000.dcm")),
    "no position in one": (lost("ImagePositionPatient", slice(6, 7)), ("1 of 30 slices have no position", "IM0006")),
    "no orientation": (lost("ImageOrientationPatient"), ("no orientation (0020,0037)",)),
    "no pixel spacing": (lost("PixelSpacing"), ("no pixel spacing (0028,0030)",)),
    "a slice twice": (near_duplicate(0), ("two slices at the same position (IM0007.dcm and IM0030.dcm",)),
    "a slice nearly twice": (near_duplicate(0.2), ("the same position (IM0007.dcm and IM0030.dcm, 0.20 mm",)),
    "a slice between two": (near_duplicate(1.2), ("unevenly spaced slices", "IM0007.dcm and IM0030.dcm")),
    "all at one place": (one_place, ("all 30 slices are at the same position",)),
    "no pixels' size": (wrong_number, ("IM0003.dcm has pixels of 0 x 3 mm",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", GEOMETRY)
def test_slices_off_a_regular_grid_are_refused(image, tmp_path, kind):
    make, words = GEOMETRY[kind]
    refused(save(make(image), tmp_path / "scan"), *words)


@pytest.mark.parametrize("digits", [0.04, 0.09])
def test_rounded_positions_are_accepted(image, tmp_path, digits):
    made = slices(image)
    rng = np.random.default_rng(1)
    for d in made:
        moved(d, 0, 0, rng.uniform(-digits, digits))
    found = read_scan(save(made, tmp_path / "scan"))
    np.testing.assert_array_equal(array(found), array(image))
    for k, d in enumerate(made):
        own = np.array(d.ImagePositionPatient, dtype=float)
        assert np.linalg.norm(own - found.TransformIndexToPhysicalPoint((0, 0, k))) < 0.1


# ------------------------------------------------------------ encodings that give the same volume


def turned(image, code):
    return slices(sitk.DICOMOrient(image, code))


def syntax(uid, dtype="<u2"):
    def make(image):
        made = slices(image)
        for d, plane in zip(made, array(image)):
            d.file_meta.TransferSyntaxUID = uid
            store(d, plane, dtype=dtype)
        return made

    return make


def rle(image):
    made = slices(image)
    for d in made:
        d.compress(RLELossless)
    return made


def signed(image):
    made = slices(image, PixelRepresentation=1, RescaleIntercept="0")
    for d, plane in zip(made, array(image)):
        store(d, plane, 0, "<i2")
    return made


def other_intercepts(image):
    """Give each slice a different rescale intercept, and some slices a different slope."""
    made = slices(image)
    for k, (d, plane) in enumerate(zip(made, array(image))):
        d.RescaleIntercept = str(-1024 - k)
        store(d, plane, -1024 - k)
        if k % 3 == 1:
            d.RescaleSlope = "0.5"
            store(d, 2 * (plane.astype(int) + 1024 + k), 0)
    return made


def extra_slices(**tags):
    """Return a function that makes CT slices and, in the same series, further slices with other DICOM tags."""

    def make(image):
        return slices(image) + slices(image + 50, **tags)

    return make


def scout(image):
    tags = dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"])
    return slices(image) + slices(image[:, :, :1], **tags)


def tags(**values):
    return lambda image: slices(image, **values)


def implicit_without_preamble(image):
    return syntax(ImplicitVRLittleEndian)(image)


def sequential(image):
    """Give each group of three slices its own acquisition number, as sequential scanners do."""
    made = slices(image)
    for k, d in enumerate(made):
        d.AcquisitionNumber = k // 3
    return made


def monitor(image):
    """Add a bolus-tracking series, for which the scanner table does not move."""
    return slices(image) + slices(image, series="1.2.3.9")[5:6] * 1


def hollow(name, value):
    """Set a DICOM element that some scanners leave empty or write in an unusual form."""
    return tags(**{name: value})


FORMS = {
    "plain": slices,
    "implicit": implicit_without_preamble,
    "big endian": syntax(ExplicitVRBigEndian, ">u2"),
    "deflated": syntax(DeflatedExplicitVRLittleEndian),
    "run lengths": rle,
    "signed pixels": signed,
    "reversed": lambda i: slices(i)[::-1],
    "shuffled": lambda i: [slices(i)[k] for k in np.random.default_rng(0).permutation(i.GetSize()[2])],
    "prone": lambda i: turned(i, "RAS"),
    "rows reversed": lambda i: turned(i, "RPI"),
    "feet first": lambda i: turned(i, "RPI"),
    "coronal": lambda i: turned(i, "LSP"),
    "sagittal": lambda i: turned(i, "PSL"),
    "intercepts of their own": other_intercepts,
    "negative SpacingBetweenSlices": tags(SpacingBetweenSlices="-2.5"),
    "wrong SliceThickness": tags(SliceThickness="5"),
    "no SliceThickness": tags(SliceThickness=None),
    "no kernel, a tilt of 0": tags(GantryDetectorTilt="0"),
    "derived": tags(ImageType=["DERIVED", "SECONDARY", "AXIAL"]),
    "no RescaleType": tags(RescaleType=""),
    "sequential acquisitions": sequential,
    "a localizer in the series": scout,
    "PET beside": extra_slices(Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128", SeriesInstanceUID="1.2.9"),
    "segmentation beside": extra_slices(Modality="SEG", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),
    "secondary captures beside": extra_slices(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", SeriesInstanceUID="1.2.8"),
    "screen saves beside": extra_slices(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"], SeriesInstanceUID="1.2.7"),
    "iodine map beside": extra_slices(RescaleType="MGML", SeriesInstanceUID="1.2.6"),
    "MIP beside": extra_slices(ImageType=["DERIVED", "SECONDARY", "MIP"], SeriesInstanceUID="1.2.5"),
    "bolus tracking beside": monitor,
    "enhanced": lambda i: [enhanced(i)],
    "enhanced, frames shuffled": lambda i: [enhanced(i, np.random.default_rng(2).permutation(i.GetSize()[2]))],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_encodings_of_one_scan(image, tmp_path, form):
    folder = save(FORMS[form](image), tmp_path / "scan")
    assert_same_image(sitk.DICOMOrient(read_scan(folder), "LPS"), image)


def test_file_names_and_other_files_are_ignored(image, tmp_path):
    folder = save(slices(image), tmp_path / "scan", name=lambda k: f"{(k * 7919) % 97:02d}")
    (folder / "notes.txt").write_text("beside the slices")
    (folder / "._01.dcm").write_text("left by a file manager")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "sub").mkdir()
    assert_same_image(read_scan(folder), image)
    shutil.copytree(folder, tmp_path / "bare")
    for path in (tmp_path / "bare").iterdir():  # older software writes no preamble and no file meta information
        if path.is_file() and path.name[0].isdigit():
            d = pydicom.dcmread(path)
            del d.file_meta, d.preamble
            d.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
            assert path.read_bytes()[128:132] != b"DICM"
    assert_same_image(read_scan(tmp_path / "bare"), image)


# ------------------------------------------------------------ series


def make_two_volumes(image, **tags):
    return slices(image, SeriesDescription="INSP", ConvolutionKernel="B30f") + slices(image + 50, **tags)


MIXTURES = {
    "two series": (dict(series="1.2.3.5", SeriesDescription="EXP"), "EXP", "2 CT series", "EXP"),
    "two kernels": (dict(ConvolutionKernel="B70f", SeriesDescription="INSP"), "B70f", "kernel B30f, B70f", "B70f"),
    "two numbers": (dict(SeriesNumber=2, SeriesDescription="INSP"), "2", "kernel B30f, none", "number 2"),
    "two phases": (
        dict(TemporalPositionIdentifier=2, SeriesDescription="INSP", ConvolutionKernel="B30f"),
        "phase 2",
        "phase none, 2",
        "phase 2",
    ),
    "two acquisitions": (
        dict(AcquisitionNumber=7, SeriesDescription="INSP", ConvolutionKernel="B30f"),
        "acquisition 7",
        "acquisition none, 7",
        "30 slices, 2.50 mm apart",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("shift", [0, 1.25])
def test_two_volumes_are_listed_and_chosen(image, tmp_path, kind, shift):
    tags, name, *words = MIXTURES[kind]
    made = make_two_volumes(image, **tags)
    for d in made[30:]:
        moved(d, 0, 0, shift)
    folder = save(made, tmp_path / "scan")
    refused(folder, "column `series`", "INSP", *words)
    chosen = load_scan(folder, name)
    np.testing.assert_array_equal(array(chosen.image), array(image) + 50)
    assert chosen.facts["size"] == "42 x 34 x 30" and chosen.facts["spacing"] == "3 x 3.5 x 2.5"
    with pytest.raises(ScanError, match="no CT series called 'absent'"):
        read_scan(folder, "absent")


def test_several_words_select_one_series(image, tmp_path):
    made = make_two_volumes(image, series="1.2.3.5", SeriesDescription="EXP", ConvolutionKernel="B30f")
    folder = save([*made, *slices(image + 9, ConvolutionKernel="B70f")], tmp_path / "scan")
    with pytest.raises(ScanError, match="2 CT series called 'B30f'"):
        read_image(folder, "B30f")
    facts = load_scan(folder, " 1.2.3.5; b30F ").facts
    assert (facts["series"], facts["kernel"], facts["series_uid"]) == ("1 EXP", "B30f", "1.2.3.5")


def test_the_report_lists_left_out_files(image, tmp_path):
    made = scout(image) + slices(image, Modality="PT", series="1.9")
    facts = load_scan(save(made, tmp_path / "scan"), "").facts
    assert facts["left_out"] == "30 PT, 1 localizer" and facts["warnings"] == ""
    folder = save(slices(image, Modality="MR"), tmp_path / "mr")
    refused(folder, "no CT slices, only 30 MR")


def test_an_undeclared_localizer_is_refused(image, tmp_path):
    coronal = slices(image[:, :, :1], ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"])
    refused(save(slices(image) + coronal, tmp_path / "scan"), "IM0030.dcm", "orientation", "localizer")


# ------------------------------------------------------------ paths to series and files


def test_paths_that_are_not_a_series_are_refused(image, tmp_path):
    folder = save(slices(image), tmp_path / "study" / "ST0" / "SE0")
    refused(tmp_path / "study", "(ST0/SE0?)")
    refused(folder / "IM0003.dcm", "one slice of a series; give its folder", str(folder))
    save(slices(image), tmp_path / "study" / "ST0" / "SE1")
    refused(tmp_path / "study", "ST0/SE0, ST0/SE1")
    index = pydicom.Dataset()
    index.file_meta = pydicom.dataset.FileMetaDataset()
    index.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    index.file_meta.MediaStorageSOPInstanceUID = "1.2"
    index.save_as(tmp_path / "study" / "DICOMDIR", enforce_file_format=True)
    refused(tmp_path / "study", "ST0/SE0, ST0/SE1")
    refused(tmp_path / "study" / "DICOMDIR", "a list of files", "ST0/SE0")
    pet = save(slices(image, Modality="PT"), tmp_path / "pet") / "IM0000.dcm"
    refused(pet, "not a CT slice: PT")


def test_an_enhanced_file_given_by_name(image, tmp_path):
    folder = save([enhanced(image)], tmp_path / "scan")
    assert_same_image(read_scan(folder / "IM0000.dcm"), image)
    frames = enhanced(image)
    del frames.PerFrameFunctionalGroupsSequence[11]
    refused(save([frames], tmp_path / "short"), "30 frames, but positions for 29")
    two_phases = [enhanced(image), enhanced(image + 20)]
    refused(save(two_phases, tmp_path / "two"), "2 volumes are mixed")
    shifted = enhanced(image)
    for frame in shifted.PerFrameFunctionalGroupsSequence[10:]:
        moved(frame.PlanePositionSequence[0], 0, 0, 2.5)
    refused(save([shifted], tmp_path / "gap"), "lacks slices", "frame 10 and IM0000.dcm, frame 11")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("form", ["plain", "run lengths", "deflated", "big endian"])
def test_truncated_slices_are_named(image, tmp_path, form, share):
    folder = save(FORMS[form](image), tmp_path / "scan")
    victim = folder / "IM0029.dcm"
    os.truncate(victim, int(victim.stat().st_size * share))
    refused(folder, "cut short or damaged: IM0029.dcm")


# ------------------------------------------------------------ padding


@pytest.mark.parametrize(
    ("sign", "stored", "tag"),
    [(0, 63536, 63536), (1, -2000, -2000), (0, 65535, 65535), (0, 3000, 3000), (1, 0, 0), (0, 1064, 1064)],
)
def test_padding_of_any_value_becomes_air(image, tmp_path, sign, stored, tag):
    """The voxels outside an ellipse have a padding value above all HU, below all HU, or in the HU range of tissue."""
    y, x = np.mgrid[-1:1:34j, -1:1:42j]
    outside = x**2 + y**2 > 1
    intercept = 0 if sign else -1024
    made = slices(image, PixelRepresentation=sign, RescaleIntercept=str(intercept))
    wanted = np.where(outside, -1024, array(image))
    for d, plane in zip(made, array(image)):
        values = plane.astype(int) - intercept
        values[outside] = stored
        d.PixelData = values.astype("<i2" if sign else "<u2").tobytes()
        d.add_new(0x00280120, "SS" if sign else "US", tag)
    found = array(read_scan(save(made, tmp_path / "scan")))
    assert (found == wanted).mean() > 0.995  # a few scan voxels next to the padding may have the padding's value
    np.testing.assert_array_equal(found[:, outside], -1024)


# ------------------------------------------------------------ the command


def test_the_table_selects_a_series_and_the_report_records_it(image, tmp_path, run):
    import pandas as pd

    big = chest((40, 60, 70), spacing=(4.0, 4.5, 5.0))
    made = slices(big, SeriesDescription="INSP") + slices(big, series="1.2.3.5", SeriesDescription="EXP")
    save([*made, *scout(big)[-1:]], tmp_path / "scan")
    sitk.WriteImage(big, str(tmp_path / "bare.nii.gz"))
    rows = "a,scan,EXP\nb,scan,\nc,scan,insp\nd,bare.nii.gz,\n"
    (tmp_path / "t.csv").write_text("sid,image,series\n" + rows)
    flags = ("--input-csv", tmp_path / "t.csv", "--root-dir", tmp_path / "s", "--method", "threshold")
    out = run("preprocess/segment_lung.py", *flags).stdout
    report = pd.read_csv(tmp_path / "s/report/segment_lung.csv", dtype=str, keep_default_na=False).set_index("sid")
    assert report.status.to_dict() == {"a": "ok", "b": "failed", "c": "ok", "d": "ok"}, out
    assert "2 CT series" in report.message["b"] and "EXP" in report.message["b"]
    columns = ["series", "series_uid", "spacing", "size", "left_out"]
    assert report.loc["a", columns].tolist() == ["1 EXP", "1.2.3.5", "4 x 4.5 x 5", "70 x 60 x 40", "1 localizer"]
    (tmp_path / "t.csv").write_text("sid,image,series\n" + rows.replace("c,scan,insp", "c,scan,EXP"))
    run("preprocess/segment_lung.py", *flags)
    again = pd.read_csv(tmp_path / "s/report/segment_lung.csv", dtype=str, keep_default_na=False).set_index("sid")
    assert again.status.to_dict() == {"a": "skipped", "b": "failed", "c": "ok", "d": "skipped"}
    assert again.series.to_dict() == {"a": "1 EXP", "b": "", "c": "1 EXP", "d": ""}
