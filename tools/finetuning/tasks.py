"""Labels to predict, of subjects or of patches, and their split into training, validation and test sets."""

from typing import NamedTuple

import numpy as np

from data.layout import StoreError
from data.tables import read_table
from tools.evaluation.kinds import find_label_problem, guess_label_kind

FEWEST = 10  # minimum number of labelled subjects
TEST_SHARE, VALIDATION_SHARE = 0.3, 0.25
FEWEST_DRAWN = 4  # minimum number of subjects to learn from: two per class if there are two classes
FEWEST_OF_CLASS = 4  # minimum number of labels per class


class Task(NamedTuple):
    """Labels to predict.

    Attributes:
        kind: regression, grade or class.
        rows: (n,) the subject of each label, as a row of the store.
        places: (n,) the location of each patch label; None if the labels belong to whole subjects.
        target: (n,) the value of each label; for classes, the class number 0, 1, ...
        classes: the original value of each class number.
    """

    kind: str
    rows: np.ndarray
    places: np.ndarray | None
    target: np.ndarray
    classes: tuple[float, ...] = ()


def make_subject_task(sids: list[str], values: np.ndarray, column: str, kind: str | None) -> Task:
    """Make a task from a label column (N,), which is NaN where unknown. Raises StoreError."""
    rows = np.flatnonzero(~np.isnan(values))
    return _make_finetuning_task(rows, None, values[rows], f"column {column!r}", kind)


def read_patch_label_task(labels_path: str, sids: list[str], num_locations: int, label_kind: str | None) -> Task:
    """Make a task from a CSV with columns sid, patch and value.

    Raises StoreError if a line is invalid, naming the line.
    """
    table = read_table(labels_path, ("sid", "patch", "value"), file_names=False, one_row=False)
    row_of = {sid: row for row, sid in enumerate(sids)}
    rows, places, values = [], [], []
    for line, (sid, place, value) in enumerate(zip(table["sid"], table["patch"], table["value"]), start=2):
        if sid not in row_of:
            raise StoreError(
                f"{labels_path}, line {line}: sid {sid!r} is not in the store; its sids look like {sids[0]!r}"
            )
        if not place.isdecimal() or int(place) >= num_locations:
            raise StoreError(
                f"{labels_path}, line {line}: patch {place!r} is not a whole number from 0 to {num_locations - 1}"
            )
        try:
            number = float(value)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise StoreError(f"{labels_path}, line {line}: value {value!r} is not a finite number")
        rows.append(row_of[sid])
        places.append(int(place))
        values.append(number)
    return _make_finetuning_task(
        np.array(rows), np.array(places), np.array(values), f"column 'value' of {labels_path}", label_kind
    )


def _make_finetuning_task(
    rows: np.ndarray, label_locations: np.ndarray | None, values: np.ndarray, label_source: str, kind: str | None
) -> Task:
    if len(np.unique(rows)) < FEWEST:
        raise StoreError(
            f"{label_source} has values for {len(np.unique(rows))} subjects of the store; at least {FEWEST} are needed"
        )
    kind = kind or guess_label_kind(values)
    reason = find_label_problem(values, kind, folds=2)
    if kind == "class" and not reason:
        numbers, counts = np.unique(values, return_counts=True)
        if counts.min() < FEWEST_OF_CLASS:
            reason = (
                f"{counts.min()} labels have the value {numbers[counts.argmin()]:g}; at least {FEWEST_OF_CLASS} are "
            )
            reason += "needed for training, validation and test"
    if reason:
        raise StoreError(f"{label_source} cannot be learned: {reason}")
    classes = tuple(np.unique(values)) if kind == "class" else ()
    target = np.searchsorted(classes, values) if classes else values
    return Task(kind, rows, label_locations, target.astype(np.float64), classes)


class Split(NamedTuple):
    """Indices of a task's training, validation and test labels. No subject is in more than one of the three sets."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def draw_split(task: Task, fraction: float, seed: int, held_out: np.ndarray | None = None) -> Split:
    """Split the labels of a task into training, validation and test sets, which are the same for every arm.

    The subjects outside the test set are shuffled, and the first ``fraction`` of the shuffled subjects is used for
    training and validation. A smaller fraction therefore contains a subset of the subjects of a larger fraction.

    Args:
        task: the labels.
        fraction: share of the subjects outside the test set to use, 0 to 1.
        seed: random seed.
        held_out: (N,) bool, test subjects of the store (default: 30 % drawn at random).

    Raises:
        StoreError: the fraction leaves too few subjects or only one class, or all test labels are equal.
    """
    rng = np.random.default_rng([seed, 7])
    patients = rng.permutation(np.unique(task.rows))
    if held_out is None:
        count = max(1, round(TEST_SHARE * len(patients)))
        tested, pool = patients[:count], patients[count:]
    else:
        tested, pool = patients[held_out[patients]], patients[~held_out[patients]]
    if task.kind == "class" and task.places is None:
        pool = _reorder_to_alternate_classes(pool, task)
    count = max(FEWEST_DRAWN, round(fraction * len(pool)))
    if count > len(pool):
        raise StoreError(f"there are {len(pool)} labelled subjects to learn from; at least {FEWEST_DRAWN} are needed")
    drawn = pool[:count]
    spared = max(1, round(VALIDATION_SHARE * count))
    if task.kind == "class":
        spared = max(spared, len(task.classes)) if count >= 2 * len(task.classes) else spared
    validation, train = drawn[:spared], drawn[spared:]
    of = [np.flatnonzero(np.isin(task.rows, some)) for some in (train, validation, tested)]
    if task.kind == "class" and len(np.unique(task.target[of[0]])) < 2:
        raise StoreError(
            f"--fractions {fraction:g} leaves labels of only one class to learn from; give a larger fraction"
        )
    given = task.target[of[2]]
    if held_out is not None and (not len(given) or np.ptp(given) == 0):
        raise StoreError(
            f"--held-out: the {len(given)} labels of test subjects are all equal or missing, so metrics are "
            "undefined; hold out other subjects"
        )
    return Split(*of)


def _reorder_to_alternate_classes(patients: np.ndarray, task: Task) -> np.ndarray:
    """Reorder subjects to alternate classes until one class is used up, so that small fractions have all classes."""
    label = dict(zip(task.rows, task.target))
    kinds = [[p for p in patients if label[p] == number] for number in range(len(task.classes))]
    shortest = min(map(len, kinds))
    turns = [patient for turn in zip(*(kind[:shortest] for kind in kinds)) for patient in turn]
    return np.array([*turns, *(patient for patient in patients if patient not in set(turns))])
