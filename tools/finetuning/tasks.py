"""What is learnt and from whom: labels of patients or of patches, and the split that all arms share."""

from typing import NamedTuple

import numpy as np

from data.layout import StoreError
from data.tables import read_table
from tools.evaluation.kinds import recognize, why_not

FEWEST = 10  # labelled patients
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.25
FEWEST_DRAWN = 4  # patients that a fraction trains on, two of each class where there are classes
FEWEST_OF_CLASS = 4  # patients


class Task(NamedTuple):
    """Labels to learn.

    Attributes:
        kind: regression, grade or class.
        rows: (n,) rows of the store, one a label.
        places: (n,) locations of patch labels; none where a label is the patient's.
        target: (n,) numbers; of classes 0, 1, ...
        classes: what class numbers stand for.
    """

    kind: str
    rows: np.ndarray
    places: np.ndarray | None
    target: np.ndarray
    classes: tuple[float, ...] = ()


def patient_task(sids: list[str], values: np.ndarray, column: str, kind: str | None) -> Task:
    """From a column (N,), NaN where unknown. Raises StoreError."""
    rows = np.flatnonzero(~np.isnan(values))
    return _task(rows, None, values[rows], f"column {column!r}", kind)


def patch_task(path: str, sids: list[str], locations: int, kind: str | None) -> Task:
    """From a CSV of sid, patch, value. Raises StoreError, which names the line."""
    table = read_table(path, ("sid", "patch", "value"), file_names=False, one_row=False)
    row_of = {sid: row for row, sid in enumerate(sids)}
    rows, places, values = [], [], []
    for line, (sid, place, value) in enumerate(zip(table["sid"], table["patch"], table["value"]), start=2):
        if sid not in row_of:
            raise StoreError(f"{path}, line {line}: sid {sid!r} is not in the store, whose first is {sids[0]!r}")
        if not place.isdecimal() or int(place) >= locations:
            raise StoreError(f"{path}, line {line}: patch {place!r} is not a number from 0 to {locations - 1}")
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise StoreError(f"{path}, line {line}: value {value!r} is no finite number")
        rows.append(row_of[sid])
        places.append(int(place))
        values.append(number)
    return _task(np.array(rows), np.array(places), np.array(values), f"{path}: value", kind)


def _task(rows: np.ndarray, places: np.ndarray | None, values: np.ndarray, what: str, kind: str | None) -> Task:
    if len(np.unique(rows)) < FEWEST:
        raise StoreError(
            f"{what} is known for {len(np.unique(rows))} subjects of the store; at least {FEWEST} are needed"
        )
    kind = kind or recognize(values)
    reason = why_not(values, kind, folds=2)
    if kind == "class" and not reason:
        numbers, counts = np.unique(values, return_counts=True)
        if counts.min() < FEWEST_OF_CLASS:
            reason = f"has {numbers[counts.argmin()]:g} for {counts.min()} subjects; at least {FEWEST_OF_CLASS} are "
            reason += "needed to train, to stop by and to test"
    if reason:
        raise StoreError(f"{what} {reason}")
    classes = tuple(np.unique(values)) if kind == "class" else ()
    target = np.searchsorted(classes, values) if classes else values
    return Task(kind, rows, places, target.astype(np.float64), classes)


class Split(NamedTuple):
    """Numbers of a task's labels, disjoint by patient."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def draw_split(task: Task, fraction: float, seed: int, held_out: np.ndarray | None = None) -> Split:
    """The same for every arm: of the patients that are not tested on, the first ``fraction`` of a shuffled list.

    A smaller fraction's patients are among a larger one's.

    Args:
        held_out: (N,) rows of the store to test on; None draws three in ten.

    Raises:
        StoreError: the fraction leaves fewer patients than can be trained on, or one class.
    """
    rng = np.random.default_rng([seed, 7])
    patients = rng.permutation(np.unique(task.rows))
    if held_out is None:
        count = max(1, round(TEST_SHARE * len(patients)))
        tested, pool = patients[:count], patients[count:]
    else:
        tested, pool = patients[held_out[patients]], patients[~held_out[patients]]
    if task.kind == "class" and task.places is None:
        pool = _classes_in_turn(pool, task)
    count = max(FEWEST_DRAWN, round(fraction * len(pool)))
    if count > len(pool):
        raise StoreError(f"{len(pool)} labelled patients to learn from; at least {FEWEST_DRAWN} are needed")
    drawn = pool[:count]
    spared = max(1, round(VALIDATION_SHARE * count))
    if task.kind == "class":
        spared = max(spared, len(task.classes)) if count >= 2 * len(task.classes) else spared
    validation, train = drawn[:spared], drawn[spared:]
    of = [np.flatnonzero(np.isin(task.rows, some)) for some in (train, validation, tested)]
    if task.kind == "class" and len(np.unique(task.target[of[0]])) < 2:
        raise StoreError(f"a fraction of {fraction:g} leaves labels of one class to learn from; give a larger one")
    given = task.target[of[2]]
    if held_out is not None and (not len(given) or np.ptp(given) == 0):
        raise StoreError(
            f"--held-out: the {len(given)} labelled patients to test on are all alike, so no figure can be told; hold "
            "out others"
        )
    return Split(*of)


def _classes_in_turn(patients: np.ndarray, task: Task) -> np.ndarray:
    """The same patients, the classes taking turns for as long as each has some: small fractions need them all."""
    label = dict(zip(task.rows, task.target))
    kinds = [[p for p in patients if label[p] == number] for number in range(len(task.classes))]
    shortest = min(map(len, kinds))
    turns = [patient for turn in zip(*(kind[:shortest] for kind in kinds)) for patient in turn]
    return np.array([*turns, *(patient for patient in patients if patient not in set(turns))])
