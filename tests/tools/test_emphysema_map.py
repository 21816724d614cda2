"""Test that maps of a simulated label are high where the disease is, and have the geometry of the scan."""

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from models.cnn3d import Encoder
from preprocess.patches import cut_scan
from tools.mapping.truth import format_map_accuracy_table, score_map
from tools.mapping.windows import place_windows_over_lungs, resample_to_scan

from ..conftest import calibrate

LUNGS = {50: (slice(16, 64), slice(16, 48), slice(16, 48)), 100: (slice(16, 64), slice(16, 48), slice(56, 88))}
SHAPE = (80, 64, 104)  # z, y, x
TABLE = np.array([[x, 16, z] for x in (16, 56) for z in (16, 32)], dtype=np.int64)


def image_of(array, origin=(0.0, 0.0, 0.0), spacing=(1.0, 1.0, 1.0)):
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    return image


def atlas_array(right=50, left=100):
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[LUNGS[50]], array[LUNGS[100]] = right, left
    return array


def shift(x, y, z):
    return sitk.TranslationTransform(3, (float(x), float(y), float(z)))


@pytest.mark.parametrize("stride", [5, 8])
def test_a_linear_field_comes_back_on_the_scans_own_grid(stride):
    """If each window's value is the height of its centre, the map shows heights, for any spacing and origin."""
    origin, spacing = (-30.0, 12.0, 100.0), (1.5, 1.0, 2.0)
    atlas = image_of(atlas_array())
    scan = image_of(np.full((40, 64, 70), -850, dtype=np.int16), origin, spacing)
    mask = sitk.Resample(image_of(atlas_array(1, 2), origin), scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    transform = shift(*origin)
    cut = cut_scan(scan, transform, atlas, TABLE, 32)
    windows = place_windows_over_lungs(cut, mask, TABLE, atlas, transform, stride, 32)
    centres = np.array(
        [cut.volume.TransformContinuousIndexToPhysicalPoint((c + 15.5).tolist()) for c in windows.corners]
    )
    result = resample_to_scan(centres[:, 2], windows, cut.volume, scan, mask)
    assert result.GetOrigin() == origin and result.GetSpacing() == spacing
    values, inside = sitk.GetArrayFromImage(result), sitk.GetArrayFromImage(mask) > 0
    heights = np.broadcast_to((origin[2] + 2.0 * np.arange(40))[:, None, None], values.shape)
    assert (values[~inside] == 0).all()
    deep = inside & (heights > origin[2] + 16 + stride) & (heights < origin[2] + 63 - stride)  # not the ends
    assert deep.any() and np.abs(values[deep] - heights[deep]).max() < 0.01
    # Left windows use the encoder of the left locations, and low windows use the encoder of the low locations.
    middle = centres - np.array(origin)
    assert (TABLE[windows.places, 0] == np.where(middle[:, 0] < 52, 16, 56)).all()
    assert set(TABLE[windows.places[middle[:, 2] < 30], 2]) == {16}


def test_metrics_of_known_maps():
    truth = np.zeros((1, 1, 10), dtype=bool)
    truth[..., :2] = True
    mask = np.ones_like(truth)
    perfect = score_map(image_of(truth.astype(np.float32)), truth, mask)
    assert perfect == {"share": 0.2, "average_precision": 1.0, "dice": 1.0}
    # The diseased voxels rank first and third: the precisions are 1 and 2/3, the Dice is 2 * 2/3 / (1 + 2/3).
    scores = np.array([9.0, 7, 8, 6, 5, 4, 3, 2, 1, 0], dtype=np.float32).reshape(1, 1, 10)
    found = score_map(image_of(scores), truth, mask)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2) and found["dice"] == pytest.approx(0.8)
    nothing = score_map(image_of(scores), np.zeros_like(truth), mask)
    assert nothing["share"] == 0 and np.isnan(nothing["average_precision"])


