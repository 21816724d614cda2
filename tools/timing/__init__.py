"""Parts of tools/benchmark.py: timings, and the rows of the result tables."""
