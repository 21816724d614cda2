"""Test that the synthetic cohort is reproducible, has values in HU, and contains the disease that its labels state."""

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from misc.files import prepare_resumable_folder
from tools.cohort.anatomy import VARIATION, Anatomy, draw_anatomy
from tools.cohort.disease import SHARE_QUANTILES, Disease, draw_class_shares, draw_disease, plant_disease
from tools.cohort.patient import simulate_patient
from tools.cohort.phantom import AIR, FAT_HU, Phantom
from tools.cohort.scanner import ONE_SCANNER, Acquisition, draw_acquisition, simulate_scanner
from tools.cohort.texture import CLASSES, MODERATE, NORMAL, PANLOBULAR, PARASEPTAL, SEVERE
from tools.cohort.warped import draw_diffeomorphism
from tools.make_cohort import make_phantom, make_subject_once


@pytest.fixture
def phantoms(tmp_path):
    """Make subject 5 with seed 3 (twice), seed 4, and fixed scanner settings; return (folder, rows) for each result."""
    how = {"first": (3, False, True), "again": (3, False, False), "other": (4, True, False), "one": (3, True, True)}
    return {
        name: (tmp_path / name, make_phantom(seed, 4, "tiny", one, maps, tmp_path / name))
        for name, (seed, one, maps) in how.items()
    }


def test_the_same_seed_gives_the_same_bytes(phantoms):
    files = {name: (folder / "image" / "0005.nii.gz").read_bytes() for name, (folder, _) in phantoms.items()}
    assert files["first"] == files["again"] and len(set(files.values())) == 3
    rows = {name: rows for name, (_, rows) in phantoms.items()}
    assert rows["first"] == rows["again"] and rows["one"][0] != rows["other"][0]
    assert not (phantoms["again"][0] / "class").exists()
    folder = phantoms["first"][0]
    image, classes = (sitk.ReadImage(str(folder / kind / "0005.nii.gz")) for kind in ("image", "class"))
    assert image.GetSize() == classes.GetSize() and image.GetDirection() == classes.GetDirection()
    counts = np.bincount(sitk.GetArrayFromImage(classes).ravel(), minlength=7)[1:]
    for name, share in zip(CLASSES, counts / counts.sum()):
        assert rows["first"][0][f"{name}_fraction"] == pytest.approx(share, abs=1e-4)

    # The subjects are the same whether the cohort has one scanner or many.
    (labels, scanned), (with_many, scanned_by_many) = phantoms["one"][1], phantoms["first"][1]
    assert scanned == {"sid": "0005", **ONE_SCANNER._asdict(), "inflation_hu": 0.0} != scanned_by_many
    assert phantoms["other"][1][1] == scanned
    assert labels == with_many  # the scanner does not change the disease
    classes = [sitk.ReadImage(str(phantoms[name][0] / "class" / "0005.nii.gz")) for name in ("one", "first")]
    assert np.array_equal(*(sitk.GetArrayFromImage(image) for image in classes))


