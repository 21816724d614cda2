"""What a training run needs: its flags, recipes, saver, logs, watch and resume notes."""
