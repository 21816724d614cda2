"""Scan readers and their checks, one module per task. ``preprocess.scan`` calls the readers."""

from misc.command import UserError


class ScanError(UserError):
    """Raised if a subject's scan, mask or transform cannot be used; the message gives the reason."""


class EarlierFailure(ScanError):
    """Raised if an earlier stage failed for this subject and reported the reason."""
