"""Write qc/index.html: one page with the reports of all subjects, the most unusual first, with reasons."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.layout import StoreLayout
from misc.page import encode_array_as_base64, make_link, write_page
from misc.sizes import PATCH_SIZE
from preprocess.report import read_previous_rows

STEPS = ("segment_lung", "register", "patchify_images")
FEWEST = 8  # minimum number of subjects for estimating the normal range
STRANGE = 4.0  # limit in robust SDs from the median, usually not exceeded by 40 normal subjects with ten values each


class Figure(NamedTuple):
    """A report value that the page shows."""

    name: str  # name of the report column
    title: str
    low_is_bad: bool
    high_is_bad: bool
    floor: float  # minimum spread over subjects, in the column's unit, so that tiny differences do not raise the score


FIGURES = (
    Figure("right_ml", "right lung, ml", True, True, 10.0),
    Figure("left_ml", "left lung, ml", True, True, 10.0),
    Figure("right_share", "right lung share", True, True, 0.03),
    Figure("dice", "Dice", True, False, 0.01),
    Figure("dice_right", "Dice, right", True, False, 0.015),
    Figure("dice_left", "Dice, left", True, False, 0.015),
    Figure("centres_in_lungs", "patch centres in lungs", True, False, 0.03),
    Figure("lung_hu", "lung, HU", True, True, 25.0),
    Figure("outside", "outside scan", False, True, 0.01),
)
COLUMNS = (*(figure.name for figure in FIGURES), "patches", "voxels_outside")


def read_reports(layout: StoreLayout) -> pd.DataFrame:
    """Merge the reports into one row per subject: status, message, warnings and values (NaN if missing).

    The status is ``failed`` if any stage failed, ``unfinished`` if a stage has no row, else ``ok``. The message joins
    the messages of all failed stages, each preceded by the name of its stage.
    """
    reports = {step: read_previous_rows(layout, step) for step in STEPS}
    sids = sorted({sid for rows in reports.values() for sid in rows} | set(layout.patch_sids()))
    found = []
    for sid in sids:
        rows = {step: rows[sid] for step, rows in reports.items() if sid in rows}
        failed = {step: row.get("message", "") for step, row in rows.items() if row.get("status") == "failed"}
        warnings = [row["warnings"] for row in rows.values() if row.get("warnings")]
        merged = {name: value for row in rows.values() for name, value in row.items()}
        row = {
            "sid": sid,
            "status": "failed" if failed else "ok" if len(rows) == len(STEPS) else "unfinished",
            "message": "; ".join(f"{step}: {message}" for step, message in failed.items()),
            "warnings": "; ".join(warnings),
        }
        found.append(row | {name: merged.get(name) for name in COLUMNS})
    table = pd.DataFrame(found, columns=["sid", "status", "message", "warnings", *COLUMNS])
    for name in COLUMNS:
        table[name] = pd.to_numeric(table[name], errors="coerce").astype(np.float64)
    both = table["right_ml"] + table["left_ml"]
    table["right_share"] = (table["right_ml"] / both.where(both > 0)).round(4)
    table["outside"] = (table["voxels_outside"] / (table["patches"] * PATCH_SIZE**3)).round(5)
    return table


def score_how_unusual_subjects_are(report_table: pd.DataFrame) -> pd.DataFrame:
    """Score how unusual each subject is compared with the others, and list the reasons.

    Returns:
        ``score``: the largest deviation of the subject's values in the unfavourable direction, in robust standard
        deviations (distance from the median, divided by 1.4826 times the median absolute deviation). A failed stage
        adds 1,000 to the score, and a missing stage adds 500.
        ``reasons``: the subject's message, its warnings, and each value that deviates by more than 4 robust standard
        deviations, together with the usual value.
    """
    score, reasons = np.zeros(len(report_table)), [[] for _ in range(len(report_table))]
    for figure in FIGURES:
        values = report_table[figure.name].to_numpy()
        known = ~np.isnan(values)
        if known.sum() < FEWEST:
            continue
        usual = np.median(values[known])
        spread = max(1.4826 * np.median(np.abs(values[known] - usual)), figure.floor)
        away = np.where(known, (values - usual) / spread, 0.0)
        bad = np.maximum(away if figure.high_is_bad else 0, -away if figure.low_is_bad else 0)
        score = np.maximum(score, np.minimum(bad, 99.0))
        for row in np.flatnonzero(bad > STRANGE):
            reasons[row].append(f"{figure.title} {values[row]:.4g} (usual {usual:.4g})")
    status = report_table["status"].to_numpy()
    score = score + np.where(status == "failed", 1000, np.where(status == "unfinished", 500, 0))
    texts = [
        "; ".join(filter(None, [row.message, row.warnings, *own]))
        for row, own in zip(report_table.itertuples(), reasons)
    ]
    return pd.DataFrame({"score": score, "reasons": texts})


def write_qc_page(root_dir: str | Path) -> Path:
    """Write qc/index.html of a store, worst subjects first, and return its path.

    The page links to the pictures by relative paths, so the page stays small and keeps working if the store is moved.
    """
    layout = StoreLayout(root_dir)
    page = layout.qc_page
    table = read_reports(layout)
    judged = score_how_unusual_subjects_are(table)
    order = np.lexsort((table["sid"], -judged["score"]))
    table, judged = table.iloc[order], judged.iloc[order]
    pictures = np.array([layout.qc_picture(sid).is_file() for sid in table["sid"]], dtype=np.uint8)
    data = {
        "sids": table["sid"].tolist(),
        "status": table["status"].tolist(),
        "reasons": judged["reasons"].tolist(),
        "scores": encode_array_as_base64(judged["score"].to_numpy(dtype=np.float32)),
        "pictures": {
            "known": encode_array_as_base64(pictures),
            "folder": make_link(layout.qc_picture("x").parent, page),
        },
        "figures": [
            {"title": figure.title, "values": encode_array_as_base64(table[figure.name].to_numpy(dtype=np.float32))}
            for figure in FIGURES
        ],
        "strange": STRANGE,
    }
    write_page(page, Path(__file__).resolve().parent, "qc_page", f"Preprocessing of {layout.root.resolve().name}", data)
    return page
