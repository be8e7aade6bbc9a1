"""`apr pretrain`: flags, a --config file and presets become a RunConfig; then one call."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from apr.cli.config_file import KEYS, read_config_file
from apr.cli.progress import Display, print_json
from apr.cli.showcase import print_curve, print_sample
from apr.config import TransformerConfig, TransformerTrainConfig, decode
from apr.errors import ConfigError
from apr.paths import say_overrides
from apr.presets import PRESETS, preset
from apr.tools.device import choose_device
from apr.tools.live_gate import LiveGate
from apr.train.corpus import DEMO
from apr.train.init import InitModel, open_init
from apr.train.pretrain import ON_DIVERGENCE, LoopConfig
from apr.train.run import pretrain, read_run, resume
from apr.train.run_config import MODES, RunConfig, check_370m, check_provisioned, check_resumed

# flag: (section of RunConfig, field); the section "" is RunConfig itself.
FIELDS = {
    "dataset": ("", "dataset"), "tokenizer": ("", "tokenizer"), "mode": ("", "mode"), "val_shard": ("", "val_shard"),
    "init": ("", "init"), "synthetic": ("", "synthetic"), "allow_shard_cycle": ("", "allow_shard_cycle"),
    "lr": ("train", "lr"), "num_steps": ("train", "max_steps"), "warmup_steps": ("train", "warmup_steps"),
    "batch_size": ("train", "batch_size"), "seq_length": ("train", "max_seq_len"), "seed": ("train", "seed"),
    "precision": ("train", "precision"), "force_init_loss": ("", "force_init_loss"), "weights": ("", "weights"),
    "parity_every": ("", "parity_every"), "keep": ("", "keep"), "milestone_every": ("", "milestone_every"),
    "step_timeout": ("", "step_timeout"), "max_skips": ("loop", "max_skips"),
    "on_divergence": ("loop", "on_divergence"),
    "grad_accum": ("train", "accumulation_steps"), "steps_per_epoch": ("loop", "steps_per_epoch"),
    "target_val_loss": ("loop", "target_val_loss"),
}
ON_RESUME = ("parity_every", "keep", "milestone_every", "step_timeout", "max_skips", "on_divergence")  # may be others
UPSTREAM_TRAIN = {"batch_size": 16, "max_seq_len": 1024, "max_steps": 1000, "weight_decay": 0.01, "max_grad_norm": 1.0}
DEMO_RUN = {
    "preset": "demo", "dataset": DEMO, "allow_shard_cycle": True, "val_batches": 16,
    "train": {"lr": 5e-3, "warmup_steps": 20, "max_steps": 400, "batch_size": 8, "max_seq_len": 128,
              "weight_decay": 0.1, "beta2": 0.95},
    "loop": {"steps_per_epoch": 100, "target_val_loss": 0.5}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; names and defaults are upstream's where upstream has them."""
    def help_of(name: str) -> str:
        return str(TransformerTrainConfig.__dataclass_fields__[name].metadata["help"])

    add = parser.add_argument
    add("--dataset", metavar="PATH", help="token shards, or a file or folder of text, JSONL or Parquet")
    add("--tokenizer", metavar="PATH",
        help="tokenizer.json or its folder, or one with vocab.json and merges.txt; "
             "without it the shards' or the model's own, or one is trained on the text")
    add("--run-dir", metavar="DIR", type=Path, required=True,
        help="where the run is kept; new, or with --resume an old one")
    add("--resume", action="store_true", help="go on with the run in --run-dir, from its newest checkpoint")
    add("--demo", action="store_true", help="train a small model on Python's standard library, about a minute")
    add("--preset", metavar="NAME", help="model shape: " + ", ".join(PRESETS) + " (default llama_370m)")
    add("--config", metavar="FILE", type=Path, help="YAML with any of: " + ", ".join(KEYS))
    add("--mode", choices=list(MODES), help="row of lr, warm-up and target; default from-scratch, with --init finetune")
    add("--lr", type=float, help=help_of("lr") + " (default: the mode's)")
    add("--num-steps", type=int, help=help_of("max_steps") + " (1000)")
    add("--warmup-steps", type=int, help=help_of("warmup_steps") + " (default: the mode's)")
    add("--batch-size", type=int, help=help_of("batch_size") + " (16)")
    add("--seq-length", type=int, help=help_of("max_seq_len") + " (1024)")
    add("--grad-accum", type=int, help=help_of("accumulation_steps") + " (1)")
    add("--steps-per-epoch", type=int, help="steps between validations and checkpoints (100)")
    add("--seed", type=int, help=help_of("seed") + " (42)")
    add("--target-val-loss", type=float, help="stop at this validation loss, nats per token (default: the mode's)")
    add("--vocab-size", type=int, help="the model's vocabulary (default: the preset's)")
    add("--precision", choices=("fp32", "bf16"), help=help_of("precision"))
    add("--device", metavar="cpu|cuda[:N]|auto", help="default auto")
    add("--init", metavar="MODEL",
        help="start from the weights of a model, with a fresh optimizer: .apr or GGUF file, Hugging Face folder, "
             "checkpoint or run; its tokenizer is used unless another is given")
    add("--force-init-loss", action="store_true", default=None,
        help="with --init: train although the loss before the first step is above 0.7 ln V, as of scrambled weights")
    add("--weights", choices=("f32", "bf16"),
        help="type of the weights in each epoch's .apr (default: bf16 where the model of --init is, else f32)")
    add("--force-under-provisioned", action="store_true",
        help="with --init: train although there are under 10 tokens per parameter")
    add("--val-shard", metavar="PATH", help="held-out shards; default: the head of the dataset, never trained on")
    add("--allow-shard-cycle", action="store_true", default=None,
        help="train on the data again when they end; otherwise the run ends")
    add("--synthetic", action="store_true", default=None,
        help="exercise the loop with made-up losses: no model, no data, no checkpoint")
    add("--json", action="store_true", help="print every event as a line of JSON on stdout")
    _add_care(parser)


