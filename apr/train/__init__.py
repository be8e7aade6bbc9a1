"""Training: the NumPy trainer, the loop with its guards, checkpoints and the log."""
