"""Folds keep a patient's scans together and distribute rare classes evenly; the bootstrap draws patients."""

import numpy as np
import pytest

from tools.evaluation.splits import draw_folds, draw_resamples, find_sids_that_look_like_one_patient, make_strata


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_folds_are_balanced(seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    strata = (groups % 8 == 0).astype(int)  # 5 groups of class 1, one per fold
    fold = draw_folds(strata, groups, 5, rng)
    for group in range(40):
        assert len(set(fold[groups == group])) == 1
    assert [len(set(groups[(fold == f) & (strata == 1)])) for f in range(5)] == [1] * 5
    sizes = np.bincount(fold, minlength=5)
    assert sizes.max() - sizes.min() <= 6
    assert not np.array_equal(fold, draw_folds(strata, groups, 5, np.random.default_rng(seed + 100)))


def test_ranks_are_spread():
    values = np.random.default_rng(0).normal(size=100)
    strata = make_strata(values, "regression")
    assert np.bincount(strata).tolist() == [20] * 5
    fold = draw_folds(strata, np.arange(100), 5, np.random.default_rng(1))
    for number in range(5):
        assert np.bincount(strata[fold == number]).tolist() == [4] * 5
    assert make_strata(np.array([3.0, 1, 3]), "class").tolist() == [1, 0, 1]


def test_the_bootstrap_draws_a_patient_with_all_scans():
    groups = np.array([0, 0, 1, 2, 2, 2])
    weights = draw_resamples(groups, 500, 0)
    assert weights.shape == (6, 500) and (weights[0] == weights[1]).all() and (weights[3] == weights[5]).all()
    assert (weights[[0, 2, 3]].sum(0) == 3).all() and weights[2].std() > 0.5


@pytest.mark.parametrize(
    ("sids", "alike"),
    [
        (["p1_v1", "p1_v2", "p2_v1"], ["p1_v1", "p1_v2"]),
        (["1001-insp", "1001-exp", "1002-insp"], []),
        (["s12_01", "s12_02", "s13_01"], ["s12_01", "s12_02"]),
        (["0001", "0002", "0003"], []),
        (["case1", "case2"], []),
        (["COPD10023", "COPD10024"], []),
        ([f"{n:04d}" for n in range(1, 201)], []),
    ],
)
def test_sids_that_look_like_one_patient(sids, alike):
    assert find_sids_that_look_like_one_patient(sids) == alike
