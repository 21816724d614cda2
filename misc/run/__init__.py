"""Parts of a training run: flags, recipes, checkpoints, logs, detection of hanging ranks, and resuming."""
