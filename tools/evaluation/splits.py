"""Cross-validation folds that keep all scans of a patient together and are balanced by the label."""

import re

import numpy as np

# Suffix that a scan's name adds to the patient's name, for example a visit, a breathing phase or a repeat.
_SCAN = re.compile(
    r"[-_. ]?(?:insp\w*|exp\w*|baseline|followup|follow-up|visit|scan|series|repeat|v|s|t|p)?[-_. ]?\d{1,2}$", re.I
)


def draw_folds(strata: np.ndarray, groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the fold of every subject, (n,).

    No group is split between folds. Each stratum is spread evenly over the folds, as far as possible.

    Args:
        strata: (n,) numbers, such as the class or the quantile group of the label. The first subject of a group
            determines the stratum of the group.
        groups: (n,) patient numbers.
        folds: number of folds.
        rng: random generator.
    """
    _, first, inverse, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    # Sort groups by stratum, then by size (largest first), then at random. Fill the emptiest folds first.
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


def make_strata(values: np.ndarray, kind: str, bins: int = 5) -> np.ndarray:
    """Return strata (n,) for balanced folds.

    Each class or grade is a stratum. The strata of other kinds of labels are ``bins`` quantile groups.
    """
    if kind in ("class", "grade"):
        return np.unique(values, return_inverse=True)[1]
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * bins // max(1, len(values))


def draw_resamples(groups: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Draw bootstrap resamples over patients: how often each subject occurs in each resample, (n, number)."""
    _, inverse = np.unique(groups, return_inverse=True)
    count = inverse.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=number)  # (number, groups)
    return drawn[:, inverse].T


def find_patient_in_both_parts(groups: np.ndarray, held_out: np.ndarray) -> tuple[int, int] | None:
    """Find a patient with scans inside and outside the held-out part.

    Return the rows of two scans of this patient, first the scan that is not held out. Return None if no patient
    has both held-out scans and other scans.
    """
    shared = np.intersect1d(groups[held_out], groups[~held_out])
    if not len(shared):
        return None
    own = groups == shared[0]
    return int(np.flatnonzero(own & ~held_out)[0]), int(np.flatnonzero(own & held_out)[0])


def find_sids_that_look_like_one_patient(sids: list[str]) -> list[str]:
    """Return two or more sids that look like scans of one patient, or an empty list if there are none.

    Sids of one patient differ only in the suffix that identifies the scan. Plain subject numbers, such as 001 and 002,
    do not match: the part before the suffix must contain a digit and must differ between patients.
    """
    of_patient: dict[str, list[str]] = {}
    for sid in sids:
        stem = _SCAN.sub("", sid)
        within_a_number = sid[len(stem) :].isdigit() and stem[-1:].isdigit()  # sid 0001 is not scan 01 of patient 00
        if stem != sid and re.search(r"\d", stem) and not within_a_number:
            of_patient.setdefault(stem, []).append(sid)
    several = [names for names in of_patient.values() if len(names) > 1]
    return several[0] if several and len(of_patient) > 1 else []
