"""Folds that keep a patient whole and every fold alike."""

import re

import numpy as np

# What a scan's name adds to its patient's: a visit, a phase, a repeat.
_SCAN = re.compile(
    r"[-_. ]?(?:insp\w*|exp\w*|baseline|followup|follow-up|visit|scan|series|repeat|v|s|t|p)?[-_. ]?\d{1,2}$", re.I
)


def draw_folds(strata: np.ndarray, groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of every subject, (n,): a group whole in one, strata spread evenly over all.

    Args:
        strata: (n,) numbers, such as the class or the rank of the label; of a group, its first subject's counts.
        groups: (n,) numbers of patients.
        folds: how many.
    """
    _, first, inverse, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    # Groups in order of their stratum, shuffled within it, the large ones first: dealt to the emptiest fold.
    order = np.lexsort((rng.random(len(first)), -sizes, strata[first]))
    fold_of_group, filled = np.empty(len(first), dtype=int), np.zeros(folds)
    offset = rng.permutation(folds)
    for start in range(0, len(order), folds):
        block = order[start : start + folds]
        emptiest = np.lexsort((offset, filled))[: len(block)]
        emptiest = rng.permutation(emptiest)
        fold_of_group[block] = emptiest
        filled[emptiest] += sizes[block]
    return fold_of_group[inverse]


def strata_of(values: np.ndarray, kind: str, bins: int = 5) -> np.ndarray:
    """(n,) numbers that folds shall share out evenly: classes and grades as they are, other labels by rank."""
    if kind in ("class", "grade"):
        return np.unique(values, return_inverse=True)[1]
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * bins // max(1, len(values))


def resamples(groups: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Bootstrap over patients: how often each subject is in each resample, (n, number)."""
    _, inverse = np.unique(groups, return_inverse=True)
    count = inverse.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=number)  # (number, groups)
    return drawn[:, inverse].T


def on_both_sides(groups: np.ndarray, held_out: np.ndarray) -> tuple[int, int] | None:
    """Two rows of one patient, of groups (N,), the first not held out and the second held out; None where none are."""
    shared = np.intersect1d(groups[held_out], groups[~held_out])
    if not len(shared):
        return None
    own = groups == shared[0]
    return int(np.flatnonzero(own & ~held_out)[0]), int(np.flatnonzero(own & held_out)[0])


def look_like_one_patient(sids: list[str]) -> list[str]:
    """Two or more sids that differ only in what names a scan of one patient; empty where none do.

    Numbers that count subjects, 001 and 002, are not such: what is left must have a digit and tell patients apart.
    """
    of_patient: dict[str, list[str]] = {}
    for sid in sids:
        stem = _SCAN.sub("", sid)
        within_a_number = sid[len(stem) :].isdigit() and stem[-1:].isdigit()  # 0001 is no scan 01 of patient 00
        if stem != sid and re.search(r"\d", stem) and not within_a_number:
            of_patient.setdefault(stem, []).append(sid)
    several = [names for names in of_patient.values() if len(names) > 1]
    return several[0] if several and len(of_patient) > 1 else []
