"""The method: tensors in, logits out."""
