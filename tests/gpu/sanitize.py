"""Every kernel under compute-sanitizer: python tests/gpu/sanitize.py [TOOL …] runs the tools and demands no finding.

The tools run side by side, each with its own process: they take minutes.

Under each tool a process trains, evaluates and scores small models of all families, in float32 and bf16, at lengths of
1, 17, 127 and 129 and widths that no vector fits, and then generates with them. Kernels run one by one; every buffer is
an allocation of its own, so that memcheck sees the end of each. racecheck looks at shared memory, initcheck at device
memory nobody wrote. It cannot see what cuBLASLt's bf16 products write with the bulk copy engine, so those buffers are
filled with NaN beforehand: what is read of them too early shows in the losses. racecheck does not look at cuBLASLt's
own kernels (nvjet…), in which it finds races; and one lane may arrive at a barrier for its warp.
"""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Buffers that products write.
PRODUCTS = ("qkv", "qkv_raw", "branch", "gate_up", "act", "logits_buf", "datty", "workspace")
TOOLS = {"memcheck": (), "racecheck": ("--kernel-name-exclude", "kns=nvjet", "--racecheck-indirect-barrier-dependency"),
         "initcheck": (), "synccheck": ()}
ROOT = Path(__file__).resolve().parents[2]


def work() -> None:
    """What the tools watch."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    from models import FAMILIES, train_config

    from apr.data.batch import LMBatch
    from apr.device import Device
    from apr.train.cuda_trainer import CudaTransformerTrainer

    dev, rng = Device(), np.random.default_rng(0)
    cases = [("fp32", "llama", {"hidden_size": 37, "head_dim": 8}), ("fp32", "qwen2", {"head_dim": 128}),
             ("fp32", "qwen3", {"head_dim": 32, "intermediate_size": 51})]
    cases += [("bf16", "qwen2", {"head_dim": hs}) for hs in (32, 64, 80, 96, 128)]
    cases += [("bf16", "qwen3", {"head_dim": 64, "hidden_size": 123, "vocab_size": 131}),
              ("bf16", "llama", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": False,
                                "vocab_size": 50257})]
    for precision, family, changes in cases:
        model = dataclasses.replace(FAMILIES[family], num_hidden_layers=1, max_position_embeddings=256, **changes)
        config = train_config(precision=precision, batch_size=2, max_seq_len=129)
        trainer = CudaTransformerTrainer.new(model, config, dev, graphs=False)
        for name in PRODUCTS if precision == "bf16" else ():
            if name in trainer.arena.arrays:
                dev.fill(trainer.arena[name], 0xFF)
        for length in (129, 1, 17, 127):
            batch = LMBatch.from_rows(rng.integers(0, model.V, (2, length + 1)))
            if not (math.isfinite(trainer.train_batch(batch)) and math.isfinite(trainer.eval_batch(batch))):
                raise SystemExit(f"{family} {changes}: a buffer was read before it was written")
        trainer.forward_logits(batch.inputs)
        generate(dev, model, precision, trainer.params, rng)
        print(f"{precision} {family} {changes}", flush=True)


def generate(dev, model, precision, params, rng) -> None:
    """Two ragged sequences: prompts and decoding steps scored, tokens drawn."""
    import numpy as np
    from models import source_of

    from apr.config import Sampling
    from apr.infer.cuda_engine import CudaEngine

    engine = CudaEngine(source_of(model, params), dev, precision, 2, 160)
    for name in PRODUCTS if precision == "bf16" else ():
        if name in engine.arena.arrays:
            dev.fill(engine.arena[name], 0xFF)
    prompts = [rng.integers(0, model.V, n).tolist() for n in (131, 17)]
    if not all(np.isfinite(s).all() for s in engine.scores(prompts, [129, 0])):
        raise SystemExit(f"{model.hf_model_type}: a buffer was read before it was written")
    tokens = list(engine.generate(prompts, Sampling(model.V, 0.8, 20, 0.9), 3))
    if len(tokens) != 3:
        raise SystemExit(f"{model.hf_model_type}: {len(tokens)} tokens of 3")


def main() -> int:
    """Run the tools, print a line for each; 1 if any has a finding."""
    sanitizer, failed = shutil.which("compute-sanitizer"), False
    if sanitizer is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit)", file=sys.stderr)
        return 9
    tools = sys.argv[1:] or list(TOOLS)
    with ThreadPoolExecutor(len(tools)) as pool:
        runs = pool.map(lambda tool: subprocess.run(
            [sanitizer, "--tool", tool, "--error-exitcode", "1", *TOOLS[tool], sys.executable, __file__, "--work"],
            capture_output=True, text=True, cwd=ROOT, check=False), tools)
        for tool, run in zip(tools, runs, strict=True):
            output = run.stdout + run.stderr
            summary = re.findall(r"={3,} (.*SUMMARY.*)", output)
            cases = len(re.findall(r"^(?:fp32|bf16) ", output, re.M))
            ok = run.returncode == 0 and cases == 10 and summary and re.search(r"SUMMARY: 0 |\(0 errors", summary[-1])
            print(f"{tool}: {summary[-1] if summary else 'no summary'}; {cases} of 10 models", flush=True)
            if not ok:
                failed = True
                print(output[:6000], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(work() if "--work" in sys.argv else main())
