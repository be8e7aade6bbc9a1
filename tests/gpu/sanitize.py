"""Every kernel under compute-sanitizer: python tests/gpu/sanitize.py [TOOL …] runs the tools and demands no finding.

Under each tool a process for each of MODELS trains, evaluates and scores a small model, at lengths of 1, 17, 127 and
129 and widths that no vector fits, and then generates with it. Kernels run one by one; every buffer is an allocation of
its own, so that memcheck sees the end of each. racecheck looks at shared memory, initcheck at device memory nobody
wrote. It cannot see what cuBLASLt's bf16 products write with the bulk copy engine, so those buffers are filled with NaN
beforehand: what is read of them too early shows in the losses. racecheck finds races in cuBLASLt's own kernels too
(nvjet…), which are not ours to mend and do not count; telling it to look at ours alone makes it fail.

Processes run side by side, as many as there are processors, and a racecheck of cuBLASLt's kernels takes some GiB of the
host's memory: the whole took 93 s and 108 GiB on 16 processors.
"""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The slowest first, here and in TOOLS.
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("bf16", "llama", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": False, "vocab_size": 50257}),
    ("bf16", "qwen3", {"head_dim": 64, "hidden_size": 123, "vocab_size": 131}),
    *(("bf16", "qwen2", {"head_dim": hs}) for hs in (128, 96, 80, 64, 32)),
    ("fp32", "qwen3", {"head_dim": 32, "intermediate_size": 51}), ("fp32", "qwen2", {"head_dim": 128}),
    ("fp32", "llama", {"hidden_size": 37, "head_dim": 8})]
# Buffers that products write.
PRODUCTS = ("qkv", "qkv_raw", "branch", "gate_up", "act", "logits_buf", "datty", "workspace")
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
ROOT = Path(__file__).resolve().parents[2]


def work(precision: str, family: str, changes: dict[str, Any]) -> None:
    """What a tool watches."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    from models import FAMILIES, train_config

    from apr.data.batch import LMBatch
    from apr.device import Device
    from apr.train.cuda_trainer import CudaTransformerTrainer

    dev, rng = Device(), np.random.default_rng(0)
    model = dataclasses.replace(FAMILIES[family], num_hidden_layers=1, max_position_embeddings=256, **changes)
    config = train_config(precision=precision, batch_size=2, max_seq_len=129)
    trainer = CudaTransformerTrainer.new(model, config, dev, graphs=False)
    fill(dev, trainer.arena, precision)
    for length in (129, 1, 17, 127):
        batch = LMBatch.from_rows(rng.integers(0, model.V, (2, length + 1)))
        if not (math.isfinite(trainer.train_batch(batch)) and math.isfinite(trainer.eval_batch(batch))):
            raise SystemExit(f"{family} {changes}: a buffer was read before it was written")
    trainer.forward_logits(batch.inputs)
    generate(dev, model, precision, trainer.params, rng)
    print("done")


def fill(dev: Any, arena: Any, precision: str) -> None:
    """NaN into what products write."""
    for name in PRODUCTS if precision == "bf16" else ():
        if name in arena.arrays:
            dev.fill(arena[name], 0xFF)


def generate(dev: Any, model: Any, precision: str, params: Any, rng: Any) -> None:
    """Two ragged sequences: prompts and decoding steps scored, tokens drawn."""
    import numpy as np
    from models import source_of

    from apr.config import Sampling
    from apr.infer.cuda_engine import CudaEngine

    engine = CudaEngine(source_of(model, params), dev, precision, 2, 160)
    fill(dev, engine.arena, precision)
    prompts = [rng.integers(0, model.V, n).tolist() for n in (131, 17)]
    if not all(np.isfinite(s).all() for s in engine.scores(prompts, [129, 0])):
        raise SystemExit(f"{model.hf_model_type}: a buffer was read before it was written")
    tokens = list(engine.generate(prompts, Sampling(model.V, 0.8, 20, 0.9), 3))
    if len(tokens) != 3:
        raise SystemExit(f"{model.hf_model_type}: {len(tokens)} tokens of 3")


def findings(code: int, output: str) -> int | None:
    """How many a tool's output has, races of nvjet kernels left out; None: the run is none."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    if code or summary is None or not re.search("^done$", output, re.M):
        return None
    races = re.findall(r"Race reported between \w+ access at (\w+)", output)
    return int(summary[1] or summary[2]) - sum(kernel.startswith("nvjet") for kernel in races)


def main(tools: list[str]) -> int:
    """Run the tools, print a line for each; 1 if any has a finding."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit)", file=sys.stderr)
        return 9

    def watch(tool: str, model: int) -> tuple[int | None, str]:
        run = subprocess.run([sanitizer, "--tool", tool, sys.executable, __file__, "--work", str(model)],
                             capture_output=True, text=True, errors="replace", cwd=ROOT, check=False)
        output = run.stdout + run.stderr
        return findings(run.returncode, output), f"exit code {run.returncode}\n{output}"

    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {tool: [pool.submit(watch, tool, i) for i in range(len(MODELS))] for tool in tools}
        for tool, of in runs.items():
            found = [run.result() for run in of]
            ran = [n for n, _ in found if n is not None]
            print(f"{tool}: {sum(ran)} findings; {len(ran)} of {len(MODELS)} models", flush=True)
            for model, (n, output) in zip(MODELS, found, strict=True):
                if n != 0:
                    failed = True
                    print(*model, output[:6000], flush=True)
    return int(failed)


if __name__ == "__main__":
    if "--work" in sys.argv:
        sys.exit(work(*MODELS[int(sys.argv[-1])]))
    sys.exit(main(sys.argv[1:] or list(TOOLS)))
