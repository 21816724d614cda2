"""A subject's scan, read and checked once for all the steps that it goes through together."""

from preprocess.outputs import file_stamp
from preprocess.scan import Scan, load_scan
from preprocess.subjects import Subject

_kept: dict[tuple[str, str, str], Scan] = {}  # at most one: of the subject that this process is at


def load_shared(subject: Subject) -> Scan:
    """The subject's scan. The same one again while its file is the same, until forget_scan(). Raises ScanError."""
    key = (subject.image, subject.series, file_stamp(subject.image, subject.series))
    if key not in _kept:
        _kept.clear()  # before the next one is read: a worker holds one scan
        _kept[key] = load_scan(subject.image, subject.series)
    return _kept[key]


def forget_scan() -> None:
    """Give the memory back; steps are done with the subject."""
    _kept.clear()
