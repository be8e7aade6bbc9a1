"""Bisect on the GPU: sound models have no finding; planted faults are named, each with layer, stage and cause.

A fault is an edit of the code, most of them falsifiers of the contracts. It is made in a copy of the repository, and
`apr bisect` of that copy is run on a model file, as a user would: nothing of the search knows what was planted.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from models import FAMILIES, random_params, source_of

from apr.contract import Mutant, load_all
from apr.formats.model_file import save_model
from apr.infer.cuda_engine import CudaEngine
from apr.kernel import FAST_PATHS
from apr.paths import contracts_dir
from apr.tools.bisect import LONGER, Bisection
from apr.tools.subjects import EngineSubject, TrainerSubject

ROOT = Path(__file__).parents[2]
SEEDS, WORKERS = 10, 6
FALSIFIERS = {f.id: f.mutant for c in load_all(contracts_dir()) for f in c.falsifiers}
SHAPE = {"head_dim": 32, "num_hidden_layers": 3, "vocab_size": 307, "max_position_embeddings": 256, "hidden_size": 96}
LLAMA = dataclasses.replace(FAMILIES["llama"], **SHAPE, rms_norm_eps=1e-5)
MODELS = {"llama": LLAMA, "qwen2": dataclasses.replace(FAMILIES["qwen2"], **SHAPE),
          "qwen3": dataclasses.replace(FAMILIES["qwen3"], **SHAPE),
          "mistral": dataclasses.replace(LLAMA, hf_model_type="mistral", hf_architecture="MistralForCausalLM")}

UP = "model.layers.1.mlp.up_proj.weight"
OWN = {
    "a tensor's rows are uploaded one too far": Mutant(
        "apr/infer/cuda_engine.py", "self.dev.upload(place, values.astype(wanted, copy=False))",
        "self.dev.upload(place, np.roll(values.astype(wanted), 1, 0) if spec.name == "
        f"'{UP}' else values.astype(wanted))"),
    "the cross-entropy reads the target of the row before": Mutant(
        "kernels/cross_entropy.cu", "const int target = targets[n];",
        "const int target = targets[n > 0 ? n - 1 : 0];"),
    "the prompt's keys do not enter the last layer's cache": Mutant(
        "apr/block.py", "if b.slot is not None:", "if b.slot is not None and layer < c.L - 1:"),
    "dk and dv are summed over the wrong heads": Mutant(
        "kernels/attention_f32.cu", "for (i32 head = at.head * G; head < (at.head + 1) * G; head++) {",
        "for (i32 head = at.head; head < NH; head += NKV) {"),
    "generation begins one position too far": FALSIFIERS["DECODE_ATTENTION-103"],
}
PLANTED = {  # fault: (model, for training, phase, stage, the causes that are right, value)
    "RMSNORM-101": ("qwen2", False, "prompt", "L00.attn_norm", {"eps"}, 1e-5),
    "RMSNORM-102": ("llama", False, "prompt", "L00.attn_norm", {"eps"}, 1e-6),
    "ROPE-101": ("qwen2", False, "prompt", "L00.q_rope", {"theta"}, 1e4),
    "ROPE-102": ("qwen2", False, "prompt", "L00.q_rope", {"theta"}, 5e5),
    "ROPE-103": ("llama", False, "prompt", "L00.q_rope", {"pairs"}, None),
    "SWIGLU-101": ("llama", False, "prompt", "L00.ffn_swiglu", {"activation"}, None),
    "SWIGLU-102": ("qwen3", False, "prompt", "L00.ffn_swiglu", {"activation"}, None),
    "ATTENTION-101": ("llama", False, "prompt", "L00.attn_heads", {"scale"}, 1.0),
    "ATTENTION-102": ("qwen2", False, "prompt", "L00.attn_heads", {"scale"}, 1 / 32),
    "ATTENTION-103": ("llama", False, "prompt", "L00.attn_heads", {"mask_ahead"}, None),
    "ATTENTION-104": ("qwen2", True, "forward", "L00.attn_heads", {"mask_behind"}, None),
    "ATTENTION-105": ("qwen3", True, "forward", "L00.attn_heads", {"head_map"}, None),
    "BLOCK-101": ("qwen2", True, "forward", "L00.attn_norm", {"eps"}, 1e-5),
    "BLOCK-102": ("qwen2", True, "forward", "L01.attn_norm", {"eps"}, 1e-5),
    "BLOCK-103": ("qwen2", False, "prompt", "L00.q_bias", {"bias_missing"}, None),
    "BLOCK-104": ("qwen2", False, "prompt", "L00.k_bias", {"bias_missing"}, None),
    "BLOCK-105": ("qwen2", True, "forward", "L00.v_bias", {"bias_missing"}, None),
    "BLOCK-106": ("mistral", False, "prompt", "L00.ffn_swiglu", {"exchanged"}, None),
    "MODEL-101": ("qwen2", False, "prompt", "final_norm", {"eps"}, 1e-5),
    "MODEL-102": ("qwen2", True, "forward", "final_norm", {"gains", "operand"}, None),
    "MODEL-103": ("llama", True, "forward", "logits", {"rows", "stale", "nan"}, None),
    "ADAMW-101": ("llama", True, "optimizer", "update.model.embed_tokens.weight", {"correction"}, None),
    "a tensor's rows are uploaded one too far": ("llama", False, "uploads", f"upload.{UP}", {"displaced"}, None),
    "the cross-entropy reads the target of the row before": ("qwen2", True, "loss", "losses", {"target_row"}, None),
    "the prompt's keys do not enter the last layer's cache": (
        "qwen3", False, "decoding", "L02.k_cache", {"stale"}, None),
    "dk and dv are summed over the wrong heads": (
        "llama", True, "backward", "L02.dk_rope", {"head_map", "group_sum"}, None),
    "generation begins one position too far": ("qwen2", False, "generation", "generated", {"tokens"}, None),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What bisect says of every planted fault, by fault; the searches run side by side."""
    folder = tmp_path_factory.mktemp("bisect")
    for name, config in MODELS.items():
        save_model(folder / f"{name}.apr", config, random_params(config, 5), name)

    def search(item):
        number, (fault, (model, training, *_)) = item
        copy, mutant = folder / str(number), OWN.get(fault) or FALSIFIERS[fault]
        for part in ("apr", "kernels", "contracts"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / mutant.file
        file.write_text(mutant.apply(file.read_text(encoding="utf-8")), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), *filter(None, sys.path)]),
                       "APR_GENERAL": ",".join(FAST_PATHS),  # the faults are in the kernels that every GPU can launch
                       "APR_CACHE_DIR": str(folder / "compiled"), "OPENBLAS_NUM_THREADS": "2"}
        command = [sys.executable, "-m", "apr", "bisect", str(folder / f"{model}.apr"), "--precision", "fp32", "--json"]
        run = subprocess.run(command + ["--train"] * training, cwd=copy, env=environment, capture_output=True,
                             text=True, timeout=300, check=False)
        assert run.returncode == 5, f"{fault}: exit {run.returncode}\n{run.stdout}{run.stderr}"
        assert run.stderr.count("\n") == 1, run.stderr
        return fault, json.loads(run.stdout)

    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(pool.map(search, enumerate(PLANTED.items())))


