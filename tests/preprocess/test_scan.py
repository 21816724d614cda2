"""Test reading, checking and orienting scans, and compare the patches with the reference's patches."""

import os
from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk

from preprocess.atlas import read_atlas_mask
from preprocess.geometry import find_orientation, orient, pad_with_air, resample_isotropic
from preprocess.patches import cut_patches, map_corners, measure_share_inside
from preprocess.scan import ScanError, check_hounsfield, read_image, read_scan


def scan_image(low=-1000, high=400, dtype=np.int16, shape=(12, 14, 16)):
    """Return an image that is half air, half tissue."""
    values = np.full(shape, low, dtype=dtype)
    values[:, :, : shape[2] // 2] = 40
    values[0, 0, 0] = high
    return sitk.GetImageFromArray(values)


def orientations():
    """Yield all 48 orientation codes: the axes in any order, each in either direction."""
    for order in permutations(("LR", "PA", "SI")):
        for signs in product((0, 1), repeat=3):
            yield "".join(pair[sign] for pair, sign in zip(order, signs))


def test_there_are_48_orientations():
    assert len(set(orientations())) == 48


@pytest.mark.parametrize("suffix", ["nii.gz", "nii", "nrrd", "mha", "mhd"])
def test_formats(tmp_path, suffix):
    image = scan_image()
    image.SetSpacing((0.7, 0.8, 1.5))
    image.SetOrigin((3, -5, 7))
    sitk.WriteImage(image, str(tmp_path / f"scan.{suffix}"))
    read = read_scan(tmp_path / f"scan.{suffix}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(read.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(read.GetOrigin(), image.GetOrigin(), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scan_image(0, 255, np.uint8), "the rescale intercept"),
        (lambda: scan_image(0, 4095), "the rescale intercept"),
        (lambda: sitk.Cast(scan_image() - 400, sitk.sitkFloat32) / 1400, "look rescaled"),
        (lambda: scan_image(7, 7) * 0 + 7, "the image is empty"),
        (lambda: scan_image(-100, 300), "not HU of a chest"),
        (lambda: sitk.Cast(scan_image() / 2, sitk.sitkInt16), "0.0% of the voxels are air"),
        (lambda: scan_image() + 300, "0.0% of the voxels are air"),
    ],
)
def test_values_that_are_not_hounsfield_are_refused(make, message):
    with pytest.raises(ScanError, match=message):
        check_hounsfield(make(), "x.nii")


def test_padding_and_nan_become_air_but_noise_stays():
    values = sitk.GetArrayFromImage(scan_image()).astype(np.float32)
    values[1, 1, :4] = -3024, np.nan, -1100, 40000
    checked = sitk.GetArrayFromImage(check_hounsfield(sitk.GetImageFromArray(values), "x"))
    assert checked[1, 1, :4].tolist() == [-1024, -1024, -1100, 32767] and checked.dtype == np.int16
    values[1, 1, 5] = 12.5
    assert sitk.GetArrayFromImage(check_hounsfield(sitk.GetImageFromArray(values), "x")).dtype == np.float32


def test_unreadable_images(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    sitk.WriteImage(sitk.JoinSeries([scan_image(), scan_image()]), str(tmp_path / "four.nii.gz"))
    sitk.WriteImage(sitk.Compose(scan_image(), scan_image()), str(tmp_path / "colour.nrrd"))
    sitk.WriteImage(scan_image()[:, :, :1], str(tmp_path / "slice.nii.gz"))
    cases = {
        "absent.nii": "does not exist",
        "broken.nii.gz": "cannot be read as an image",
        "empty": "subfolders have no DICOM slices",
        "four.nii.gz": "has 4 dimensions",
        "colour.nrrd": "2 values per voxel",
        "slice.nii.gz": "at least 2 voxels",
    }
    for name, message in cases.items():
        with pytest.raises(ScanError, match=message) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("suffix", ["nii.gz", "nii", "hdr", "hdr.gz", "nrrd", "mha", "mhd"])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_cut_files_are_refused(tmp_path, suffix, share):
    values = np.random.default_rng(0).integers(-1000, 400, (30, 40, 50), dtype=np.int16)  # noise hardly compresses
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / f"scan.{suffix}"), useCompression="gz" in suffix)
    read_scan(tmp_path / f"scan.{suffix}")
    data = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(data, int(data.stat().st_size * share))
    with pytest.raises(ScanError, match="cut short") as caught:
        read_scan(tmp_path / f"scan.{suffix}")
    assert "\n" not in str(caught.value) and str(data) in str(caught.value)


