"""Parts of the benchmark: alternating timings and the rows of its tables."""
