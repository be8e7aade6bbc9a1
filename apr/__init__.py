"""apr: decoder language models trained, checked and run on NVIDIA GPUs, on raw CUDA kernels, with a NumPy truth.

    model = apr.load("model.apr", device="auto")      model.generate("def ", max_tokens=64)      model.logits([1, 2, 3])

Importing apr, or anything on floors 0 to 2 (docs/architecture.md), never imports CuPy; `load` comes when asked for.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in ("load", "Model"):
        raise AttributeError(f"module 'apr' has no attribute {name!r}")
    from apr.tools import load as module

    return getattr(module, name)
