"""The synthetic cohort: reproducible, in HU, with the disease it says."""

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from tools.cohort.anatomy import VARIATION, Anatomy, draw_anatomy
from tools.cohort.disease import Disease, draw_disease, plant_disease, simulate_labels
from tools.cohort.phantom import AIR, FAT_HU, Phantom
from tools.cohort.warped import random_diffeomorphism
from tools.make_cohort import make_phantom


def test_same_seed_same_bytes(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    rows = [make_phantom(3, 4, "tiny", tmp_path / folder) for folder in ("a", "b")]
    other = make_phantom(4, 4, "tiny", tmp_path / "c")
    files = [(tmp_path / folder / "image" / "0005.nii.gz").read_bytes() for folder in ("a", "b", "c")]
    assert files[0] == files[1] != files[2] and rows[0] == rows[1] != other


def test_small_phantoms_have_a_mans_chest_wall_and_vary_less():
    for scale in (0.38, 0.62):
        phantom = Phantom(Anatomy(scale=scale, fat=20.0), (1.0, 1.0, 2.0), np.random.default_rng(0))
        middle = phantom.hu[phantom.hu.shape[0] // 2]
        line = middle[middle.shape[0] // 2]
        inside = np.flatnonzero(line > -950)
        fat = line[inside[0] :] == FAT_HU
        assert int(np.argmin(fat)) == pytest.approx(20, abs=1.5)  # mm, from the skin to the muscle
        for face in (phantom.hu[:, 0], phantom.hu[:, :, 0], phantom.hu[:, :, -1]):
            assert (face == AIR).all()  # the field of view holds the body

    def spread(size):
        rng = np.random.default_rng(0)
        drawn = [draw_anatomy(rng, size) for _ in range(200)]
        return np.array([[getattr(one, name) for name in ("width", "heart", "fat", "inflation")] for one in drawn]).std(
            0
        )

    np.testing.assert_allclose(spread("tiny") / spread("full"), VARIATION["tiny"], rtol=1e-6)


def test_cohort_on_disk(cohort):
    folder, _ = cohort
    table, labels = (pd.read_csv(folder / name, dtype={"sid": str}) for name in ("dataset.csv", "labels.csv"))
    assert table["sid"].tolist() == labels["sid"].tolist() == [f"000{i}" for i in range(1, 7)]
    numeric = labels.drop(columns="sid")
    assert all(np.issubdtype(kind, np.number) for kind in numeric.dtypes) and not numeric.isna().any().any()
    assert {
        "FEV1pp",
        "FEV1_FVC",
        "GOLD",
        "survival_years",
        "died",
        "centrilobular_fraction",
        "paraseptal_fraction",
    } <= set(numeric)
    codes, spacings = set(), set()
    for name in table["image"]:
        image = sitk.ReadImage(str(folder / name))
        values = sitk.GetArrayFromImage(image)
        assert image.GetPixelID() == sitk.sitkInt16
        assert values.min() >= -1024 and -1024 <= np.percentile(values, 5) < -950  # air
        assert ((values > -920) & (values < -780)).mean() > 0.05  # parenchyma
        assert ((values > 0) & (values < 90)).mean() > 0.1 and (values > 250).mean() > 0.002  # tissue, bone
        codes.add(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection()))
        spacings.add(image.GetSpacing())
    assert len(codes) >= 4 and len(spacings) == 6
    mask = sitk.ReadImage(str(folder / "atlas_lung_mask.nii.gz"))
    labels = sitk.GetArrayFromImage(mask)
    assert set(np.unique(labels)) == {0, 50, 100} and mask.GetSpacing() == (1.0, 1.0, 1.0)
    sides = [
        np.mean(
            [
                mask.TransformIndexToPhysicalPoint([int(v) for v in index])[0]
                for index in np.argwhere(labels == label)[::500, ::-1]
            ]
        )
        for label in (50, 100)
    ]
    assert sides[0] < sides[1]  # the right lung lies at the lower LPS x


def block(seed=0):
    rng = np.random.default_rng(seed)
    hu = np.full((60, 50, 50), 40.0, dtype=np.float32)
    lung = np.zeros(hu.shape, dtype=np.uint8)
    lung[5:55, 5:45, 5:22] = 1
    lung[5:55, 5:45, 28:45] = 2
    hu[lung > 0] = -860
    return hu, lung, np.array([1.0, 1.0, 1.0]), rng


def test_planted_emphysema_is_what_the_label_says():
    hu, lung, spacing, rng = block()
    truth = plant_disease(hu, lung, spacing, Disease(centrilobular=0.2), 1.0, rng)
    assert truth["centrilobular_fraction"] == pytest.approx(0.2, abs=0.02) and truth["paraseptal_fraction"] == 0
    low = (hu < -920) & (lung > 0)
    assert low.sum() / (lung > 0).sum() == pytest.approx(0.2, abs=0.06)
    assert low[30:].sum() > 2 * low[:30].sum()  # upper zones
    assert (hu[lung == 0] == 40).all()

    hu, lung, spacing, rng = block(1)
    truth = plant_disease(hu, lung, spacing, Disease(paraseptal=0.08), 1.0, rng)
    assert truth["paraseptal_fraction"] > 0.06 and truth["centrilobular_fraction"] == 0
    inner = np.zeros_like(lung, dtype=bool)
    inner[15:45, 15:35, 13:14] = inner[15:45, 15:35, 36:37] = True
    assert (hu[inner] > -900).mean() > 0.95  # subpleural only

    hu, lung, spacing, rng = block(2)
    truth = plant_disease(hu, lung, spacing, Disease(lesion_mm=12.0), 1.0, rng)
    volume = ((hu > -400) & (lung > 0)).sum()
    assert truth["lesion_diameter_mm"] == 12.0 and volume == pytest.approx(np.pi / 6 * 12**3, rel=0.5)


def test_labels_follow_the_disease():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        disease = draw_disease(rng)
        planted = {
            "centrilobular_fraction": disease.centrilobular,
            "paraseptal_fraction": disease.paraseptal,
            "lesion_diameter_mm": disease.lesion_mm,
        }
        rows.append({**planted, **simulate_labels(rng, planted)})
    table = pd.DataFrame(rows)
    burden = table["centrilobular_fraction"] + table["paraseptal_fraction"]
    assert (burden == 0).mean() == pytest.approx(0.3, abs=0.06)
    assert burden.corr(table["FEV1pp"]) < -0.8 and burden.corr(table["FEV1_FVC"]) < -0.8
    assert burden.corr(table["survival_years"]) < -0.15
    assert set(table["GOLD"]) <= {0, 1, 2, 3, 4} and table["FEV1pp"].between(15, 130).all()


def test_deformation_is_smooth_and_invertible():
    rng = np.random.default_rng(0)
    displacement = random_diffeomorphism((60, 64, 68), np.array([1.5, 1.5, 1.5]), rng)
    length = np.sqrt((displacement**2).sum(0))
    assert 2 < length.max() < 12  # mm
    jacobian = np.stack([np.stack(np.gradient(d, 1.5), -1) for d in displacement], -2) + np.eye(3)
    determinant = np.linalg.det(jacobian)
    assert determinant.min() > 0.3 and determinant.max() < 2.5


def test_template_mode(cohort, tmp_path, run):
    folder, store = cohort
    flags = ("--template", folder / "image" / "0002.nii.gz", "--template-mask", store / "lung_mask" / "0002.nii.gz")
    for name in ("a", "b"):
        run("tools/make_cohort.py", "--out-dir", tmp_path / name, "--num-subjects", 2, *flags)
    first = (tmp_path / "a" / "image" / "0001.nii.gz").read_bytes()
    assert first == (tmp_path / "b" / "image" / "0001.nii.gz").read_bytes()
    assert first != (tmp_path / "a" / "image" / "0002.nii.gz").read_bytes()
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a" / "atlas_lung_mask.nii.gz"))))) == {
        0,
        50,
        100,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "no.nii"), "--template no.nii does not exist"),
        (("--num-subjects", 0), "--num-subjects 0: at least 1"),
        (("--out-dir", "file/b"), "--out-dir file/b cannot be made: Not a directory"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_nothing(tmp_path, run_here, flags, message):
    (tmp_path / "file").touch()
    result = run_here("tools/make_cohort.py", "--out-dir", "a", *flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr == f"error: {message}; see --help\n"
    assert not (tmp_path / "a").exists()
