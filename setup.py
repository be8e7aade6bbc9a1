"""Packaging of apr: the only place that names dependencies and maps kernels/ and contracts/ into the wheel.

The two folders sit beside the package in a checkout (a reader finds the .cu files at the top) and inside it in a wheel,
as apr/kernels and apr/contracts. apr/paths.py looks in both places; nothing else knows the difference.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "apr" / "__init__.py").read_text(), re.M).group(1)

BASE = [
    "numpy>=2.0",
    "cffi>=1.17",
    "safetensors>=0.5",
    "pyyaml>=6.0.2",
    "ml-dtypes>=0.5",
    "tokenizers>=0.21",
    "gguf>=0.17",
    "jinja2>=3.1.6",
    "msgspec>=0.19",
    "rich>=13.9",
    "threadpoolctl>=3.5",
]
EXTRAS = {
    # The NVIDIA wheels that apr needs and no others: the compiler, the headers of bf16/fp16/fp8, and cuBLASLt.
    "cuda12": [
        "cupy-cuda12x>=14.0",
        "nvidia-cuda-nvrtc-cu12>=12.9,<13",
        "nvidia-cuda-runtime-cu12>=12.9,<13",
        "nvidia-cublas-cu12>=12.9,<13",
    ],
    "cuda13": ["cupy-cuda13x>=14.0", "nvidia-cuda-nvrtc>=13,<14", "nvidia-cuda-runtime>=13,<14",
               "nvidia-cublas>=13,<14"],
    # Compiles kernels on a machine without a GPU; enough for the tests there.
    "nvrtc": ["cupy-cuda12x>=14.0", "nvidia-cuda-nvrtc-cu12>=12.9,<13"],
    "hub": ["huggingface-hub>=0.34"],
    "parquet": ["pyarrow>=18"],
    "plot": ["matplotlib>=3.9"],
    "tensorboard": ["tensorboardX>=2.6"],
    "test": ["pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "pyarrow>=18", "huggingface-hub>=0.34",
             "ruff>=0.11", "mypy>=1.14", "types-PyYAML>=6", "setuptools>=77", "wheel>=0.45"],
}

setup(
    name="apr",
    version=VERSION,
    description="Decoder language models trained, checked and run on NVIDIA GPUs from Python, on raw CUDA kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["apr", "apr.*"]), "apr.kernels", "apr.contracts"],
    package_dir={"apr.kernels": "kernels", "apr.contracts": "contracts"},
    package_data={"apr": ["py.typed", "gemm_tables/*.json"], "apr.kernels": ["*.cu", "*.cuh"],
                  "apr.contracts": ["*.yaml"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["apr=apr.cli.main:main"]},
)
