"""CudaEngine: generation on a GPU. A prompt goes through the layers in one pass, then every token is one CUDA graph.

All of a prompt but its last token is prefilled; that token is the first decoding step, so there is one way to a score.
The graph chooses the token and makes the next step's input itself: the host launches some steps ahead, reads the tokens
from pinned memory as they appear, and drops what was computed after a sequence had ended.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np

from apr.arena import Arena
from apr.buffers import STORAGE, inference_plan
from apr.config import Sampling
from apr.decode import Decoder
from apr.device import Device
from apr.dtypes import BY_NAME
from apr.errors import AprError, ConfigError, InferenceError
from apr.formats.source import ModelSource
from apr.formats.tensors import raw_bytes
from apr.gemm import Gemm
from apr.infer.engine import Engine, check_prompts
from apr.model import Model
from apr.ops.decode_attention import partial_size
from apr.ops.decode_linear import head_blocks
from apr.registry import inference_paths, inference_variants, warmup
from apr.taps import Tap

AHEAD = 8  # steps launched before the first of them is read
PENDING = -3  # in `tokens` before the step has ended
NOT_A_NUMBER = -2
SILENCE = 10.0  # seconds without a token after which the stream is asked whether it still lives
HASHERS = 8  # threads
BATCHES = (1, 2, 4, 8)  # kernels are compiled for these


class CudaEngine(Engine):
    """`source` on `device`, its weights in the storage of `precision` (bf16 or fp32).

    Raises UnavailableError or ConfigError for a model that the kernels do not cover or a batch over 8, OutOfMemoryError
    when the plan does not fit, and what reading the model raises. The source may be closed afterwards.
    """

    def __init__(self, source: ModelSource, device: Device, precision: str, B: int, S: int) -> None:
        self.config, self.dev, self.precision = source.config, device, precision
        self.B = next((size for size in BATCHES if size >= B), 0)
        if self.B == 0:
            raise ConfigError("--batch-size", f"at most {BATCHES[-1]} sequences at a time on a GPU", str(B), "lower it")
        self.S, self.device, storage = S, f"cuda:{device.ordinal}", STORAGE[precision]
        self.gate: Mapping[str, Any] = {"status": "not run", "reason": "the engine was not made by apr.load or apr run"}
        needed = inference_variants(self.config, storage, self.B, device.fast)
        self.path = inference_paths(self.config, storage, self.B, device.fast)
        bests = head_blocks(self.config, self.B, storage)
        self.arena = Arena(device, inference_plan(self.config, self.B, S, precision, bests,
                                                  partial_size(self.config, self.B)))
        warmup(device.cache, needed)
        self.net = Model(device, Gemm(device, self.arena["workspace"]), self.arena, self.config)
        self._upload(source)
        self.host_tokens, tokens = device.mapped((S, self.B), "i32")
        self.decoder = Decoder(self.net, tokens)
        self.graph: Any = None

    def _upload(self, source: ModelSource) -> None:
        """Every parameter to its place, rounded to the storage type where it is wider; and the hash of them all."""
        wanted = BY_NAME["BF16" if self.precision == "bf16" else "F32"].numpy
        with ThreadPoolExecutor(HASHERS) as pool:
            hashes = []
            for spec in self.net.layout.specs:
                place = self.arena.part("params", self.net.layout.offset(spec.name), spec.shape)
                values = source.read(spec.name)
                hashes.append(pool.submit(_fingerprint, spec.name, values))
                self.dev.upload(place, values.astype(wanted, copy=False))
            every = [repr(self.config), *(h.result() for h in hashes)]
        self.weights_sha256 = sha256("\n".join(every).encode()).hexdigest()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int) -> Iterator[np.ndarray]:
        """See Engine.generate."""
        check_prompts(self, prompts)
        steps = min(limit, self.S - max(map(len, prompts)))
        for slot, prompt in enumerate(prompts):
            self._prefill(slot, prompt[:-1])
        self._state([p[-1] for p in prompts], [len(p) - 1 for p in prompts], sampling, steps)
        self.decoder.start()
        launched = 0
        try:
            for step in range(steps):
                while launched < min(steps, step + AHEAD):
                    self._launch()
                    launched += 1
                yield self._wait_for(step)[:len(prompts)]
        finally:
            self.dev.synchronize()  # what was launched ahead still writes

    def _launch(self) -> None:
        """One step: kernel by kernel the first time, which loads what loads lazily, then as a graph."""
        if self.graph is None:
            self.decoder.step()
            recorded: list[Any] = []
            with self.dev.capture(recorded):
                self.decoder.step()
            self.graph = recorded[0]
        else:
            self.dev.replay(self.graph, "decoding step")

    def _wait_for(self, step: int) -> np.ndarray:
        row, patience = self.host_tokens[step], time.monotonic() + SILENCE
        while bool((row == PENDING).any()):
            if time.monotonic() > patience:
                if not self.dev.running() and bool((row == PENDING).any()):
                    raise AprError(f"decoding step {step}", "a token", "none, and the GPU is idle", "report this")
                patience = time.monotonic() + SILENCE
        if bool((row == NOT_A_NUMBER).any()):
            raise InferenceError(f"decoding step {step}", "scores that are numbers, the largest finite", "others",
                           "the weights overflow in this precision: try --precision fp32, or --device cpu")
        return row.copy()

    def _prefill(self, slot: int, prompt: Sequence[int], tap: Tap | None = None) -> Any:
        """Keys and values of the prompt into the cache; returns the batch, whose `final_norm` is there."""
        if not prompt:
            return None
        self.dev.upload(self.arena.rows("ids", (len(prompt),)), np.array(prompt, np.int32))
        batch = self.net.batch(1, len(prompt), tap, slot)
        self.net.forward(batch)
        return batch

    def _state(self, tokens: Sequence[int], positions: Sequence[int], sampling: Sampling, steps: int) -> None:
        """What the first step starts from; sequences that are not used go over position 0 onwards."""
        fill = [0] * (self.B - len(tokens))
        a, s, upload = self.arena, sampling, self.dev.upload
        upload(a["token"], np.array([*tokens, *fill], np.int32))
        upload(a["pos"], np.array([*positions, *fill], np.int32))
        upload(a["step"], np.zeros(self.B, np.int32))
        upload(a["settings"], np.array([s.vocab, s.seed, s.first, s.top_k, steps], np.int64))
        inverse = min(1 / s.temperature, float(np.finfo(np.float32).max)) if s.temperature else 0.0
        upload(a["odds"], np.array([inverse, s.top_p], np.float64))
        self.host_tokens[:steps] = PENDING

    def scores(self, prompts: Sequence[Sequence[int]], cached: Sequence[int], tap: Tap | None = None
               ) -> list[np.ndarray]:
        """See Engine.scores."""
        check_prompts(self, prompts, cached)
        out = []
        for slot, (prompt, n) in enumerate(zip(prompts, cached, strict=True)):
            batch = self._prefill(slot, prompt[:n], tap)
            out.append([] if batch is None else [*self.net.logits(batch)[0]])
            if tap is not None and batch is not None:
                tap("logits", np.stack(out[-1])[None])
        whole = Sampling(self.config.V)
        for step in range(max(len(p) - n for p, n in zip(prompts, cached, strict=True))):
            at = [min(n + step, len(p) - 1) for p, n in zip(prompts, cached, strict=True)]
            self._state([p[i] for p, i in zip(prompts, at, strict=True)], at, whole, 0)
            self.decoder.start()
            self.decoder.forward(tap)
            for rows, row, p, n in zip(out, self.dev.download(self.arena["scores"]), prompts, cached, strict=False):
                if n + step < len(p):
                    rows.append(row)
        return [np.stack(rows) for rows in out]


def _fingerprint(name: str, array: np.ndarray) -> str:
    return f"{name} {array.dtype} {sha256(raw_bytes(array)).hexdigest()}"
