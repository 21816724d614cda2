"""Test the explore page: planted effects appear at their locations, and clicks show the effects."""

import time

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from misc.page import encode_array_as_base64, write_page
from tests.browser import browse
from tools.explore import FOLDER
from tools.pages.numbers import (
    compute_location_importance,
    find_nearest_subjects,
    find_unusual_locations,
    standardize_features,
)
from tools.pages.sides import make_atlas_views

N, D = 60, 6
MARKED = "<b>M&"  # a label name that must not be interpreted as HTML
STORE = "a #store"  # a folder name that must not be interpreted as parts of a URL


@pytest.fixture
def study(tmp_path, grid):
    """Location 4 determines the grade, subject 7 almost equals subject 3, and subject 9 is unusual at location 2."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(N, len(grid), D)).astype(np.float32)
    grade = rng.normal(size=N)
    patches[:, 4, 0] = grade + 0.1 * rng.normal(size=N)
    patches[7] = patches[3] + 0.01
    patches[9, 2] += 6
    sids = [f"{n:03d}" for n in range(N)]
    np.save(tmp_path / "pred_arr_patch_full.npy", patches)
    np.save(tmp_path / "sid_arr_full.npy", np.array(sids))
    features = pd.DataFrame(patches.mean(axis=1), columns=[f"f{n:03d}" for n in range(D)])
    features.insert(0, "sid", sids)
    features.to_csv(tmp_path / "patient_features.csv", index=False)
    labels = {
        "sid": sids,
        "grade": grade.round(4),
        "sex": ["F", MARKED, ""] * 20,
        "note": [f"text {n}" for n in range(N)],
    }
    table = pd.DataFrame({**labels, "healthy": [1] * 9 + [0] * (N - 30) + [1] * 21})
    table.drop(index=5).to_csv(tmp_path / "labels.csv", index=False)
    store = tmp_path / STORE
    (store / "qc").mkdir(parents=True)
    np.save(store / "atlas_patch_loc.npy", grid)
    for sid in (sids[3], sids[7], sids[-1]):
        (store / "qc" / f"{sid}.png").write_bytes(PIXEL)
    mask = np.zeros((70, 70, 90), dtype=np.uint8)
    mask[10:50, 10:60, 5:40], mask[10:50, 10:60, 50:85] = 50, 100
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(tmp_path / "atlas.nii.gz"))
    return tmp_path


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000" + "1f15c4890000000d49444154789c63606060f80f000104010"
    "05fe5c34b0000000049454e44ae426082"
)
FILES = ("--features", "patient_features.csv", "--out", "out/page.html")
ALL = (*FILES, "--labels", "labels.csv", "--patch-features", "pred_arr_patch_full.npy", "--root-dir", STORE)


def test_an_informative_location_is_found(study):
    patches = np.load(study / "pred_arr_patch_full.npy")
    labels = (
        pd.read_csv(study / "labels.csv", dtype={"sid": str})
        .set_index("sid")["grade"]
        .reindex(np.load(study / "sid_arr_full.npy"))
    )
    told = compute_location_importance(patches, labels.to_numpy(dtype=np.float64))
    assert told.argmax() == 4 and told[4] > 0.8 and np.delete(told, 4).max() < 0.3
    assert np.isnan(compute_location_importance(patches, np.ones(N))).all()


def test_importance_equals_ridge_regression():
    """Compare a location's importance with scikit-learn's ridge regression on the same folds, at the best penalty."""
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(1)
    features = rng.normal(size=(50, 1, 5)) * [1, 10, 0.1, 1, 1] + 3
    target = features[:, 0] @ rng.normal(size=5) + rng.normal(size=50)
    x, found = standardize_features(features[:, 0]), []
    for penalty in (0.01, 0.1, 1.0, 10.0):
        predicted = np.zeros(50)
        for fold in np.array_split(np.random.default_rng(0).permutation(50), 5):
            rest = np.setdiff1d(np.arange(50), fold)
            predicted[fold] = Ridge(alpha=penalty * 40).fit(x[rest], target[rest]).predict(x[fold])
        found.append(1 - ((target - predicted) ** 2).sum() / ((target - target.mean()) ** 2).sum())
    assert compute_location_importance(features, target)[0] == pytest.approx(max(found), abs=1e-9)


def test_twins_are_nearest_and_the_unusual_place_first(study):
    patches = np.load(study / "pred_arr_patch_full.npy")
    rows = find_nearest_subjects(standardize_features(patches.mean(axis=1)), 4)
    assert rows.shape == (N, 4) and rows[3, 0] == 7 and rows[7, 0] == 3 and (rows != np.arange(N)[:, None]).all()
    places, scores = find_unusual_locations(patches, np.arange(N) != 9, 3)
    assert places[9, 0] == 2 and scores[9, 0] > 2 * scores[:, 1].max()


@pytest.mark.parametrize("flip", [False, True])
def test_locations_are_drawn_correctly_for_any_atlas_orientation(flip):
    """A location at the upper front of the right lung is drawn at that position, even if the atlas is stored as RAS."""
    mask = np.zeros((40, 50, 60), dtype=np.uint8)
    mask[30:38, 5:15, 4:12], mask[2:9, 5:15, 44:52] = 50, 100
    atlas = sitk.GetImageFromArray(mask)
    corner = np.array([[4, 5, 30]])
    if flip:
        atlas = sitk.DICOMOrient(atlas, "RAS")
        corner = np.array([[60 - 4 - 8, 50 - 5 - 8, 30]])
    front, left, below = make_atlas_views(corner, 8, atlas)
    np.testing.assert_allclose(front["places"][0], [(4 + 4) / 60, 1 - (30 + 4) / 40], atol=1e-6)
    np.testing.assert_allclose(left["places"][0], [(5 + 4) / 50, 1 - (30 + 4) / 40], atol=1e-6)
    np.testing.assert_allclose(below["places"][0], [(4 + 4) / 60, (5 + 4) / 50], atol=1e-6)
    assert front["shape"] == 1.5 and front["image"].startswith("data:image/png;base64,")


CLICKS = """
  const box = byId("map").getBoundingClientRect();
  const click = (row) => byId("map").dispatchEvent(new MouseEvent("click",
    { clientX: box.left + points.x[row], clientY: box.top + points.y[row], bubbles: true }));
  click(3);
  const chosen = byId("chosen").textContent, near = [...byId("nearest").querySelectorAll("button")];
  const images = byId("nearest").querySelectorAll("img").length;
  near[0].click();
  const second = byId("chosen").textContent;
  byId("search").value = "009"; byId("search").onchange({ target: byId("search") });
  const unusual = byId("unusual").querySelector("td").textContent, values = byId("values").innerText;
  byId("search").value = "nobody"; byId("search").onchange({ target: byId("search") });
  const missing = byId("missing").textContent;
  byId("colour").value = "sex"; byId("colour").onchange({ target: byId("colour") });
  const legend = byId("legend").innerText;
  byId("colour").value = "grade"; byId("colour").onchange({ target: byId("colour") });
  choose(sids.length - 1);
  const odd = byId("chosen").textContent, source = byId("picture").querySelector("img")?.src;
  await new Promise((done) => setTimeout(done, 500));
  return { chosen, near: near[0].textContent, images, second, unusual, values, missing, legend, odd, source,
    shown: byId("picture").querySelector("img")?.naturalWidth, where: byId("where-text").textContent,
    ready: document.body.dataset.ready, colours: [...byId("colour").options].map((one) => one.value) };
