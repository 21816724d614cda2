"""Where patches live on disk, how batches are drawn, how they are augmented."""
