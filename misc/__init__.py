"""Modules that all programs share: commands, files, processes and experiments."""
