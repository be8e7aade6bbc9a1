"""Tiny models of every family as Hugging Face transformers itself saves them, and what it computes from those files.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers safetensors
    /tmp/golden/bin/python tests/golden/make_hf_models.py

Not run by the tests and never importing apr. Each folder of tests/golden/hf is one model as save_pretrained leaves it,
and expected.safetensors: two prompts, their scores at every position in float32 (from the weights as they are stored),
and the 64 most likely tokens one after the other from the second prompt. The weights are random but shaped so that
every constant matters (fill); the seed is the first at which those tokens are no coin toss: the best score leads the
next by more than 1e-3 of the largest, at every step.
"""

import hashlib
import shutil
from pathlib import Path

import tokenizers
import torch
import transformers
from make_golden import LLAMA3, fill
from safetensors.torch import save_file

HF = Path(__file__).parent / "hf"
V, TOKENS, LENGTHS, LEAD, DISTINCT = 307, 64, (41, 6), 1e-3, 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def shape(hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, layers: int, theta: float, eps: float,
          tied: bool) -> dict:
    return {"vocab_size": V, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "intermediate_size": inner, "num_hidden_layers": layers, "rms_norm_eps": eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "tie_word_embeddings": tied,
            "max_position_embeddings": 256, "hidden_act": "silu"}


# name: (configuration, stored as, ids that end a text, whether it has a tokenizer, most bytes of a file)
MODELS = {
    "llama": (transformers.LlamaConfig(**{**shape(60, 6, 2, 10, 100, 3, 1e4, 1e-5, False), "rope_parameters": LLAMA3}),
              torch.float32, 2, False, "1GB"),
    "mistral": (transformers.MistralConfig(**shape(96, 3, 1, 32, 112, 2, 1e6, 1e-5, False), sliding_window=4096),
                torch.bfloat16, 2, False, "1GB"),
    "qwen2": (transformers.Qwen2Config(**shape(112, 14, 2, 8, 100, 2, 1e6, 1e-6, True)), torch.float32, [2, 0], True,
              "270KB"),
    "qwen3": (transformers.Qwen3Config(**shape(64, 4, 2, 32, 100, 2, 1e6, 1e-6, True)), torch.bfloat16, [2, 0], False,
              "1GB"),
    "smollm": (transformers.LlamaConfig(**shape(96, 3, 1, 32, 132, 2, 1e5, 1e-5, True)), torch.float16, 2, True, "1GB"),
}


def train_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries, so that the last of the model's 307 are padding; with a chat template."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    texts = ["the cat sat on the mat and saw the rain fall over the old green hills", "def f(x): return x + 1"] * 9
    inner.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    assert inner.get_vocab_size() == 300
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=SPECIAL[2], pad_token=SPECIAL[0],
                                                chat_template=TEMPLATE)


def greedy(model: torch.nn.Module, prompt: torch.Tensor, refused: set[int]) -> list[int] | None:
    """The most likely tokens; None when a step is a near tie, one of `refused` comes up, or they hardly vary."""
    ids = prompt.tolist()
    for _ in range(TOKENS):
        scores = model(input_ids=torch.tensor([ids])).logits[0, -1]
        best, second = scores.topk(2).values.tolist()
        ids.append(int(scores.argmax()))
        if best - second <= LEAD * scores.abs().max() or ids[-1] in refused:
            return None
    found = ids[len(prompt):]
    return found if len(set(found)) >= DISTINCT else None


def attempt(name: str, seed: int, folder: Path) -> dict | None:
    """Save a model of this seed and compute from its files; None when its tokens will not do."""
    config, dtype, eos, with_tokenizer, most = MODELS[name]
    rng = torch.Generator().manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    fill(model, rng, branch=0.008)
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=0, do_sample=True,
                                                            temperature=0.7, top_p=0.8)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=most)
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                               attn_implementation="eager").eval()
    prompts = [torch.randint(3, 300, (n,), generator=rng) for n in LENGTHS]
    refused = {*(eos if isinstance(eos, list) else [eos]), *range(300, V)}
    tokens = greedy(stored, prompts[1], refused)
    if tokens is None:
        return None
    if with_tokenizer:
        train_tokenizer().save_pretrained(folder)
    out = {"greedy": torch.tensor(tokens).int()}
    for i, ids in enumerate(prompts):
        out |= {f"prompt.{i}": ids.int(), f"logits.{i}": stored(input_ids=ids[None]).logits[0].contiguous()}
    return out


def make(name: str) -> None:
    folder = HF / name
    for seed in range(1000):
        out = attempt(name, seed, folder)
        if out is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed will do")
    save_file(out, folder / "expected.safetensors", metadata={
        "seed": str(seed), "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}"})
    files = sorted(folder.glob("model*.safetensors"))
    assert len(files) == (3 if name == "qwen2" else 1), files
    print(f"{name}: seed {seed}, {sum(p.stat().st_size for p in folder.iterdir()) / 1024:.0f} KiB, "
          f"{len(set(out['greedy'].tolist()))} different tokens")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        for model_name in MODELS:
            make(model_name)
    (HF / "SHA256SUMS").write_text("".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(HF).as_posix()}\n"
        for p in sorted(HF.rglob("*")) if p.is_file() and p.name != "SHA256SUMS"))
