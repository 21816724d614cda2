"""Test batches of similar scans: how table columns are read and how batches are composed."""

import numpy as np
import pandas as pd
import pytest

from data.layout import StoreError, StoreLayout
from data.sampler import LocationBatchSampler
from data.similarity import read_similarity

N = 24
SIDS = [f"{row:03d}" for row in range(N)]


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"sid": SIDS[::-1], "noise": rng.normal(20, 5, N), "kernel": ["B30f", "B70s"] * 12, "same": [1] * N}
    frame = pd.DataFrame(rows).astype(str)
    frame.loc[3, "noise"] = ""
    frame["name"] = [f"n{row}" for row in range(N)]
    frame.iloc[:-2].to_csv(tmp_path / "t.csv", index=False)  # drop the last two rows, subjects 001 and 000
    return tmp_path / "t.csv"


def test_similarity_from_table_columns(table):
    notes = []
    found = read_similarity(["noise", "kernel", "same", "name"], table, StoreLayout(table.parent), SIDS, notes.append)
    frame = pd.read_csv(table, dtype={"sid": str}).set_index("sid").reindex(SIDS)
    noise = frame["noise"].to_numpy()
    wanted = (noise - np.nanmean(noise)) / np.nanstd(noise)
    np.testing.assert_allclose(found[:, 0], wanted)
    assert found.shape == (N, 3) and np.isnan(found[:2]).all() and np.isnan(found[20, 0]) and not np.isnan(found[20, 1])
    kernel = (frame["kernel"] == "B30f").to_numpy()[2:]
    assert (found[2:, 1][kernel] > 0).all() and (found[2:, 1][~kernel] < 0).all()
    # The two columns made from a text column have a total variance of 1, like one numeric column.
    np.testing.assert_allclose(np.nanvar(found[:, 1]) + np.nanvar(found[:, 2]), 1)
    assert len(notes) == 2 and "22 different texts" in notes[0] and "has no values for 2 of 24" in notes[1]


def test_similarity_from_the_stores_reports(tmp_path):
    layout = StoreLayout(tmp_path)
    layout.report_path("x").parent.mkdir(parents=True)
    spacing = [f"0.8 x 0.8 x {1 + row % 3}" for row in range(N)]
    rows = {"sid": SIDS, "status": "ok", "right_ml": range(N), "left_ml": 5, "spacing": spacing, "kernel": ""}
    pd.DataFrame(rows).to_csv(layout.report_path("segment_lung"), index=False)
    rows = {"sid": SIDS, "status": "ok", "lung_hu": range(0, -N, -1)}
    pd.DataFrame(rows).to_csv(layout.report_path("patchify_images"), index=False)
    found = read_similarity(["report"], None, layout, SIDS, print)
    assert found.shape == (N, 3)
    np.testing.assert_allclose(found[:, 0], -found[:, 1])
    assert found[0, 2] == found[3, 2] < found[1, 2] < found[2, 2]
    with pytest.raises(StoreError, match=r"all subjects have equal or unknown values in .*report"):
        read_similarity(["report"], None, StoreLayout(tmp_path / "other"), SIDS, print)


def test_a_missing_column_is_refused(table):
    with pytest.raises(StoreError, match=r"--batch-by nose: .* does not have this column.*noise"):
        read_similarity(["nose"], table, StoreLayout(table.parent), SIDS, print)


def sampler(similarity, rank=0, world=1, seed=3):
    made = LocationBatchSampler(N - 1, 40, 4, seed, rank, world, similarity=similarity)
    made.set_epoch(2)
    return made


def test_batches_contain_similar_subjects():
    rng = np.random.default_rng(1)
    scans = rng.normal(size=(N - 1, 2))
    near, random = (
        np.mean([np.var(scans[index.rows], axis=0).mean() for index in sampler(given)]) for given in (scans, None)
    )
    assert near < 0.8 * random


def test_subjects_meet_many_others_on_any_number_of_ranks():
    rng = np.random.default_rng(1)
    scans = rng.normal(size=(N - 1, 2))
    scans[5] = np.nan
    met, left_out = np.zeros((N - 1, N - 1), dtype=int), np.zeros(N - 1, dtype=int)
    by_location = {}
    for index in sampler(scans):
        met[np.ix_(index.rows, index.rows)] += 1
        by_location.setdefault(index.location, []).extend(index.rows)
    for rows in by_location.values():
        assert len(set(rows)) == len(rows) == 20
        left_out += ~np.isin(np.arange(N - 1), rows)
    # 3 of 23 subjects are left out at each of 40 locations.
    assert (met > 0).mean() > 0.9 and left_out.min() > 0 and left_out.max() < 16
    whole, halves = list(sampler(scans)), [list(sampler(scans, rank, 2)) for rank in range(2)]
    for one, first, second in zip(whole, *halves):
        np.testing.assert_array_equal(one.rows, [*first.rows, *second.rows])
    assert not np.array_equal(whole[0].rows, next(iter(sampler(scans, seed=4))).rows)
