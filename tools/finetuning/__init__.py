"""Fine-tuning of an encoder on few labels."""
