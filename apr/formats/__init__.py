"""Files to named arrays and back: .apr, safetensors. No GPU; every file is treated as hostile."""
