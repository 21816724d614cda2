"""What a subject's files are refused with."""

from misc.command import UserError


class ScanError(UserError):
    """One subject's scan, mask or transform cannot be used; the message says why."""


class EarlierFailure(ScanError):
    """An earlier step failed for this subject, and has told why."""
