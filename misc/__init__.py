"""Shared foundations of all programs: commands, files, processes and experiments."""
