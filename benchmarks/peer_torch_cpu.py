"""The peer of bench_train_cpu.py: the same model (torch_model.py), trained by plain PyTorch eager on the CPU.

bench_train_cpu.py starts it with a Python that has torch and NumPy; by hand:

    PYTHON_WITH_TORCH benchmarks/peer_torch_cpu.py JOB

JOB is JSON: `config` (the model's shape, Hugging Face's names), `train` (AdamW and clipping), `weights` and `batches`
(.npz files), `cores`, `warmup`. Every batch is one step. Prints one line of JSON: the loss of every step, the seconds
of those after the warm-up, the process's memory, versions. Nothing of apr is imported.
"""

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_model import Decoder, make_optimizer


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job` says; losses, seconds, memory, versions."""
    torch.set_num_threads(job["cores"])
    config, train = job["config"], job["train"]
    idle_mib = peak_mib()
    model = Decoder(config, train["max_seq_len"])
    with np.load(job["weights"]) as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    optimizer = make_optimizer(model, train)
    with np.load(job["batches"]) as batches:
        inputs, targets = torch.from_numpy(batches["inputs"]), torch.from_numpy(batches["targets"])
    losses, seconds = [], []
    for x, y in zip(inputs, targets, strict=True):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds[job["warmup"]:], "idle_mib": idle_mib, "peak_mib": peak_mib(),
            "versions": f"torch {torch.__version__} eager"}


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
