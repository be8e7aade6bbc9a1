"""`apr plan`: the GPU memory that training a model takes, buffer by buffer, and whether it fits."""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

from apr.arena import RESERVE
from apr.buffers import STORAGE, Plan, plan, table
from apr.cli.config_file import read_config_file
from apr.cli.pretrain import UPSTREAM_TRAIN
from apr.config import TransformerConfig, TransformerTrainConfig, decode
from apr.driver import DeviceInfo, probe
from apr.errors import ConfigError, OutOfMemoryError, UnavailableError
from apr.presets import preset

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", help="the model")
    model.add_argument("--config", type=Path, metavar="FILE", help="a --config file of 'apr pretrain'")
    parser.add_argument("--batch-size", type=int, help="sequences of a micro-batch (16)")
    parser.add_argument("--seq-length", type=int, help="tokens of a sequence (1024)")
    parser.add_argument("--precision", choices=list(STORAGE), help="default bf16")
    parser.add_argument("--device", metavar="cuda[:N]", help="the GPU that it is to fit (default: the first, if any)")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory to fit instead of a GPU's")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan. Raises OutOfMemoryError after it when it does not fit, UnavailableError without --device's"""
    model, batch, length, precision = _asked(args)
    p = plan(model, batch, length, precision)
    where, have = _memory(args)
    if args.json:
        for b in p.buffers:
            print(json.dumps({"buffer": b.name, "role": b.role, "dtype": b.dtype, "shape": b.shape, "bytes": b.bytes,
                              "alias": b.alias}))
        print(json.dumps({"total": p.bytes, "roles": p.by_role(), "logits_rows": p.rows, "reserve": RESERVE,
                          "where": where, "have": have, "fits": have is None or p.bytes + RESERVE <= have}), flush=True)
    else:
        print(*table(p), sep="\n", flush=True)
    if have is not None and p.bytes + RESERVE > have:
        raise OutOfMemoryError(f"batch {batch} of {length} tokens in {precision}",
                               f"{(p.bytes + RESERVE) / GIB:.2f} GiB, {RESERVE / GIB:.2f} of it for CUDA itself",
                               f"{have / GIB:.2f} GiB ({where})", _remedy(p, have))
    if not args.json:
        print(f"fits: {(p.bytes + RESERVE) / GIB:.2f} of {have / GIB:.2f} GiB ({where})" if have is not None
              else f"no GPU here to fit; {(p.bytes + RESERVE) / GIB:.2f} GiB are needed")
    return 0


def _asked(args: argparse.Namespace) -> tuple[TransformerConfig, int, int, str]:
    """Model, batch size, length and precision of the flags, else of the file, else pretrain's defaults."""
    given = read_config_file(args.config) if args.config is not None else {}
    if "model" in given:
        model = decode(TransformerConfig, given["model"], "model")
    else:
        model = preset(args.preset or given.get("preset") or "llama_370m")
    flags = {"batch_size": args.batch_size, "max_seq_len": args.seq_length, "precision": args.precision}
    train = decode(TransformerTrainConfig,
                   {**asdict(TransformerTrainConfig()), **UPSTREAM_TRAIN, "precision": "bf16", **given.get("train", {}),
                    **{name: value for name, value in flags.items() if value is not None}}, "train")
    return model, train.batch_size, train.max_seq_len, train.precision


def _memory(args: argparse.Namespace) -> tuple[str, int | None]:
    """What the plan has to fit: in words, and its bytes; None where there is nothing."""
    if args.memory_gib is not None:
        if not 0 < args.memory_gib < 2**20:
            raise ConfigError("--memory-gib", "a size above 0", str(args.memory_gib), "correct it")
        return "--memory-gib", int(args.memory_gib * GIB)
    match = re.fullmatch(r"cuda(?::(\d{1,2}))?", args.device or "cuda")
    if match is None:
        raise ConfigError("--device", "cuda or cuda:N", repr(args.device), "correct it, or use --memory-gib")
    info, ordinal = probe(), int(match[1] or 0)
    if ordinal < len(info.devices):
        gpu: DeviceInfo = info.devices[ordinal]
        return f"cuda:{ordinal}, {gpu.name}", gpu.memory_bytes
    if args.device:
        raise UnavailableError(f"--device {args.device}", "that GPU", info.problem or f"{len(info.devices)} GPUs",
                               "leave it out, or use --memory-gib")
    return "", None


def _remedy(p: Plan, have: int) -> str:
    """What to lower: the largest batch that fits, or else the length."""
    def fits(batch: int, length: int) -> bool:
        return plan(p.config, batch, length, p.precision).bytes + RESERVE <= have

    batch = max((b for b in range(1, p.B) if fits(b, p.T)), default=0) if p.B <= 4096 else 0
    if batch:
        return f"lower --batch-size to {batch} (and raise --grad-accum)"
    length = p.T // 2
    while length and not fits(1, length):
        length //= 2
    return f"lower --batch-size to 1 and --seq-length to {length}" if length else "take a smaller model or a larger GPU"
