"""Shared code of the tools that evaluate features."""
