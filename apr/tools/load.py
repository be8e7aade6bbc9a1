"""A model made ready to generate: the engine for a device, and the Python API `apr.load(path)`."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import Sampling, require
from apr.device import Device
from apr.errors import FormatError, UnavailableError
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.infer.cpu_engine import CpuEngine, load_params
from apr.infer.cuda_engine import CudaEngine
from apr.infer.engine import Engine
from apr.infer.generate import Completion, Generation
from apr.infer.prompt import Prompter, open_prompter
from apr.tools.device import Choice, choose_device
from apr.tools.gate import start_gate

CONTEXT = 4096  # tokens of `apr.load`, unless the model has fewer or the caller asks for others


def load_engine(source: ModelSource, choice: Choice, precision: str, B: int, S: int, warn: Callable[[str], None]
                ) -> Engine:
    """The engine for a model on the chosen device, its weights loaded.

    On a GPU the start gate must pass first (apr/tools/gate.py); engine.gate is its report. `warn` takes lines that a
    user must see. Raises GateError, UnavailableError for what the device cannot do, and as source.read.
    """
    if choice.kind == "cuda":
        engine = CudaEngine(source, Device(choice.ordinal, warn=warn), precision, B, S)
        engine.gate = start_gate(engine, source, warn)
        return engine
    if precision != "fp32":
        raise UnavailableError("--precision", "fp32 on the CPU", precision, "leave it out, or use a GPU")
    return CpuEngine(source.config, load_params(source), B, S)


def load(path: str | os.PathLike[str], device: str = "auto", *, precision: str | None = None, batch_size: int = 1,
         context: int | None = None) -> "Model":
    """A model, its weights loaded on a device; `context` tokens at most per sequence, CONTEXT where it is left out.

    Raises NotFoundError, FormatError, IntegrityError, ConfigError, StorageError, UnavailableError.
    """
    choice = choose_device(device)
    with open_model(Path(path)) as source:
        longest = source.config.max_position_embeddings
        size = min(CONTEXT, longest) if context is None else context
        require("context", size, f"from 1 to {longest}", 1 <= size <= longest, "apr.load")
        require("batch_size", batch_size, "at least 1", batch_size >= 1, "apr.load")
        prompter = open_prompter(source) if source.has_tokenizer else None
        engine = load_engine(source, choice, precision or choice.precision, batch_size, size, _say)
    return Model(engine, prompter, str(path))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


class Model:
    """A loaded model; `prompter` holds its tokenizer and chat template, None for a model without a tokenizer."""

    def __init__(self, engine: Engine, prompter: Prompter | None, where: str) -> None:
        self.engine, self.config, self.prompter, self.where = engine, engine.config, prompter, where

    def generate(self, prompt: str | Sequence[int] | Sequence[dict[str, Any]], *, max_tokens: int = 128,
                 temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
                 stop: str | Sequence[str] = ()) -> Completion:
        """The completion of a text (taken as it is), of token ids, or of messages ({"role", "content"}, by the chat
        template).

        Raises ConfigError for a value out of range, FormatError without a tokenizer, ShapeError for a prompt that is
        empty, too long or has unknown ids.
        """
        p = self._prompter()
        require("max_tokens", max_tokens, "at least 1", max_tokens >= 1, "generate")
        sampling = Sampling(vocab=p.tokenizer.vocab_size, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        generation = Generation(self.engine, p.tokenizer, [self._ids(p, prompt)], sampling, max_tokens=max_tokens,
                                eos=p.eos, stop=[stop] if isinstance(stop, str) else stop)
        for _ in generation:
            pass
        return generation.completions()[0]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token scores (T, V) float32 at every position of T ids. Raises ShapeError."""
        return self.engine.scores([ids], [len(ids)])[0]

    def _prompter(self) -> Prompter:
        if self.prompter is None:
            raise FormatError(self.where, "a tokenizer with the model", "none", "put tokenizer.json beside it")
        return self.prompter

    def _ids(self, p: Prompter, prompt: str | Sequence[int] | Sequence[dict[str, Any]]) -> list[int]:
        if isinstance(prompt, str):
            return p.raw(prompt)
        if prompt and isinstance(prompt[0], dict):
            return p.chat([json.loads(json.dumps(prompt))])[0]
        return [int(i) for i in prompt]  # type: ignore[arg-type]
