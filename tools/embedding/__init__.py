"""From a scan to its features in one go."""
