"""Reading a scan rightly, a kind of file a module. ``preprocess.scan`` is the door."""

from misc.command import UserError


class ScanError(UserError):
    """One subject's scan, mask or transform cannot be used; the message says why."""


class EarlierFailure(ScanError):
    """An earlier step failed for this subject, and has told why."""
