"""Every benchmark of a kernel in one process and one table.

    python benchmarks/bench_all.py [--results DIR] [--no-peer] [--quick]
"""

from collections.abc import Sequence

import bench_adamw
import bench_attention
import bench_cross_entropy
import bench_decode_attention
import bench_decode_linear
import bench_embedding
import bench_global_norm
import bench_linear
import bench_residual
import bench_rmsnorm
import bench_rope
import bench_sampling
import bench_swiglu
from harness import run

MODULES = (bench_embedding, bench_rmsnorm, bench_residual, bench_linear, bench_rope, bench_attention, bench_swiglu,
           bench_cross_entropy, bench_global_norm, bench_adamw, bench_decode_linear, bench_decode_attention,
           bench_sampling)
OPS = {module.__name__.removeprefix("bench_"): module.cases for module in MODULES}


def main(argv: Sequence[str] | None = None) -> int:
    return run(OPS, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
