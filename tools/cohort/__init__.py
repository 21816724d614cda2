"""Synthetic chest CTs with simulated disease."""
