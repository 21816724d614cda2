"""Test that the quality-control page lists suspicious subjects first, with reasons, and can filter them."""

import numpy as np
import pandas as pd
import pytest

from data.layout import StoreLayout
from preprocess.qc_page import read_reports, score_how_unusual_subjects_are, write_qc_page
from tests.browser import browse

SPOILED = {
    "012": {"dice_left": 0.31, "dice": 0.68},  # the left lung was missed; the Dice of both lungs hides this
    "025": {"left_ml": 480.0},  # half of the left lung is missing
    "033": {"lung_hu": -610.0},
    "037": {"voxels_outside": 34 * 32**3 // 4, "centres_in_lungs": 0.35},
}
FAILED = "007"


def write_reports(root, count, spoiled=SPOILED, failed=FAILED):
    """Write the reports of the three stages, with realistic values for ``count`` subjects."""
    rng = np.random.default_rng(0)
    sids = [f"{n:03d}" for n in range(count)]
    right = rng.normal(2800, 450, count).round(1)
    columns = {
        "segment_lung": {"right_ml": right, "left_ml": (right * rng.normal(0.85, 0.03, count)).round(1)},
        "register": {name: rng.normal(0.84, 0.012, count).round(4) for name in ("dice", "dice_right", "dice_left")},
        "patchify_images": {
            "patches": np.full(count, 34),
            "voxels_outside": rng.integers(0, 2000, count),
            "lung_hu": rng.normal(-860, 20, count).round(1),
            "centres_in_lungs": rng.normal(0.6, 0.02, count).round(4),
        },
    }
    (root / "report").mkdir(parents=True)
    for step, figures in columns.items():
        table = pd.DataFrame({"sid": sids, "status": "ok", "seconds": 1.0, "message": "", **figures}).astype(object)
        for sid, values in spoiled.items():
            for name in set(values) & set(table.columns):
                table.loc[table["sid"] == sid, name] = values[name]
        if step != "segment_lung":
            table.loc[table["sid"] == failed, ["status", "message"]] = "failed", "its mask has one <lung> only"
            table.loc[table["sid"] == failed, list(figures)] = ""
        table.to_csv(root / "report" / f"{step}.csv", index=False)


def test_suspicious_subjects_come_first_with_reasons(tmp_path):
    write_reports(tmp_path, 40)
    table = read_reports(StoreLayout(tmp_path))
    judged = score_how_unusual_subjects_are(table).set_index(table["sid"]).sort_values("score", ascending=False)
    assert set(judged.index[:5]) == {FAILED, *SPOILED} and judged.index[0] == FAILED
    assert judged["score"].iloc[5] < 4
    assert "Dice, left 0.31 (usual 0.8" in judged.loc["012", "reasons"]
    assert "right lung share" in judged.loc["025", "reasons"] and "lung, HU -610" in judged.loc["033", "reasons"]
    assert "outside scan 0.25" in judged.loc["037", "reasons"]
    assert judged.loc[FAILED, "reasons"].startswith("register: its mask has one <lung> only")


def test_few_subjects_are_not_compared(tmp_path):
    write_reports(tmp_path, 5, {"003": {"dice": 0.1}}, "none")
    assert (score_how_unusual_subjects_are(read_reports(StoreLayout(tmp_path)))["score"] == 0).all()


def test_a_subject_without_reports_is_listed(tmp_path):
    write_reports(tmp_path, 10, {}, "none")
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "own_patch.npy").touch()
    table = read_reports(StoreLayout(tmp_path)).set_index("sid")
    assert table.loc["own", "status"] == "unfinished" and (table["status"] == "ok").sum() == 10


CLICKS = """
  const names = () => [...byId("rows").children].map((row) => row.cells[0].textContent);
  const first = names().slice(0, 5), reason = byId("rows").rows[0].cells[3].textContent;
  const pictures = byId("rows").querySelectorAll("img").length;
  byId("search").value = "dice, left"; byId("search").oninput();
  const searched = names();
  byId("search").value = ""; byId("search").oninput();
  byId("show").value = "odd"; byId("show").onchange();
  const odd = names();
  byId("show").value = ""; byId("show").onchange();
  [...byId("heads").children].find((head) => head.textContent === "lung, HU").click();
  const sorted = names(), count = byId("count").textContent;
  const bars = byId("plots").querySelectorAll("figure")[7].querySelectorAll("rect");
  bars[bars.length - 1].dispatchEvent(new MouseEvent("click"));
  return { first, reason, pictures, searched, odd, count, last: sorted.pop(), densest: sorted.pop(), ranged: names(),
    ready: document.body.dataset.ready };
"""


def test_clicks(tmp_path, run):
    write_reports(tmp_path, 40)
    (tmp_path / "qc").mkdir()
    (tmp_path / "qc" / "012.png").touch()
    assert str(tmp_path / "qc" / "index.html") in run("tools/qc_page.py", "--root-dir", tmp_path).stdout
    found = browse(tmp_path / "qc" / "index.html", CLICKS)
    assert set(found["first"]) == {FAILED, *SPOILED} and "one <lung> only" in found["reason"]
    assert found["searched"] == ["012"] and set(found["odd"]) == set(SPOILED) and found["pictures"] == 1
    assert found["count"] == "40 of 40 subjects" and found["ready"] == "yes"
    assert found["last"] == FAILED and found["densest"] == "033" and found["ranged"] == ["033"]  # FAILED has no value


def test_ten_thousand_subjects(tmp_path):
    """The page is made within seconds. The browser draws the page within 3 s and filters the subjects within 0.3 s."""
    write_reports(tmp_path, 10_000)
    page = write_qc_page(tmp_path)
    assert page.stat().st_size < 5e6
    script = """
      const times = [];
      for (const text of ["12", "dice", "", "lung"]) {
        const from = performance.now();
        byId("search").value = text; byId("search").oninput();
        times.push(performance.now() - from);
      }
      const from = performance.now();
      byId("heads").children[0].click();
      return { slowest: Math.max(...times), sort: performance.now() - from, rows: byId("rows").children.length,
        opened: performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd };
    """
    found = browse(page, script)
    assert found["rows"] < 200 and found["slowest"] < 300 and found["opened"] < 3000, found


@pytest.mark.parametrize("there", [False, True])
def test_no_store(tmp_path, run_here, there):
    root = tmp_path / "store"
    if there:
        root.mkdir()
    result = run_here("tools/qc_page.py", "--root-dir", root, cwd=tmp_path)
    assert result.returncode == 2 and "no preprocessing report" in result.stderr and not (root / "qc").exists()
