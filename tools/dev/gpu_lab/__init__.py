"""Sections of tools/dev/gpu.py."""