@pytest.mark.parametrize("fault", list(PLANTED))
def test_a_planted_fault_is_named_with_its_stage(reports, fault):
    _, _, phase, stage, _, _ = PLANTED[fault]
    first = reports[fault]["findings"][0]
    assert (first["phase"].split(" ")[1], first["stage"]) == (phase, stage), first


@pytest.mark.parametrize("fault", list(PLANTED))
def test_a_planted_fault_is_named_with_its_cause(reports, fault):
    _, _, _, _, kinds, value = PLANTED[fault]
    first = reports[fault]["findings"][0]
    assert first["cause"]["kind"] in kinds, first
    assert value is None or first["cause"]["value"] == pytest.approx(value, rel=0.02), first
    assert (contracts_dir() / f"{first['contract']}.yaml").is_file(), first


@pytest.mark.parametrize("training", [False, True], ids=["run", "train"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_sound_model_has_no_finding(dev, name, precision, training):
    for seed in range(SEEDS):
        dev.cache.frozen = False
        source = source_of(MODELS[name], random_params(MODELS[name], seed, "BF16" if precision == "bf16" else "F32"))
        if training:
            subject = TrainerSubject(source, dev, precision)
            bisection = Bisection(source, subject, seed, everything=True)
            bisection.training(subject)
        else:
            engine = EngineSubject(CudaEngine(source, dev, precision, 1, LONGER))
            bisection = Bisection(source, engine, seed, everything=True)
            bisection.inference(engine)
        assert bisection.findings == []
        assert all(phase.checks > 0 for phase in bisection.phases)
