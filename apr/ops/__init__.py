"""One file per operation: its KernelSpecs, and functions that launch them. Ops import neither ops nor the reference."""
