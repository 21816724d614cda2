"""Measurements of tools/dev/gpu.py."""
