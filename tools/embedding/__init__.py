"""Compute features of a scan without intermediate files."""
