"""Describe with numbers how scans were acquired, so that batches can contain similar scans.

If negatives come from another scanner or breath-hold level, the network can distinguish them without looking at the
disease. If all scans in a batch are similar, the network cannot distinguish negatives by differences in acquisition.
Batches of similar scans are not part of the published method. The idea follows BatchSampler (Yang et al., KDD 2023),
which selects hard negatives.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from data.labels import find_filled_cells_and_numbers
from data.layout import StoreError, StoreLayout
from data.tables import read_table, suggest_column

REPORT = "report"  # value of --batch-by that selects columns of the store's reports
MOST_WORDS = 20  # a column with more distinct text values than this is assumed to contain names, not categories


def read_similarity(
    names: Sequence[str], table: str | None, layout: StoreLayout, sids: Sequence[str], note: Callable[[str], None]
) -> np.ndarray:
    """Read columns that describe the scan and the breath-hold: (N, C) with mean 0, NaN where unknown.

    Args:
        names: columns of ``table``; or REPORT, for lung volume, mean density, slice spacing and kernel from the
            store's reports.
        table: CSV with a column sid; None if ``names`` is REPORT.
        layout: layout of the store.
        sids: subjects in the order of the returned rows.
        note: function that receives messages about columns and subjects that are left out.

    Raises:
        StoreError: the table or a column is missing, or all subjects have equal or unknown values.
    """
    if list(names) == [REPORT]:
        columns, source = read_scan_properties_from_reports(layout), f"{layout.root / 'report'}"
    else:
        columns, source = read_table(table, file_names=False).set_index("sid"), str(table)
        unknown = next((name for name in names if name not in columns), None)
        if unknown is not None:
            raise StoreError(
                f"--batch-by {unknown}: {table} does not have this column{suggest_column(unknown, list(columns))}"
            )
        columns = columns[list(names)]
    found = []
    for name, column in columns.reindex(list(sids)).items():
        found += standardize_column(column, f"{source}: column {name!r}", note)
    values = np.stack(found, axis=1) if found else np.zeros((len(sids), 0))
    if not len(found):
        raise StoreError(f"--batch-by: all subjects have equal or unknown values in {source}; choose other columns")
    missing = np.isnan(values).all(axis=1).sum()
    if missing:
        note(f"--batch-by: {source} has no values for {missing} of {len(sids)} subjects; their batches are random")
    return values


def read_scan_properties_from_reports(layout: StoreLayout) -> pd.DataFrame:
    """Read each subject's lung volume, mean lung density, slice spacing and kernel from the reports, if recorded."""
    masks, patches = (_read_report(layout, script) for script in ("segment_lung", "patchify_images"))
    found = {}
    if {"right_ml", "left_ml"} <= set(masks):
        found["volume"] = (pd.to_numeric(masks["right_ml"]) + pd.to_numeric(masks["left_ml"])).astype(str)
    if "lung_hu" in patches:
        found["density"] = patches["lung_hu"]
    if "spacing" in masks:  # for example "0.7 x 0.7 x 1.25", in mm; the last number is the slice spacing
        found["slices"] = masks["spacing"].str.rsplit("x", n=1).str[-1]
    if "kernel" in masks:
        found["kernel"] = masks["kernel"]
    return pd.DataFrame(found)


def _read_report(layout: StoreLayout, script: str) -> pd.DataFrame:
    path = layout.report_path(script)
    return read_table(path, file_names=False).set_index("sid") if path.is_file() else pd.DataFrame()


def standardize_column(column: pd.Series, what: str, note: Callable[[str], None]) -> list[np.ndarray]:
    """Convert a column to arrays (N,) with mean 0.

    A numeric column becomes one array with SD 1. A column with n distinct words becomes n arrays, one per
    word, each with SD 1 / sqrt(n). Constant arrays are left out.
    """
    filled, numbers = find_filled_cells_and_numbers(column.astype(object).where(column.notna(), "").astype(str))
    filled = filled.to_numpy()
    if filled.any() and np.isfinite(numbers[filled]).all():
        given = [numbers.to_numpy(dtype=float)]
    else:
        words = sorted(set(column[filled]))
        if len(words) > MOST_WORDS:
            note(f"{what} left out: it has {len(words)} different texts")
            return []
        given = [np.where(filled, (column == word).to_numpy(dtype=float), np.nan) for word in words]
    found = []
    for values in given:
        sd = np.nanstd(values) if filled.any() else 0.0
        if sd > 0:
            found.append((values - np.nanmean(values)) / sd / np.sqrt(len(given)))
    return found
