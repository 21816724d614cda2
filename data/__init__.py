"""Patch stores on disk, sampling of batches, and augmentation."""
