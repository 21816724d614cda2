"""Commands for evaluation, maps, synthetic cohorts, benchmarks and development."""
