"""The DrasCLR method: encoder, queues, training step and checkpoints."""