def _add_care(parser: argparse.ArgumentParser) -> None:
    """What is to happen when something goes wrong, and what is kept: a resumed run may have others."""
    add = parser.add_argument
    add("--parity-every", type=int, metavar="K",
        help="on a GPU, hold every K-th step against the reference: a layer, losses, the optimizer (500; 0: none)")
    add("--max-skips", type=int, metavar="K",
        help="pass over up to K steps whose loss or gradient norm is not finite; one more ends the run (0)")
    add("--on-divergence", choices=ON_DIVERGENCE,
        help="when a guard trips: stop, or go back to the newest checkpoint and on past the data since (stop)")
    add("--step-timeout", type=float, metavar="SECONDS",
        help="end a run whose step takes longer (600 on a GPU, none on the CPU; 0: none)")
    add("--keep", type=int, metavar="N", help="checkpoints to keep, the newest (2)")
    add("--milestone-every", type=int, metavar="K",
        help="keep the checkpoints of steps that K divides for good, beside the newest (0: none)")


def run(args: argparse.Namespace) -> int:
    """Train, or resume. Returns 0 when the run came to its end, early or not."""
    chosen = choose_device(args.device)
    device = chosen.text
    say_overrides(lambda line: print(line, file=sys.stderr))
    with Display(sys.stderr) as display:
        sinks: list[Callable[[dict[str, Any]], None]] = [display]
        if args.json:
            sinks.append(print_json)
        if args.resume:
            saved = read_run(args.run_dir)
            saved = _replaced(saved, {name: getattr(args, name) for name in ON_RESUME})
            check_resumed(saved, _merge(asdict(saved), {}, args, saved.model), str(args.run_dir))
            config = saved
            end = resume(saved, args.run_dir, device, sinks, display.warn, *watch_of(saved, device, args))
        else:
            with ExitStack() as stack:
                init = open_asked(args)
                if init is not None:
                    stack.enter_context(init)
                config = build_config(args, chosen.precision, init)
                if init is not None:
                    advice = check_provisioned(config.model, config.train, args.force_under_provisioned)
                    if advice:
                        display.warn(advice)
                end = pretrain(config, args.run_dir, device, sinks, init, *watch_of(config, device, args))
    if not args.json:
        if not config.synthetic:
            print_curve(args.run_dir, sys.stdout)
        if config.dataset == DEMO:
            print_sample(args.run_dir, sys.stdout)
        final = "none" if end["final_val_loss"] is None else f"{end['final_val_loss']:.4f}"
        print(f"{end['status']}: {end['detail']}. Validation loss {end['initial_val_loss']:.4f} -> {final} "
              f"nats per token. Run: {args.run_dir}")
    return 0


