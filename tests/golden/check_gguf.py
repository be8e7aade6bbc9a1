"""Files that apr writes, run by llama.cpp: does it load them, and does it compute what the NumPy reference computes?

    python -m venv /tmp/peer && /tmp/peer/bin/pip install llama-cpp-python
    python tests/golden/check_gguf.py --peer-python /tmp/peer/bin/python

Not run by the tests: llama.cpp is built from source in minutes. For small models of each family (biases, q and k norms,
rope scaling, wide heads, tied and untied) written in each type: logits at every position against model_forward, the
token ids of some texts, and what llama.cpp takes for the ends of a text. The weights are random but sharp enough that
another pairing of q and k rows, theta, eps or a dropped bias would show: the script makes those mistakes too, and
demands that they do show.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from gguf_files import byte_level, model_source, sentencepiece
from models import FAMILIES

from apr.config import RopeScaling
from apr.data.tokenizer import Tokenizer
from apr.formats import gguf_write
from apr.formats.gguf_model import open_gguf_model
from apr.formats.gguf_write import PROBES, check_gguf, write_gguf
from apr.params import param_specs
from apr.reference.model import model_forward

PEER = """
import json, sys
import llama_cpp, numpy
task = json.load(open(sys.argv[1]))
m = llama_cpp.Llama(task["path"], n_ctx=64, n_batch=64, logits_all=True, verbose=False, n_gpu_layers=0,
                    type_k=0, type_v=0, flash_attn=False)