"""


def test_clicks(study, run):
    shown = run("tools/explore.py", *ALL, "--atlas-mask", "atlas.nii.gz", "--healthy", "healthy", cwd=study)
    assert "60 subjects" in shown.stdout and "column 'note' left out: it has 59 different texts" in shown.stderr
    found = browse(study / "out" / "page.html", CLICKS)
    assert found["chosen"] == "Subject 003" and found["near"] == "007" and found["second"] == "Subject 007"
    assert found["images"] == 1 and found["unusual"] == "location 2" and "F" in found["values"].split()
    assert found["missing"] == "no subject nobody" and found["legend"].split() == [MARKED, "F", "unknown"]
    assert found["odd"] == "Subject 059" and found["shown"] == 1, found["source"]
    assert "R², from 0 (dark) to 0." in found["where"] and found["ready"] == "yes"
    assert found["colours"] == ["", "grade", "sex", "healthy"]


def test_a_page_from_features_only(study, run):
    run("tools/explore.py", *FILES, "--no-tsne", cwd=study)
    script = "choose(0); return { options: byId('which').options.length, text: byId('where-text').textContent };"
    found = browse(study / "out" / "page.html", script)
    assert found["options"] == 1 and "--patch-features" in found["text"]


def test_a_page_of_ten_thousand_subjects_opens_quickly(tmp_path):
    """With ten labels and ten locations per subject, the page is smaller than 5 MB and is drawn quickly."""
    rng, count, places = np.random.default_rng(0), 10_000, 581
    named = [f"label {n}" for n in range(10)]
    values = rng.normal(size=(10, count)).astype(np.float32)
    data = {
        "sids": [f"patient{n:06d}" for n in range(count)],
        "about": "",
        "without": "",
        "maps": [
            {"name": name, "places": encode_array_as_base64(rng.normal(size=(count, 2)).astype(np.float32))}
            for name in "ab"
        ],
        "labels": [
            {"name": name, "values": encode_array_as_base64(own), "names": None, "low": -2, "high": 2}
            for name, own in zip(named, values)
        ],
        "nearest": encode_array_as_base64(rng.integers(count, size=(count, 6)).astype(np.uint32)),
        "pictures": {"known": encode_array_as_base64(np.ones(count, dtype=np.uint8)), "folder": "qc"},
        "importance": [
            {"label": name, "values": encode_array_as_base64(rng.random(places, dtype=np.float32))} for name in named
        ],
        "telling": {
            "places": encode_array_as_base64(rng.integers(places, size=(count, 10)).astype(np.uint16)),
            "scores": encode_array_as_base64(rng.random((count, 10), dtype=np.float32)),
            "healthy": "all",
        },
        "sides": [
            {**side, "places": encode_array_as_base64(side["places"])}
            for side in make_atlas_views(rng.integers(300, size=(places, 3)), 32, None)
        ],
    }
    page = tmp_path / "page.html"
    write_page(page, FOLDER, "explore", "many", data)
    assert page.stat().st_size < 5e6
    began = time.perf_counter()
    found = browse(page, "choose(5); return { ready: document.body.dataset.ready, dots: points.x.length };")
    assert found == {"ready": "yes", "dots": count} and time.perf_counter() - began < 20  # includes the browser's start
    script = "const a = performance.now(); drawMap(); drawSides(); return { took: performance.now() - a, at: a };"
    assert browse(page, script)["took"] < 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--atlas-mask", "atlas.nii.gz"), "--atlas-mask needs --root-dir"),
        (("--healthy", "healthy"), "--healthy needs --labels"),
        (("--out", "patient_features.csv"), "--out patient_features.csv is an input"),
        (("--out", "."), "--out . is a folder"),
        (("--out", "labels.csv/page.html"), "--out: cannot write to"),
        (("--labels", "labels.csv", "--columns", "age"), "labels.csv has no column 'age'; it has grade, sex"),
        (("--labels", "other.csv"), "such as '000'; its sids look like '0'"),
        (("--patch-features", "patches.npy"), "has no features of subject '001'"),
        (
            ("--patch-features", "few.npy", "--root-dir", STORE),
            f"few.npy has 2 locations, but --root-dir {STORE} has 6",
        ),
        (
            ("--labels", "labels.csv", "--patch-features", "pred_arr_patch_full.npy", "--healthy", "sex"),
            "must be 1 (healthy)",
        ),
    ],
)
def test_bad_arguments_are_refused(study, run_here, flags, message):
    (study / "other.csv").write_text("sid,age\n0,3\n")
    if "patches.npy" in flags:
        np.save(study / "patches.npy", np.zeros((1, 6, D), dtype=np.float32))
        np.save(study / "sid_arr_full.npy", np.array(["000"]))
    np.save(study / "few.npy", np.zeros((N, 2, D), dtype=np.float32))
    result = run_here("tools/explore.py", *FILES, *flags, "--no-tsne", cwd=study)
    assert result.returncode and message in result.stderr, result.stderr
    assert not (study / "out").exists() and result.stderr.strip().splitlines()[-1].count("error: ") == 1