def test_a_damaged_byte_is_noticed(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 400, (30, 40, 50), dtype=np.int16)
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # change the gzip checksum of the complete file
    path.write_bytes(content)
    with pytest.raises(ScanError, match="cut short or damaged"):
        read_scan(path)


def write_dicom(folder, places):
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, place in enumerate(places):
        one = sitk.GetImageFromArray(np.full((1, 8, 9), number - 1000, dtype=np.int16))
        one.SetSpacing((0.7, 0.8, 2.0))
        tags = {
            "0008|0060": "CT",
            "0020|000e": "1.2.3.4",
            "0020|000d": "1.2.3",
            "0008|0018": f"1.2.3.4.{number + 1}",
            "0020|0032": f"-10\\-20\\{place}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            one.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(one)


def test_dicom_folder_and_its_gaps(tmp_path):
    write_dicom(tmp_path / "whole", [0, 2, 4, 6, 8])
    image = read_image(tmp_path / "whole")
    assert image.GetSize() == (9, 8, 5)
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.8, 2.0))
    np.testing.assert_allclose(image.GetOrigin(), (-10, -20, 0))
    (tmp_path / "above").mkdir()
    (tmp_path / "whole").rename(tmp_path / "above" / "series1")
    with pytest.raises(ScanError, match=r"without DICOM slices; .*\(series1\?\)"):
        read_image(tmp_path / "above")
    write_dicom(tmp_path / "gap", [0, 2, 4, 8, 10])
    with pytest.raises(ScanError, match=r"lacks slices: steps between 2\.00 and 4\.00 mm"):
        read_image(tmp_path / "gap")


@pytest.mark.parametrize("size", [0, 100, 300, 0.98])
def test_a_truncated_last_dicom_slice(tmp_path, size):
    write_dicom(tmp_path / "scan", [0, 2, 4, 6, 8])
    (tmp_path / "scan" / "notes.txt").write_text("beside the slices")
    (tmp_path / "scan" / "._4.dcm").write_text("left by a file manager")
    assert read_image(tmp_path / "scan").GetSize() == (9, 8, 5)
    last = tmp_path / "scan" / "4.dcm"
    os.truncate(last, int(last.stat().st_size * size) if size < 1 else size)
    with pytest.raises(ScanError, match=r"cut short or damaged: 4\.dcm$"):
        read_image(tmp_path / "scan")


@pytest.mark.reference
def test_real_dicom_slices(reference):
    image = read_scan(reference.parent / "real" / "dicom")
    assert image.GetSize() == (512, 512, 2)
    values = sitk.GetArrayFromImage(image)
    assert -1500 < values.min() < -1000 and values.max() > 500  # no padding of -2048 remains


def test_orienting_keeps_physical_positions():
    rng = np.random.default_rng(0)
    image = sitk.GetImageFromArray(rng.normal(size=(4, 5, 6)))
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((-7, 11, 13))
    for code in orientations():
        turned = orient(image, code)
        assert find_orientation(turned) == code
        for index in [(0, 0, 0), (5, 4, 3), (2, 1, 3)]:
            point = image.TransformIndexToPhysicalPoint(index)
            assert turned[turned.TransformPhysicalPointToIndex(point)] == image[index]


def test_resampled_size_and_geometry():
    image = scan_image(shape=(10, 11, 12))
    image.SetSpacing((0.75, 0.9, 2.5))
    image.SetOrigin((5, 6, 7))
    iso = resample_isotropic(image)
    assert iso.GetSize() == (int(12 * 0.75), int(11 * 0.9), int(9 * 2.5)) and iso.GetOrigin() == (5, 6, 7)
    padded = pad_with_air(iso)
    assert padded.GetSize() == tuple(n + 120 for n in iso.GetSize())
    assert padded.TransformPhysicalPointToIndex((5, 6, 7)) == (60, 60, 60)
    assert padded[0, 0, 0] == -1024


def test_patch_cutting_equals_a_loop():
    rng = np.random.default_rng(0)
    volume = rng.integers(-1000, 200, (9, 10, 11), dtype=np.int16)
    corners = np.array([[0, 0, 0], [7, 6, 5], [-2, 3, 8], [40, 0, 0], [-4, -4, -4], [10, 9, 8]])
    patches, outside = cut_patches(volume, corners, 4)
    for patch, count, (x0, y0, z0) in zip(patches, outside, corners):
        missing = 0
        for z, y, x in np.ndindex(4, 4, 4):
            place = (z0 + z, y0 + y, x0 + x)
            inside = all(0 <= p < n for p, n in zip(place, volume.shape))
            missing += not inside
            assert patch[z, y, x] == (volume[place] if inside else -1024)
        assert count == missing


