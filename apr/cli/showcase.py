"""What a finished run shows for itself: its loss curve in the terminal, and a sample of what the model writes."""

from pathlib import Path
from typing import Any, TextIO

from apr.config import Sampling
from apr.data.tokenizer import Tokenizer
from apr.formats.model_file import load_model
from apr.infer.cpu_engine import CpuEngine
from apr.strict import parse_json
from apr.train.log import NAME

WIDTH, HEIGHT = 64, 10
PROMPT = "def "
SAMPLE_TOKENS = 120
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille cell, by row and column


def print_curve(run_dir: Path, out: TextIO) -> None:
    """Training loss over steps in braille dots, and validation losses beside it."""
    log = run_dir / NAME
    events: list[dict[str, Any]] = [parse_json(line, str(log)) for line in log.read_bytes().splitlines()]
    losses = [e["train_loss"] for e in events if e["event"] == "step"]
    evals = [e for e in events if e["event"] == "eval"]
    if len(losses) < 2:
        return
    low, high = min(losses), max(losses)
    cells = [[0] * WIDTH for _ in range(HEIGHT)]
    for x in range(2 * WIDTH):
        begin = x * len(losses) // (2 * WIDTH)
        end = max((x + 1) * len(losses) // (2 * WIDTH), begin + 1)
        mean = sum(losses[begin:end]) / (end - begin)
        y = round((high - mean) / (high - low or 1) * (4 * HEIGHT - 1))
        cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    print(f"\ntraining loss, nats per token, steps 0 to {len(losses) - 1}", file=out)
    for row, line in enumerate(cells):
        label = f"{high:6.2f}" if row == 0 else f"{low:6.2f}" if row == HEIGHT - 1 else " " * 6
        print(f"{label} ┤{''.join(chr(0x2800 + c) for c in line).rstrip(chr(0x2800))}", file=out)
    print("validation " + " → ".join(f"{e['val_loss']:.3f}" for e in evals) + "\n", file=out)


def print_sample(run_dir: Path, out: TextIO) -> None:
    """What the newest epoch's model writes after PROMPT, at temperature 0.8."""
    path = max((run_dir / "ckpt").glob("epoch-*.apr"), default=None)
    if path is None:
        return
    config, params, metadata = load_model(path)
    tokenizer = Tokenizer.from_json(metadata["tokenizer.json"].encode(), str(path))
    ids = tokenizer.encode(PROMPT)
    sampling = Sampling(vocab=min(tokenizer.vocab_size, config.V), temperature=0.8, top_k=50, seed=1)
    tokens = []
    for step in CpuEngine(config, params, 1, config.max_position_embeddings).generate([ids], sampling, SAMPLE_TOKENS):
        if step[0] == tokenizer.eos_id:
            break
        tokens.append(int(step[0]))
    print(f"a sample of {path.name}, temperature 0.8:\n", file=out)
    print("    " + tokenizer.decode(ids + tokens).replace("\n", "\n    ") + "\n", file=out)
