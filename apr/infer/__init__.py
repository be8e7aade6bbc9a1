"""Generation: sampling, and the plain decoder over the NumPy reference."""
