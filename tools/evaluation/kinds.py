"""What kind of number a label is, and whether it can be predicted."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

KINDS = ("regression", "log10", "grade", "class")
MOST_GRADES = 10  # whole numbers of so few values are grades
MISSING = (-9.0, -99.0, -999.0, -9999.0, -1024.0)
MISSING_ABOVE = (9.0, 99.0, 999.0, 9999.0, 88.0, 888.0, 8888.0)
EXCEL_DATES = (20000, 60000)  # 1954 to 2064; as days, follow-up of 54 years and more
FEWEST = 5  # subjects of a class; of fewer a fold would have none


def kind_of_words(name: str, words: Mapping[str, Sequence[str]], order: Collection[str]) -> str:
    """The kind of a column of words: grade if the order of three or more was given, else class; empty for numbers."""
    if name not in words:
        return ""
    return "grade" if name in order and len(words[name]) > 2 else "class"


def recognize(values: np.ndarray) -> str:
    """The kind of known values (n,): two values are classes, a few whole numbers in a row grades, others regression."""
    distinct = np.unique(values)
    if len(distinct) == 2:
        return "class"
    whole = np.all(distinct == np.rint(distinct))
    return "grade" if whole and len(distinct) <= MOST_GRADES and np.ptp(distinct) <= 2 * len(distinct) else "regression"


def why_not(values: np.ndarray, kind: str, folds: int) -> str:
    """Why known values (n,) cannot be predicted as ``kind``; empty where they can."""
    if len(values) < 2 * folds:
        return f"is known for {len(values)} subjects; {folds} folds need {2 * folds}, lower --folds or label more"
    if np.ptp(values) == 0:
        return f"is {values[0]:g} for every subject; there is nothing to predict"
    if kind == "log10" and values.min() <= 0:
        return f"has {values.min():g}, and log10 needs numbers above 0"
    if kind == "grade" and np.any(values != np.rint(values)):
        return f"has {values[values != np.rint(values)][0]:g}, and grades are whole numbers"
    if kind == "class":
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) > MOST_GRADES:
            return f"has {len(distinct)} values; that many classes are no classes, set its kind with --kind"
        if counts.min() < folds:
            return f"has {distinct[counts.argmin()]:g} for {counts.min()} subjects, fewer than the {folds} folds"
    return ""


def missing_code(values: np.ndarray) -> float | None:
    """The lowest or highest of known values (n,), if it is one that tables write for missing, far from all others."""
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


def as_date(values: np.ndarray) -> str:
    """What kind of date known times (n,) are; empty if they may be follow-up."""
    if not len(values) or np.any(values != np.rint(values)):
        return ""
    year, month, day = values // 10000, values // 100 % 100, values % 100
    # A day off: labels are float32, which has no odd numbers of eight digits.
    if np.all((year >= 1900) & (year <= 2100) & (month >= 1) & (month <= 12) & (day <= 32)):
        return "dates, year month day"
    if np.all((values >= EXCEL_DATES[0]) & (values <= EXCEL_DATES[1])):
        return "dates as Excel counts them, days since 1900"
    if np.all((values >= 1900) & (values <= 2100)) and np.ptp(values) > 0:
        return "years of the calendar"
    return ""


def why_no_survival(time: np.ndarray, event: np.ndarray, fewest: int, a_side: bool = False) -> str:
    """Why known times and events (n,) tell nothing; empty where they do.

    Args:
        fewest: events.
        a_side: of --held-out, where there are no folds.
    """
    if kind := as_date(time):
        return f"{time[0]:g} and all others are {kind}; give the time from a start to the event or the last visit"
    if time.min() < 0:
        return f"a time is {time.min():g}; follow-up is 0 or more"
    if not np.isin(event, (0, 1)).all():
        return f"an event is {event[~np.isin(event, (0, 1))][0]:g}; it is 1 where the event was seen, 0 where not"
    if not event.any():
        return "no event was seen: everybody is censored"
    if event.sum() < fewest:
        seen = f"{int(event.sum())} events were seen"
        return f"{seen}; at least {fewest} are needed" if a_side else f"{seen}, fewer than the {fewest} folds"
    if np.ptp(time) == 0:
        return f"every time is {time[0]:g}"
    return ""
