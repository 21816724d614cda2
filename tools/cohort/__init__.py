"""Synthetic chest CTs with planted disease."""
