"""Guess the kind of a label, and check whether it can be predicted."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

KINDS = ("regression", "log10", "grade", "class")
MOST_GRADES = 10  # maximum number of different values of a grade or class label
MISSING = (-9.0, -99.0, -999.0, -9999.0, -1024.0)
MISSING_ABOVE = (9.0, 99.0, 999.0, 9999.0, 88.0, 888.0, 8888.0)
EXCEL_DATES = (20000, 60000)  # Excel's day numbers for 1954 to 2064; a follow-up time of 20000 days is implausibly long
FEWEST = 5  # minimum number of held-out patients, of training events, and of held-out events


def guess_kind_of_words(name: str, words: Mapping[str, Sequence[str]], order: Collection[str]) -> str:
    """Return the kind of a column of words, or "" for a column of numbers.

    A column of words is a ``grade`` if --order gives three or more words for the column, else a ``class``.
    """
    if name not in words:
        return ""
    return "grade" if name in order and len(words[name]) > 2 else "class"


def guess_label_kind(values: np.ndarray) -> str:
    """Guess the kind of a label from its known values (n,).

    The kind is "class" for two distinct values, "grade" for a few whole numbers close together, else "regression".
    """
    distinct = np.unique(values)
    if len(distinct) == 2:
        return "class"
    whole = np.all(distinct == np.rint(distinct))
    return "grade" if whole and len(distinct) <= MOST_GRADES and np.ptp(distinct) <= 2 * len(distinct) else "regression"


def find_label_problem(values: np.ndarray, kind: str, folds: int) -> str:
    """Return why known values (n,) cannot be predicted as ``kind``, or "" if they can."""
    if len(values) < 2 * folds:
        return f"{len(values)} subjects have a value and {folds} folds need {2 * folds}; lower --folds or label more"
    if np.ptp(values) == 0:
        return f"it is {values[0]:g} for every subject"
    if kind == "log10" and values.min() <= 0:
        return f"it contains {values.min():g}, and log10 needs numbers above 0"
    if kind == "grade" and np.any(values != np.rint(values)):
        return f"it contains {values[values != np.rint(values)][0]:g}, and grades must be whole numbers"
    if kind == "class":
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) > MOST_GRADES:
            return f"it has {len(distinct)} different values, too many for classes; set another kind with --kind"
        if counts.min() < folds:
            return f"{counts.min()} subjects have the value {distinct[counts.argmin()]:g}; {folds} are needed"
    return ""


def find_missing_code(values: np.ndarray) -> float | None:
    """Return the lowest or highest of known values (n,) if it looks like a code for missing values, else None.

    A number looks like a code if many tables use this number for missing values and it does not fit the other values.
    """
    if len(values) < 2:
        return None
    low, high = values.min(), values.max()
    rest = values[values != low]
    if low in MISSING and rest.size and rest.min() >= 0:
        return float(low)
    rest, count = values[values != high], int((values == high).sum())
    if high in MISSING_ABOVE and count > 1 and len(np.unique(rest)) > 1 and high - rest.max() > np.ptp(rest):
        return float(high)
    return None


def describe_date_format_of_times(follow_up_times: np.ndarray) -> str:
    """Return the kind of date that known times (n,) look like, or "" if they may be follow-up times."""
    if not len(follow_up_times) or np.any(follow_up_times != np.rint(follow_up_times)):
        return ""
    year, month, day = follow_up_times // 10000, follow_up_times // 100 % 100, follow_up_times % 100
    # Labels are float32, which rounds dates such as 20240131 to even numbers, so the day may be off by one.
    if np.all((year >= 1900) & (year <= 2100) & (month >= 1) & (month <= 12) & (day <= 32)):
        return "dates (year, month, day)"
    if np.all((follow_up_times >= EXCEL_DATES[0]) & (follow_up_times <= EXCEL_DATES[1])):
        return "Excel dates (days since 1900)"
    if np.all((follow_up_times >= 1900) & (follow_up_times <= 2100)) and np.ptp(follow_up_times) > 0:
        return "calendar years"
    return ""


def find_survival_problem(time: np.ndarray, event: np.ndarray, min_events: int, has_held_out: bool = False) -> str:
    """Return why survival cannot be predicted from known times and events (n,), or "" if it can.

    Args:
        time: (n,) follow-up times.
        event: (n,) events, 0 or 1.
        min_events: minimum number of events.
        has_held_out: True if the subjects are one part of a --held-out split, which has no folds.
    """
    if kind := describe_date_format_of_times(time):
        return f"times such as {time[0]:g} look like {kind}; give the time from a start to the event or the last visit"
    if time.min() < 0:
        return f"the times contain {time.min():g}, but follow-up must be 0 or more"
    if not np.isin(event, (0, 1)).all():
        return f"the events contain {event[~np.isin(event, (0, 1))][0]:g}; write 1 if it was observed, 0 if not"
    if not event.any():
        return "no event was observed, every subject is censored"
    if event.sum() < min_events:
        seen = f"{int(event.sum())} events were observed"
        return (
            f"{seen}; at least {min_events} are needed"
            if has_held_out
            else f"{seen}, fewer than the {min_events} folds"
        )
    if np.ptp(time) == 0:
        return f"all times are {time[0]:g}"
    return ""