m.eval(task["ids"])
numpy.save(task["out"], m.scores[:len(task["ids"])])
vocab = llama_cpp.llama_model_get_vocab(m.model)
plain = [m.tokenize(t.encode(), add_bos=False, special=False) for t in task["texts"]]
ends = [i for i in range(m.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
print(json.dumps([plain, ends, m.tokenize(b"", add_bos=True)]))
"""
TOLERANCE = {"F32": 1e-5, "BF16": 3e-2, "F16": 1e-3, "Q8_0": 3e-2}  # relative L2; llama.cpp rounds activations too
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 512, "rms_norm_eps": 1e-5}
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def models():
    """Configurations by name, each with a tokenizer.json."""
    sizes = dict(SHAPE, head_dim=32)
    llama = dataclasses.replace(FAMILIES["llama"], **sizes)
    return {
        "llama": (llama, byte_level("smollm", 500)),
        "gpt-2": (llama, byte_level("gpt-2", 500)), "default": (llama, byte_level("default", 500)),
        "llama-spm": (llama, sentencepiece()),
        "llama3": (dataclasses.replace(llama, rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True),
                   byte_level("llama-bpe", 500)),
        "mistral": (dataclasses.replace(llama, hf_model_type="mistral", hf_architecture="MistralForCausalLM",
                                        head_dim=64), byte_level("tekken", 500)),
        "qwen2": (dataclasses.replace(FAMILIES["qwen2"], **sizes), byte_level("qwen2", 500)),
        "qwen3": (dataclasses.replace(FAMILIES["qwen3"], **{**sizes, "head_dim": 64}), byte_level("qwen2", 500)),
    }


def weights(config, rng):
    """Random parameters at which every constant of the model shows."""
    out = {}
    for spec in param_specs(config):
        noise = rng.standard_normal(spec.shape).astype(np.float32)
        scale = (0.02 if "embed" in spec.name else 0.004 if "o_proj" in spec.name or "down_proj" in spec.name
                 else 1.0 if spec.name.endswith("bias") else 0.2)
        out[spec.name] = (1 + 0.2 * noise if spec.name.endswith("norm.weight") else scale * noise).astype(np.float32)
    return out


def ask(python, path, ids, texts, folder):
    """llama.cpp's logits (T, V), the ids of each text, the ids that end a text, and what it puts first."""
    (folder / "peer.py").write_text(PEER)
    (folder / "task.json").write_text(json.dumps({"path": str(path), "ids": ids, "texts": texts,
                                                  "out": str(folder / "logits.npy")}))
    run = subprocess.run([python, str(folder / "peer.py"), str(folder / "task.json")], capture_output=True, text=True,
                         check=False)
    if run.returncode:
        raise RuntimeError(f"llama.cpp ended with {run.returncode}: {run.stderr[-200:].strip()}")
    return np.load(folder / "logits.npy"), *json.loads(run.stdout.splitlines()[-1])


def difference(found, expected):
    """Relative L2 of centred logits."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(python, name, config, tokenizer, dtype, folder):
    """One model in one type; prints a line and returns whether all is equal."""
    rng = np.random.default_rng(7)
    arrays = weights(config, rng)
    source = model_source(config, arrays, {"tokenizer.json": tokenizer})
    path = folder / "model.gguf"
    write_gguf(path, source, dtype)
    check_gguf(path, source, dtype)
    with open_gguf_model(path) as back:
        rounded = {n: back.read(n).astype(np.float32) for n in back.shapes}
        ends = json.loads(back.assets["generation_config.json"])["eos_token_id"]
    ids = rng.integers(0, 300, 48).tolist()
    expected = model_forward(rounded, config, np.array([ids]))[0]
    theirs = Tokenizer.from_json(tokenizer.encode(), name)
    texts = [t for t in PROBES if t and unicodedata.is_normalized("NFC", t)]  # Qwen's normalises, llama.cpp does not
    try:
        found, plain, eog, _first = ask(python, path, ids, texts, folder)
    except RuntimeError as e:  # -4: this build of llama.cpp has instructions that this processor lacks
        print(f"NONE {name:10} {dtype:5} {e}", flush=True)
        return False
    error = difference(found, expected)
    wrong = [t for t, p in zip(texts, plain, strict=True) if p != theirs.encode(t)]
    ok = error <= TOLERANCE[dtype] and set(ends) <= set(eog) and not wrong
    print(f"{'ok  ' if ok else 'FAIL'} {name:10} {dtype:5} relative L2 {error:.1e}, same argmax "
          f"{np.mean(found.argmax(-1) == expected.argmax(-1)):.0%}, texts {len(texts) - len(wrong)}/{len(texts)} equal"
          f"{' but ' + repr(wrong[0][:30]) if wrong else ''}, ends {eog}", flush=True)
    return ok


def mistakes(python, folder):
    """Deliberate mistakes: each must show in the logits."""
    rng, (config, tokenizer) = np.random.default_rng(7), models()["llama"]
    arrays, ids, path = weights(config, rng), rng.integers(0, 300, 48).tolist(), folder / "wrong.gguf"
    expected = model_forward(arrays, config, np.array([ids]))[0]
    plain, shown = gguf_write.adjacent_rows, []
    for what, permute, other in (("q and k rows not reordered", lambda a, heads: a, config),
                                 ("theta 20000", plain, dataclasses.replace(config, rope_theta=2e4)),
                                 ("eps 1e-6", plain, dataclasses.replace(config, rms_norm_eps=1e-6))):
        gguf_write.adjacent_rows = permute
        write_gguf(path, model_source(other, arrays, {"tokenizer.json": tokenizer}), "F32")
        gguf_write.adjacent_rows = plain
        error = difference(ask(python, path, ids, [], folder)[0], expected)
        shown.append(error > 3 * TOLERANCE["F32"])
        print(f"{'ok  ' if shown[-1] else 'FAIL'} shows: {what}: relative L2 {error:.1e}", flush=True)
    return all(shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        done = [check(args.peer_python, what, config, tokenizer, dtype, folder)
                for what, (config, tokenizer) in models().items() for dtype in TOLERANCE]
        done.append(mistakes(args.peer_python, folder))
    return int(not all(done))


if __name__ == "__main__":
    raise SystemExit(main())
