"""Whether transformers loads what apr exported, and computes the same: run by hand, after apr wrote the folders.

    for m in llama mistral qwen2 qwen3 smollm; do
        apr import tests/golden/hf/$m -o /tmp/$m.apr && apr export /tmp/$m.apr --format hf -o /tmp/out/$m
    done
    /tmp/golden/bin/python tests/golden/check_export.py /tmp/out      (the environment of make_hf_models.py)

Every folder named like a golden model must give its scores bit for bit (the same library reads the same weights), its
tokens, and the same tokenizer and chat template. Prints one line a model; exit code 1 if one differs. With --loose the
scores may differ by a relative L2 of 2e-2, for weights exported in another type. Never imports apr.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

HF = Path(__file__).parent / "hf"
TALK = [{"role": "user", "content": "the cat sat"}]


def differences(folder: Path, loose: bool) -> list[str]:
    """What a loaded model does otherwise than the golden one."""
    expected = load_file(HF / folder.name / "expected.safetensors")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    found = [f"{kind} {sorted(names)[:3]}" for kind, names in told.items() if names]
    for i in range(2):
        scores, truth = model(input_ids=expected[f"prompt.{i}"][None].long()).logits[0], expected[f"logits.{i}"]
        error = float((scores - truth).norm() / truth.norm())
        if not (error <= (2e-2 if loose else 0)):
            found.append(f"scores of prompt {i}: relative L2 {error:.1e}")
    if not loose:
        ids = torch.cat([expected["prompt.1"], expected["greedy"]])[None].long()
        best = model(input_ids=ids).logits[0].argmax(-1)[len(expected["prompt.1"]) - 1:-1]
        if not torch.equal(best.int(), expected["greedy"]):
            found.append("greedy tokens")
    kept = transformers.GenerationConfig.from_pretrained(HF / folder.name)
    if model.generation_config.eos_token_id != kept.eos_token_id:
        found.append(f"eos ids {model.generation_config.eos_token_id}")
    if (HF / folder.name / "tokenizer.json").exists():
        ours, theirs = (transformers.AutoTokenizer.from_pretrained(p).apply_chat_template(TALK) for p in
                        (folder, HF / folder.name))
        if ours["input_ids"] != theirs["input_ids"]:
            found.append("tokenizer or chat template")
    return found


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = [p for p in sorted(Path(sys.argv[1]).iterdir()) if (HF / p.name).is_dir()]
    assert folders, "no folder here is named like a golden model"
    with torch.no_grad():
        results = {p.name: differences(p, "--loose" in sys.argv) for p in folders}
    for name, odd in results.items():
        print(f"{name}: {'; '.join(odd) or 'the same'}")
    sys.exit(any(results.values()))