def test_the_summary_interval_is_over_scans():
    rows = [
        {"column": "c", "table": table, "sid": f"{n}", "share": 0.1, "average_precision": value, "dice": 0.5}
        for table, values in (("features", [0.2] * 6), ("density", [0.1, 0.5] * 3), ("none", [np.nan] * 6))
        for n, value in enumerate(values)
    ]
    lines = format_map_accuracy_table(pd.DataFrame(rows)).splitlines()
    assert lines[2] == "| c | features | 6 | 0.10 | 0.20 (0.20 to 0.20) | 0.50 |"
    low, high = map(float, lines[3].split("(")[1].split(")")[0].split(" to "))
    assert "0.30 (" in lines[3] and 0.1 <= low < 0.25 and 0.35 < high <= 0.5
    assert lines[4].startswith("| c | none | 0 | ")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Make a store of sixteen scans with box-shaped lungs. In each scan, one lung is darker at the top or bottom."""
    folder = tmp_path_factory.mktemp("maps")
    atlas = image_of(atlas_array())
    sitk.WriteImage(atlas, folder / "atlas.nii.gz")
    store, rng = folder / "store", np.random.default_rng(0)
    for name in ("grouped_patch", "lung_mask", "transform"):
        (store / name).mkdir(parents=True)
    (folder / "truth").mkdir()
    cut, rows, labels, of_patches = [], [], [], []
    for number in range(16):
        sid, values = f"{number:03d}", np.full(SHAPE, 40, dtype=np.int16)  # a thin wall of 40 HU on all sides
        lungs, dark = atlas_array() > 0, np.zeros(SHAPE, dtype=bool)
        height = int(rng.integers(0, 40))
        box = LUNGS[100 if number % 2 else 50]
        dark[64 - height if number % 3 else 16 : 64 if number % 3 else 16 + height, box[1], box[2]] = True
        noise = rng.uniform(-40, 40, SHAPE)  # with narrower noise, the checks would mistake the lung's peak for air
        values[2:-2, 2:-2, 2:-2] = (-850 + noise)[2:-2, 2:-2, 2:-2]
        values[dark] = (-930 + noise)[dark]
        sitk.WriteImage(image_of(values), folder / f"{sid}.nii.gz")
        sitk.WriteImage(image_of(dark.astype(np.uint8) * 3), folder / "truth" / f"{sid}.nii.gz")
        sitk.WriteImage(image_of(atlas_array(1, 2)), store / "lung_mask" / f"{sid}.nii.gz")
        affine = sitk.AffineTransform(3)
        sitk.WriteTransform(affine, str(store / "transform" / f"{sid}_Reg_Atlas_Affine_0GenericAffine.mat"))
        cut.append(cut_scan(image_of(values), affine, atlas, TABLE, 32).patches)
        dark_there = [dark[z : z + 32, y : y + 32, x : x + 32].mean() for x, y, z in TABLE]
        of_patches += [(sid, place, share) for place, share in enumerate(dark_there)]
        rows.append((sid, f"{sid}.nii.gz"))
        labels.append((sid, dark.sum() / lungs.sum()))
    for place, patches in enumerate(np.stack(cut, axis=1)):
        np.save(store / "grouped_patch" / f"patch_loc_{place}.npy", patches)
    np.save(store / "atlas_patch_loc.npy", TABLE)
    pd.DataFrame(rows, columns=["sid", "image"])[["sid"]].to_csv(store / "subjects.csv", index=False)
    pd.DataFrame([*rows[:3], ("777", "777.nii.gz")], columns=["sid", "image"]).to_csv(folder / "some.csv", index=False)
    pd.DataFrame(labels, columns=["sid", "dark"]).assign(same=1).to_csv(folder / "labels.csv", index=False)
    pd.DataFrame(of_patches, columns=["sid", "patch", "value"]).to_csv(folder / "p.csv", index=False)
    torch.manual_seed(0)
    encoder = Encoder(16, 4, 2, 1)
    calibrate(encoder)
    state = {f"module.encoder_q.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"state_dict": state}, folder / "k.pth.tar")
    torch.save({"state_dict": {**state, "module.queue": torch.zeros(4, 8, 5)}}, folder / "five.pth.tar")
    return folder


GIVEN = (
    *("--root-dir", "store", "--checkpoint", "k.pth.tar", "--labels", "labels.csv", "--column", "dark"),
    *("--input-csv", "some.csv", "--atlas-mask", "atlas.nii.gz", "--no-progress"),
)


def test_planted_disease_is_located(world, run, tmp_path):
    flags = (*GIVEN, "--truth", "truth", "--truth-values", 3, "--out-dir", tmp_path)
    result = run("tools/emphysema_map.py", *flags, cwd=world)
    assert "3 of 4 scans mapped" in result.stdout and "777.nii.gz, but this path does not exist" in result.stderr
    table = pd.read_csv(tmp_path / "maps.csv", dtype={"sid": str})
    assert (table["sid"] == "777").sum() == 1 and table.set_index("sid").loc["777", "status"] == "failed"
    done = table[table["status"] == "ok"].groupby("table")[["share", "average_precision"]].mean()
    for name in ("features", "histogram"):
        assert done.loc[name, "average_precision"] > 2 * done.loc[name, "share"], done
    for sid in ("000", "001", "002"):
        image = sitk.ReadImage(tmp_path / f"{sid}_dark.nii.gz")
        assert image.GetSize() == SHAPE[::-1] and (tmp_path / f"{sid}_dark.png").stat().st_size > 5000

    before = (tmp_path / "000_dark.nii.gz").stat().st_mtime_ns  # a second call makes only the missing maps
    again = run("tools/emphysema_map.py", *flags, cwd=world)
    assert again.stdout == result.stdout and (tmp_path / "000_dark.nii.gz").stat().st_mtime_ns == before
    other = run("tools/emphysema_map.py", *flags, "--stride", 16, cwd=world, check=False)
    assert other.returncode == 2 and "has maps made with a different --stride; give another folder" in other.stderr


@pytest.mark.slow
def test_maps_from_patch_labels(world, run, tmp_path):
    weak = GIVEN.index("--labels")
    flags = (*GIVEN[:weak], "--patch-labels", "p.csv", *GIVEN[weak + 4 :], "--truth", "truth", "--truth-values", 3)
    run("tools/emphysema_map.py", *flags, "--out-dir", tmp_path, cwd=world)
    table = pd.read_csv(tmp_path / "maps.csv")
    done = table[table["table"] == "features"]
    assert set(done["column"]) == {"value"} and (done["average_precision"] > 2 * done["share"]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--column", "same"), "subjects outside --input-csv; fitting needs at least"),
        (("--column", "no"), "labels.csv has no numeric column 'no'; it has dark, same"),
        (("--checkpoint", "five.pth.tar"), "five.pth.tar was trained on 5 locations, but --root-dir"),
        (("--truth", "truth"), "--truth and --truth-values must be given together"),
        (("--patch-labels", "p.csv"), "give either --labels with --column, or --patch-labels"),
    ],
)
def test_bad_arguments_are_refused(world, run_here, tmp_path, flags, message):
    result = run_here("tools/emphysema_map.py", *GIVEN, *flags, "--out-dir", tmp_path / "out", cwd=world)
    assert result.returncode == 2 and message in result.stderr
    assert not list(tmp_path.glob("out/*"))


def test_a_label_in_words(world, run_here, tmp_path):
    """A label column with two different words is read as 0 and 1. A column with three different words needs --order."""
    dark = pd.read_csv(world / "labels.csv", dtype={"sid": str})
    third = np.digitize(dark["dark"], dark["dark"].quantile([1 / 3, 2 / 3]))
    words = dark.assign(grade=np.array(["mild", "light", "severe"])[third], much=np.where(third > 1, "yes", "no"))
    words.assign(number=(third > 1).astype(int)).to_csv(tmp_path / "l.csv", index=False)
    pd.read_csv(world / "some.csv", dtype=str).iloc[:1].assign(
        image=lambda table: [str(world / name) for name in table["image"]]
    ).to_csv(tmp_path / "one.csv", index=False)
    given = ("--labels", tmp_path / "l.csv", "--input-csv", tmp_path / "one.csv")
    refused = run_here("tools/emphysema_map.py", *GIVEN, *given, "--column", "grade", "--out-dir", tmp_path, cwd=world)
    assert refused.returncode == 2 and "for example --order grade=light,mild,severe" in refused.stderr
    asked = ("--column", "much", "number", "grade", "--order", "grade=light,mild,severe", "--stride", 16)
    done = run_here("tools/emphysema_map.py", *GIVEN, *given, *asked, "--out-dir", tmp_path / "o", cwd=world)
    assert done.returncode == 0, done.stderr
    assert "column 'much': 0 is no, 1 is yes" in done.stderr and "0 is light, 1 is mild, 2 is severe" in done.stderr
    maps = pd.read_csv(tmp_path / "o" / "maps.csv").set_index("column")["mean"]
    assert maps["much"] == pytest.approx(maps["number"], rel=1e-9) and maps["grade"] != maps["much"]
