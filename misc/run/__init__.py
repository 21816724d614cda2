"""Parts of a training run: flags, recipes, checkpoints, logs, the watch for hanging ranks, and resuming."""
