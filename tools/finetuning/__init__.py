"""Fine-tune an encoder on few labels."""
