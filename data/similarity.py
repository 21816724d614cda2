"""What a scan's header and its preprocessing tell of how it was made: numbers that similar scans share.

Negatives from another scanner, or of another breath, are told apart without looking at the disease. In batches of
similar scans they cannot be (unpublished; after BatchSampler, Yang et al., KDD 2023, which does it for hard negatives).
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from data.labels import filled_and_numbers
from data.layout import StoreError, StoreLayout
from data.tables import read_table, spelt

REPORT = "report"  # stands for the columns of the store's own reports
MOST_WORDS = 20  # different texts of a column; more are names, not kinds


def read_similarity(
    names: Sequence[str], table: str | None, layout: StoreLayout, sids: Sequence[str], note: Callable[[str], None]
) -> np.ndarray:
    """Columns that say how subjects were scanned and breathed: (N, C) with mean 0 and SD 1, NaN where unknown.

    Args:
        names: columns of ``table``; or REPORT, for volume, mean density and slice thickness by the store's reports.
        table: CSV with sid; None with REPORT.
        layout: of the store.
        sids: of the rows.
        note: told of what is left out.

    Raises:
        StoreError: no such table or column, or nothing in it tells one subject from another.
    """
    if list(names) == [REPORT]:
        columns, source = _of_report(layout), f"{layout.root / 'report'}"
    else:
        columns, source = read_table(table, file_names=False).set_index("sid"), str(table)
        unknown = next((name for name in names if name not in columns), None)
        if unknown is not None:
            raise StoreError(f"--batch-by {unknown}: {table} has no such column{spelt(unknown, list(columns))}")
        columns = columns[list(names)]
    found = []
    for name, column in columns.reindex(list(sids)).items():
        found += _numbers_of(column, f"{source}: column {name!r}", note)
    values = np.stack(found, axis=1) if found else np.zeros((len(sids), 0))
    if not len(found):
        raise StoreError(f"--batch-by: nothing in {source} tells one subject from another")
    missing = np.isnan(values).all(axis=1).sum()
    if missing:
        note(f"--batch-by: {source} knows nothing of {missing} of {len(sids)} subjects, who go to batches at random")
    return values


def _of_report(layout: StoreLayout) -> pd.DataFrame:
    """Lung volume, mean lung density and slice thickness by sid, as far as the reports have them."""
    masks, patches = (_read_report(layout, script) for script in ("segment_lung", "patchify_images"))
    found = {}
    if {"right_ml", "left_ml"} <= set(masks):
        found["volume"] = (pd.to_numeric(masks["right_ml"]) + pd.to_numeric(masks["left_ml"])).astype(str)
    if "lung_hu" in patches:
        found["density"] = patches["lung_hu"]
    if "spacing" in masks:  # in-plane x in-plane x slices, mm
        found["slices"] = masks["spacing"].str.rsplit("x", n=1).str[-1]
    if "kernel" in masks:
        found["kernel"] = masks["kernel"]
    return pd.DataFrame(found)


def _read_report(layout: StoreLayout, script: str) -> pd.DataFrame:
    path = layout.report(script)
    return read_table(path, file_names=False).set_index("sid") if path.is_file() else pd.DataFrame()


def _numbers_of(column: pd.Series, what: str, note: Callable[[str], None]) -> list[np.ndarray]:
    """A column as numbers with mean 0 and SD 1, (N,); of words one for each. None if all are alike."""
    filled, numbers = filled_and_numbers(column.astype(object).where(column.notna(), "").astype(str))
    filled = filled.to_numpy()
    if filled.any() and np.isfinite(numbers[filled]).all():
        given = [numbers.to_numpy(dtype=float)]
    else:
        words = sorted(set(column[filled]))
        if len(words) > MOST_WORDS:
            note(f"{what} left out, it has {len(words)} different texts")
            return []
        given = [np.where(filled, (column == word).to_numpy(dtype=float), np.nan) for word in words]
    found = []
    for values in given:
        sd = np.nanstd(values) if filled.any() else 0.0
        if sd > 0:
            found.append((values - np.nanmean(values)) / sd / np.sqrt(len(given)))
    return found
