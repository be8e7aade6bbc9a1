"""apr: decoder language models trained, checked and run on NVIDIA GPUs, on raw CUDA kernels, with a NumPy truth.

Importing apr, or anything on floors 0 to 2 (docs/architecture.md), never imports CuPy.
"""

__version__ = "0.1.0"