def test_share_of_centres_inside():
    labels = np.zeros((20, 20, 20), dtype=np.uint8)
    labels[:, :, :10] = 1
    mask = sitk.GetImageFromArray(labels)
    corners = np.array([[0, 0, 0], [4, 4, 4], [8, 0, 0], [30, 0, 0]])  # patch centres are at x = 2, 6, 10, 32
    assert measure_share_inside(corners, 4, mask, mask) == 0.5


# ------------------------------------------------------------ comparison with reference patches


class Thorax:
    def __init__(self, reference):
        self.raw = sitk.ReadImage(str(reference.parent / "real" / "thorax_ct.nii.gz"))
        self.atlas = read_atlas_mask(reference / "atlas_lung_mask.nii.gz")
        self.table = np.load(reference / "atlas_patch_loc.npy")
        folder = reference / "patches"
        self.transform = sitk.ReadTransform(str(folder / "thorax_Reg_Atlas_Affine_0GenericAffine.mat"))
        self.wanted = np.load(folder / "thorax_patches.npz")

    def check(self, path):
        volume = pad_with_air(resample_isotropic(orient(read_scan(path), find_orientation(self.atlas))))
        values = np.clip(np.rint(sitk.GetArrayFromImage(volume)), -1024, 240).astype(np.int16)
        corners = map_corners(self.table, self.atlas, self.transform, volume)
        np.testing.assert_array_equal(corners, self.wanted["patch_loc"])
        patches, _ = cut_patches(values, corners, 32)
        full = patches[self.wanted["full_index"]].astype(int)
        assert np.abs(full - self.wanted["full"]).max() <= 1
        np.testing.assert_allclose(patches.mean((1, 2, 3)), self.wanted["patch_mean"], atol=0.5)
        np.testing.assert_allclose(patches.std((1, 2, 3)), self.wanted["patch_std"], atol=0.5)


@pytest.fixture(scope="module")
def thorax(reference):
    return Thorax(reference)


def as_offset_uint16(image, path):
    """Write uint16 voxels with the offset in the NIfTI header: scl_slope 1, scl_inter -2000."""
    sitk.WriteImage(sitk.Cast(image + 2000, sitk.sitkUInt16), str(path))
    header = bytearray(path.read_bytes())
    header[112:120] = np.array([1.0, -2000.0], dtype="<f4").tobytes()
    path.write_bytes(header)


@pytest.mark.reference
@pytest.mark.parametrize("code", ["LPS", pytest.param("SPL", marks=pytest.mark.slow)])
def test_reference_patches(thorax, tmp_path, code):
    """Compare patches with reference patches, for the unchanged scan and a scan with permuted and flipped axes."""
    path = tmp_path / "scan.nii"
    sitk.WriteImage(sitk.DICOMOrient(thorax.raw, code), str(path))
    thorax.check(path)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["int16", "int32", "float32", "uint16 with an offset header"])
def test_pixel_types_give_the_same_image(thorax, tmp_path, kind):
    """Every pixel type gives the same image, and therefore the same patches."""
    path = tmp_path / "scan.nii"
    if kind.startswith("uint16"):
        as_offset_uint16(thorax.raw, path)
    else:
        pixel = {"int16": sitk.sitkInt16, "int32": sitk.sitkInt32, "float32": sitk.sitkFloat32}[kind]
        sitk.WriteImage(sitk.Cast(thorax.raw, pixel), str(path))
    read = read_scan(path)
    assert read.GetPixelID() == sitk.sitkInt16
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(thorax.raw))


@pytest.mark.reference
def test_every_orientation_gives_the_same_volume(thorax):
    """Store a scan in all 48 orientations, and compare the reoriented volumes.

    test_reference_patches tests the later preprocessing stages.
    """
    wanted_code = find_orientation(thorax.atlas)
    raw = thorax.raw[::5, ::4, ::3]
    wanted = orient(raw, wanted_code)
    values = sitk.GetArrayFromImage(wanted)
    for code in orientations():
        turned = orient(sitk.DICOMOrient(raw, code), wanted_code)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(turned), values, err_msg=code)
        np.testing.assert_allclose(turned.GetOrigin(), wanted.GetOrigin(), atol=1e-3)
        np.testing.assert_allclose(turned.GetDirection(), wanted.GetDirection(), atol=1e-6)
