"""The NumPy truth: one file per op, forward and backward, float32 or float64; nothing here imports the GPU side."""