def watch_of(config: RunConfig, device: str, args: argparse.Namespace) -> tuple[LiveGate | None, list[str]]:
    """The gate that holds steps of this run against the reference, or None; and what the log should say of it."""
    if config.parity_every == 0:
        return None, []
    if device != "cpu":
        return LiveGate(config.parity_every, config.train.seed), []
    asked = args.parity_every is not None or "parity_every" in _given(args)
    return None, ["--parity-every is for a GPU: on the CPU the reference itself trains"] if asked else []


def open_asked(args: argparse.Namespace) -> InitModel | None:
    """The model of --init, or of the --config file's `init`, open; None for a run from scratch.

    Raises ConfigError beside another shape of model, and what open_init raises.
    """
    given = _given(args)
    path = args.init or given.get("init")
    if path is None:
        return None
    if args.preset or args.vocab_size or "preset" in given or "model" in given:
        raise ConfigError("--init", "the model's shape to come from the model alone",
                          "a preset, model or vocabulary beside it", "drop them")
    return open_init(Path(path))


def build_config(args: argparse.Namespace, precision: str = "fp32", init: InitModel | None = None) -> RunConfig:
    """The configuration of a new run; `precision` is the device's own, `init` as open_asked gives it.

    Raises ConfigError, NotFoundError, FormatError.
    """
    given = _given(args)
    model = _model(args, given) if init is None else init.config
    mode = args.mode or given.get("mode") or ("from-scratch" if init is None else "finetune")
    row = MODES[mode]
    base = {"train": {**UPSTREAM_TRAIN, "lr": row["lr"], "warmup_steps": int(row["warmup_steps"]),
                      "precision": precision},
            "loop": {**asdict(LoopConfig()), "target_val_loss": row["target_val_loss"]}, "mode": mode, "dataset": None,
            "tokenizer": None, "val_shard": None, "val_batches": 16, "allow_shard_cycle": False, "synthetic": False,
            "init": None, "weights": "f32" if init is None else init.dtype.lower()}
    return _merge(base, given, args, model)


def _replaced(saved: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """The saved run with the flags that were given: those that decide what happens when something goes wrong."""
    given = {name: value for name, value in flags.items() if value is not None}
    loop = replace(saved.loop, **{n: v for n, v in given.items() if FIELDS[n][0] == "loop"})
    return replace(saved, loop=loop, **{n: v for n, v in given.items() if not FIELDS[n][0]})


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What --demo and the --config file say."""
    given: dict[str, Any] = {**DEMO_RUN} if args.demo else {}
    return given if args.config is None else _merge_sections(given, read_config_file(args.config))


def _merge(base: dict[str, Any], given: dict[str, Any], args: argparse.Namespace,
           model: TransformerConfig) -> RunConfig:
    """base, overridden by given (a --config file), overridden by flags."""
    values = _merge_sections(base, given)
    for flag, (section, name) in FIELDS.items():
        value = getattr(args, flag)
        if value is not None:
            (values[section] if section else values)[name] = value
    train = values["train"]
    if "lr_min" not in train or args.lr is not None:  # upstream's rule
        train["lr_min"] = min(max(0.01 * train["lr"], 1e-7), train["lr"])
    decoded = decode(TransformerTrainConfig, train, "train")
    plain = {k: v for k, v in values.items() if k not in ("preset", "model", "train")}
    return decode(RunConfig, {**plain, "model": asdict(model), "train": asdict(decoded)}, "configuration")


def _merge_sections(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = {**base, **over}
    for section in ("train", "loop"):
        out[section] = {**base.get(section, {}), **over.get(section, {})}
    return out


def _model(args: argparse.Namespace, given: dict[str, Any]) -> TransformerConfig:
    if "model" in given and not args.preset:
        model = decode(TransformerConfig, given["model"], "model")
    else:
        model = preset(args.preset or given.get("preset") or "llama_370m")
    if model == PRESETS["llama_370m"]:
        check_370m(model)
    return replace(model, vocab_size=args.vocab_size) if args.vocab_size is not None else model