def test_a_finished_subject_is_not_made_again(tmp_path):
    made, calls = tmp_path / ".made", []

    def job(seed, index, out_dir):
        calls.append(index)
        if index == 1:
            raise KeyboardInterrupt
        (out_dir / "image").mkdir(exist_ok=True)
        (out_dir / "image" / "0001.nii.gz").touch()
        return {"sid": "0001", "FEV1pp": 0.1 + 0.2}, {"sid": "0001", "died": 1}

    prepare_resumable_folder(made, "flags")
    first = make_subject_once(made, job, 7, 0, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make_subject_once(made, job, 7, 1, tmp_path)
    prepare_resumable_folder(made, "flags")
    assert make_subject_once(made, job, 7, 0, tmp_path) == first and calls == [0, 1]
    prepare_resumable_folder(made, "other flags")
    make_subject_once(made, job, 7, 0, tmp_path)
    assert calls == [0, 1, 0]
    (tmp_path / "image" / "0001.nii.gz").unlink()
    make_subject_once(made, job, 7, 0, tmp_path)
    assert calls == [0, 1, 0, 0]


def test_small_phantoms_have_a_full_chest_wall_and_vary_less():
    for scale in (0.38, 0.62):
        phantom = Phantom(Anatomy(scale=scale, fat=20.0), (1.0, 1.0, 2.0), np.random.default_rng(0))
        middle = phantom.hu[phantom.hu.shape[0] // 2]
        line = middle[middle.shape[0] // 2]
        inside = np.flatnonzero(line > -950)
        fat = line[inside[0] :] == FAT_HU
        assert int(np.argmin(fat)) == pytest.approx(20, abs=1.5)  # the fat's thickness in mm, from skin to muscle
        for face in (phantom.hu[:, 0], phantom.hu[:, :, 0], phantom.hu[:, :, -1]):
            assert (face == AIR).all()  # the whole body is in the field of view

    def spread(size):
        rng = np.random.default_rng(0)
        drawn = [draw_anatomy(rng, size) for _ in range(200)]
        return np.array([[getattr(one, name) for name in ("width", "heart", "fat")] for one in drawn]).std(0)

    np.testing.assert_allclose(spread("tiny") / spread("full"), VARIATION["tiny"], rtol=1e-6)


def test_files_of_a_cohort(cohort):
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
        assert ((values > -980) & (values < -780)).mean() > 0.05  # parenchyma
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
    assert sides[0] < sides[1]  # in LPS, the right lung has the lower x


def block(seed=0):
    rng = np.random.default_rng(seed)
    hu = np.full((60, 50, 50), 40.0, dtype=np.float32)
    lung = np.zeros(hu.shape, dtype=np.uint8)
    lung[5:55, 5:45, 5:22] = 1
    lung[5:55, 5:45, 28:45] = 2
    hu[lung > 0] = -860
    return hu, lung, np.array([1.0, 1.0, 1.0]), rng


def shares(**given):
    wanted = dict.fromkeys(CLASSES, 0.0) | given
    return tuple((wanted | {"normal": 1 - sum(wanted.values())}).values())


def test_subtypes_lie_in_realistic_regions():
    """The reported fraction of each subtype equals the requested fraction. Centrilobular emphysema lies at the apex or,
    if requested, at the base. Panlobular emphysema lies at the base, and paraseptal emphysema at the pleura. There is
    no disease outside the lungs."""
    for upper, more in ((2.0, "upper"), (-2.0, "lower")):
        hu, lung, spacing, rng = block()
        wanted = shares(moderate_centrilobular=0.2, severe_centrilobular=0.05, panlobular=0.1, paraseptal=0.1)
        truth, planted = plant_disease(hu, lung, spacing, Disease(wanted, upper=upper), rng)
        for name, share in zip(CLASSES, wanted):
            assert truth[f"{name}_fraction"] == pytest.approx(share, abs=1e-4), name
        assert truth["emphysema_fraction"] == pytest.approx(0.45, abs=1e-4)
        assert truth["centrilobular_fraction"] == pytest.approx(0.25, abs=1e-4)
        assert (hu[lung == 0] == 40).all() and (planted[lung == 0] == 0).all() and planted[lung > 0].min() == 1
        height = np.broadcast_to(np.arange(60)[:, None, None], lung.shape)
        middle = {kind: height[planted == kind + 1].mean() for kind in (NORMAL, MODERATE, SEVERE, PANLOBULAR)}
        assert (middle[MODERATE] > middle[NORMAL]) == (upper > 0) == (middle[SEVERE] > middle[NORMAL])
        assert middle[PANLOBULAR] < 25
        fractions = [truth[f"{half}_centrilobular_fraction"] for half in ("upper", "lower")]
        assert sum(fractions) == pytest.approx(0.25, abs=1e-4)
        assert truth[f"{more}_centrilobular_fraction"] == max(fractions) > 0.15
        inner = np.zeros_like(lung, dtype=bool)
        inner[17:43, 17:33, 13:14] = inner[17:43, 17:33, 36:37] = True
        assert (planted == PARASEPTAL + 1).sum() > 0 and (planted[inner] == PARASEPTAL + 1).mean() < 0.02


def test_normal_lung_of_a_real_scan_is_kept():
    hu, lung, spacing, rng = block(1)
    _, planted = plant_disease(hu, lung, spacing, Disease(shares(panlobular=0.3)), rng, keep_normal=True, base=-10)
    assert (hu[planted == NORMAL + 1] == -860).all()
    values = hu[planted == PANLOBULAR + 1]
    assert np.median(values[values < -700]) == pytest.approx(-980, abs=12)  # base=-10 lowers the values by 10 HU


def test_reticulation_is_dense_and_lesions_are_round():
    hu, lung, spacing, rng = block(2)
    without = hu.copy()
    truth, _ = plant_disease(hu, lung, spacing, Disease(reticulation=0.2), rng)
    same = plant_disease(without, lung, spacing, Disease(), block(2)[3])[0]
    dense = hu - without
    assert truth["reticulation_fraction"] == pytest.approx(0.2, abs=0.001) and same["reticulation_fraction"] == 0
    assert truth["emphysema_fraction"] == same["emphysema_fraction"]
    assert dense.min() == 0 and (dense[lung > 0] > 100).mean() > 0.01
    assert (dense[5:25] > 100).sum() > 2 * (dense[35:55] > 100).sum()  # more at the base

    hu, lung, spacing, rng = block(3)
    without = hu.copy()
    truth, _ = plant_disease(hu, lung, spacing, Disease(lesion_mm=12.0), rng)
    plant_disease(without, lung, spacing, Disease(), block(3)[3])
    volume = (hu - without > 300).sum()
    assert truth["lesion_diameter_mm"] == 12.0 and volume == pytest.approx(np.pi / 6 * 12**3, rel=0.4)


def test_shares_match_a_smokers_cohort():
    rng = np.random.default_rng(0)
    table = pd.DataFrame([draw_class_shares(rng) for _ in range(2000)], columns=CLASSES)
    np.testing.assert_allclose(table.sum(axis=1), 1)
    assert (table >= 0).all().all()
    quantiles = table.quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    for kind, wanted in SHARE_QUANTILES.items():
        np.testing.assert_allclose(quantiles.iloc[:, kind], wanted[1:-1], atol=0.07)
    np.testing.assert_allclose(quantiles["normal"], (0.04, 0.22, 0.51, 0.72, 0.84), atol=0.09)
    ranks = table.corr(method="spearman")
    for one, two, wanted in (
        ("normal", "moderate_centrilobular", -0.96),
        ("normal", "paraseptal", -0.88),
        ("paraseptal", "moderate_centrilobular", 0.79),
        ("mild_centrilobular", "moderate_centrilobular", 0.29),
        ("mild_centrilobular", "severe_centrilobular", 0.01),
        ("panlobular", "severe_centrilobular", 0.86),
    ):
        assert ranks.loc[one, two] == pytest.approx(wanted, abs=0.12), (one, two)


def draw_subjects(number=1500):
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        disease = draw_disease(rng)
        share = dict(zip((f"{name}_fraction" for name in CLASSES), disease.shares))
        destroyed = share["moderate_centrilobular_fraction"] + share["severe_centrilobular_fraction"]
        upper = destroyed / (1 + np.exp(-2 * disease.upper))
        places = {"upper_centrilobular_fraction": upper, "lower_centrilobular_fraction": destroyed - upper}
        more = {"reticulation_fraction": disease.reticulation, "lesion_diameter_mm": disease.lesion_mm}
        planted = {**share, **places, **more}
        rows.append({**planted, **simulate_patient(rng, planted)})
    return pd.DataFrame(rows)


def test_labels_depend_on_subtype_and_region_and_density():
    table = draw_subjects()
    assert set(table["GOLD"]) == {0, 1, 2, 3, 4} and set(table["emphysema_grade"]) == set(range(6))
    assert set(table["paraseptal_grade"]) == {0, 1, 2}
    assert table["FEV1pp"].between(14, 132).all() and table["FEV1_FVC"].between(0.19, 0.92).all()
    assert 0.2 < table["died"].mean() < 0.8 and table["exacerbations"].max() > 3

    # At equal total emphysema, more emphysema at the base lowers lung function and survival.
    destroyed = table["upper_centrilobular_fraction"] + table["lower_centrilobular_fraction"]
    x = np.column_stack([np.ones(len(table)), destroyed, table["lower_centrilobular_fraction"]])
    for label in (np.log10(table["FEV1pp"]), -table["died"]):
        slopes = np.linalg.lstsq(x, label, rcond=None)[0]
        assert slopes[2] < -0.2
    # Reticulation and mild emphysema affect the labels even if there is little moderate and severe emphysema.
    quiet = table[destroyed < 0.1]
    assert quiet["FEV1pp"].corr(quiet["reticulation_fraction"]) < -0.4
    assert quiet["exacerbations"].corr(quiet["mild_centrilobular_fraction"]) > 0.1


def test_a_scan_has_the_stated_noise_and_slice_thickness():
    spacing, rng = np.array([0.8, 0.8, 1.0]), np.random.default_rng(0)
    hu = np.zeros((40, 60, 60), dtype=np.float32)
    hu[20:] = 100
    thick = hu.copy()
    simulate_scanner(hu, spacing, Acquisition(12.0, 0.5, 0.6, 1.0), rng)
    assert hu[:15].std() == pytest.approx(12, rel=0.1)
    simulate_scanner(thick, spacing, Acquisition(0.001, 0.0, 0.0, 3.0), rng)
    profile = thick.mean((1, 2)) / 100
    assert np.diff(profile).max() < 0.6 and profile[18] > 0.01 and profile[0] < 1e-3  # blurred over three slices
    doses = [draw_acquisition(rng).noise_hu for _ in range(200)]
    assert 0.35 < np.mean(np.array(doses) > 21) < 0.65


def test_deformation_is_smooth_and_invertible():
    rng = np.random.default_rng(0)
    displacement = draw_diffeomorphism((60, 64, 68), np.array([1.5, 1.5, 1.5]), rng)
    length = np.sqrt((displacement**2).sum(0))
    assert 2 < length.max() < 12  # mm
    jacobian = np.stack([np.stack(np.gradient(d, 1.5), -1) for d in displacement], -2) + np.eye(3)
    determinant = np.linalg.det(jacobian)
    assert determinant.min() > 0.3 and determinant.max() < 2.5


@pytest.mark.slow
def test_template_mode(cohort, tmp_path, run):
    folder, store = cohort
    flags = ("--template", folder / "image" / "0002.nii.gz", "--template-mask", store / "lung_mask" / "0002.nii.gz")
    for name, subjects in (("a", 2), ("b", 1)):
        run("tools/make_cohort.py", "--out-dir", tmp_path / name, "--num-subjects", subjects, *flags)
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
        (("--num-subjects", 0), "--num-subjects 0 must be at least 1"),
        (("--out-dir", "file/b"), "--out-dir file/b cannot be created: Not a directory"),
    ],
)
def test_a_wrong_flag_gives_one_line_and_no_files(tmp_path, run_here, flags, message):
    (tmp_path / "file").touch()
    result = run_here("tools/make_cohort.py", "--out-dir", "a", *flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr == f"error: {message}; see --help\n"
    assert not (tmp_path / "a").exists()
