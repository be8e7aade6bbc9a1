"""Tools that look at models, files and runs; they may use the reference and the GPU side alike."""
