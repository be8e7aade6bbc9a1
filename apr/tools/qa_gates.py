"""The gates of `apr qa`, each a method that measures one thing and says what it found, or why it could not."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from apr.buffers import STORAGE
from apr.config import Sampling
from apr.errors import AprError, ConfigError, UnavailableError
from apr.formats.facts import eos_ids
from apr.formats.source import ModelSource
from apr.infer.engine import Engine
from apr.infer.prompt import Prompter
from apr.params import param_specs
from apr.registry import inference_variants
from apr.tools.kernel_cache import open_store, verify
from apr.tools.parity import Report, against_model, against_reference, against_scores
from apr.tools.parity_prompts import Prompt, built_in
from apr.tools.qa import THRESHOLDS, Finding, NotRun, system_info
from apr.tools.weights import TensorFault

NAMES = ("capability_match", "tensor_contract", "metadata_plausibility", "golden_output", "parity", "format_parity",
         "throughput", "gpu_speedup", "performance_regression", "gpu_state_isolation", "state_isolation", "ptx_parity")
WARM_UP, ITERATIONS, PROMPT, TOKENS = 1, 3, 16, 32  # of a measurement of speed; prompt and generated tokens
PATIENCE = 30.0  # seconds after which a measurement makes do with the iterations that it has
CONTEXT = 128  # tokens in the engines' caches
SHORT = 60  # tokens of the prompts of format_parity on a CPU, which decodes slowly
EPS, THETA = (1e-7, 1e-4), (1e3, 1e8)  # what decoders are made with
QWEN_EPS = 1e-6  # of every Qwen2 and Qwen3; upstream once wrote 1e-5 into all files that it converted
WIDTH = 4  # times by which heads * head_dim may differ from the model's width


@dataclass
class Subject:
    """A model and how to compute with it. `make(source, kind)` makes an engine on 'cpu' or 'cuda' for CONTEXT tokens;
    `uploads` says how an engine's weights differ from the file's; `prompter` None: no tokenizer.
    """

    source: ModelSource
    prompter: Prompter | None
    kind: str
    precision: str
    make: Callable[[ModelSource, str], Engine]
    uploads: Callable[[Engine], list[tuple[str, TensorFault | None]]]
    other: ModelSource | None = None
    golden: tuple[list[Prompt], list[np.ndarray], float] | None = None  # as read_logits reads it
    previous: dict[str, Any] | None = None
    tokens_per_second: float | None = None
    gpu_speedup: float = THRESHOLDS["gpu_speedup"]
    regression_percent: float = THRESHOLDS["regression_percent"]

    @cached_property
    def engine(self) -> Engine:
        """The engine on the chosen device."""
        return self.make(self.source, self.kind)

    @cached_property
    def rate(self) -> float:
        """Tokens per second of decoding on the chosen device."""
        return decoding_rate(self.engine)


class Gates:
    """Every gate of a subject, by name, in order."""

    def __init__(self, subject: Subject) -> None:
        self.s = subject
        self.by_name: dict[str, Callable[[], Finding]] = {name: getattr(self, name) for name in NAMES}

    def capability_match(self) -> Finding:
        """The device's arithmetic covers the configuration: on a GPU every kernel that it needs exists."""
        c, s = self.s.source.config, self.s
        if s.kind == "cpu":
            return Finding(True, f"the NumPy engine computes every {c.hf_model_type}")
        try:
            count = len(inference_variants(c, STORAGE[s.precision], 1))
        except (UnavailableError, ConfigError) as e:
            return Finding(False, str(e))
        return Finding(True, f"{count} kernels in {s.precision} cover this {c.hf_model_type}", float(count))

    def tensor_contract(self) -> Finding:
        """Every parameter is finite and of plausible size. That all are there was checked at the opening."""
        odd, specs = [], param_specs(self.s.source.config)
        for spec in specs:
            values = self.s.source.read(spec.name).astype(np.float32, copy=False)
            odd += anomalies(spec.name, values, matrix=len(spec.shape) > 1)
        return Finding(not odd, "; ".join(odd[:3]) + f" ({len(odd)} in all)" if odd else f"{len(specs)} tensors",
                       float(len(odd)), 0.0)

    def metadata_plausibility(self) -> Finding:
        """Numbers that are not those of any decoder, or do not agree with the tokenizer."""
        odd = odd_metadata(self.s.source, self.s.prompter)
        return Finding(not odd, "; ".join(odd) if odd else "eps, theta, sizes, tokenizer and end ids are plausible",
                       float(len(odd)), 0.0)

    def golden_output(self) -> Finding:
        """The scores that another program left in a file."""
        if self.s.golden is None:
            raise NotRun("no --golden FILE")
        prompts, expected, rounding = self.s.golden
        return compared(against_scores(self._long_enough(prompts), self.s.source, prompts, expected, rounding))

    def parity(self) -> Finding:
        """The GPU against the reference."""
        s = self._on_gpu()
        return compared(against_reference(s.engine, s.source, self._prompts(), s.uploads(s.engine)))

    def format_parity(self) -> Finding:
        """The other file against this one."""
        s = self.s
        if s.other is None:
            raise NotRun("no --against OTHER")
        return compared(against_model(s.source, s.other, lambda source: s.make(source, s.kind), self._prompts()))

    def throughput(self) -> Finding:
        """Tokens per second of decoding one sequence."""
        device = "gpu" if self.s.kind == "cuda" else "cpu"
        wanted = self.s.tokens_per_second
        wanted = THRESHOLDS[f"tokens_per_second_{device}"] if wanted is None else wanted
        rate = self.s.rate
        return Finding(rate >= wanted, f"{rate:.1f} tokens/s on the {device.upper()}", rate, wanted)

    def gpu_speedup(self) -> Finding:
        """Tokens per second of the GPU over those of the CPU."""
        s = self._on_gpu()
        cpu = decoding_rate(s.make(s.source, "cpu"))
        ratio = s.rate / cpu
        return Finding(ratio >= s.gpu_speedup, f"{s.rate:.1f} tokens/s on the GPU, {cpu:.1f} on the CPU", ratio,
                       s.gpu_speedup)

    def performance_regression(self) -> Finding:
        """How far the throughput fell below that of an earlier report, in percent."""
        s = self.s
        if s.previous is None:
            raise NotRun("no --previous-report FILE")
        if s.previous["value"] is None:
            raise NotRun("the previous report measured no throughput")
        if (s.previous["device"], s.previous["precision"]) != (s.kind, s.precision):
            raise NotRun(f"the previous report is of {s.previous['device']} in {s.previous['precision']}, "
                         f"this one of {s.kind} in {s.precision}")
        if s.previous["system_info"] != system_info():
            raise NotRun("the previous report is of another machine, or of another driver")
        fall = 100 * (1 - s.rate / s.previous["value"])
        return Finding(fall <= s.regression_percent, f"{s.rate:.1f} tokens/s after {s.previous['value']:.1f}", fall,
                       s.regression_percent)

    def gpu_state_isolation(self) -> Finding:
        """A prompt gives equal bits before and after another one, on the GPU."""
        self._on_gpu()
        return self._isolated()

    def state_isolation(self) -> Finding:
        """The same on the CPU."""
        if self.s.kind != "cpu":
            raise NotRun("the engine is on a GPU: gpu_state_isolation")
        return self._isolated()

    def ptx_parity(self) -> Finding:
        """Every compiled kernel in the cache is what its key says: file, owner, hash, key, baked constants."""
        try:
            found = list(verify(open_store()))
        except AprError as e:
            raise NotRun(str(e)) from None
        if not found:
            raise NotRun("the kernel cache is empty")
        bad = [f"{key}: {problem}" for key, problem in found if problem]
        return Finding(not bad, "; ".join(bad[:3]) if bad else f"{len(found)} kernels", float(len(bad)), 0.0)

    def _on_gpu(self) -> Subject:
        if self.s.kind != "cuda":
            raise NotRun("needs a GPU")
        return self.s

    def _prompts(self) -> list[Prompt]:
        tokens = {} if self.s.kind == "cuda" else {"tokens": SHORT}
        return built_in(self.s.source.config, self.s.prompter, **tokens)

    def _long_enough(self, prompts: list[Prompt]) -> Engine:
        longest = max(len(p.ids) for p in prompts)
        if longest > self.s.engine.S:
            raise NotRun(f"its prompts have {longest} tokens, and qa compares {self.s.engine.S} at most: "
                         "'apr parity --logits' takes more")
        return self.s.engine

    def _isolated(self) -> Finding:
        """Scores both ways and a greedy continuation, each before and after a longer prompt."""
        engine, v = self.s.engine, self.s.source.config.V
        rng = np.random.default_rng(3)
        first, other = (rng.integers(0, v, min(n, engine.S // 2)).tolist() for n in (PROMPT, 3 * PROMPT))

        def outcome() -> list[bytes]:
            scores = [engine.scores([first], [n])[0].tobytes() for n in (len(first), 0)]
            return [*scores, *(t.tobytes() for t in engine.generate([first], Sampling(v), PROMPT))]

        before = outcome()
        for n in (len(other), 0):
            engine.scores([other], [n])
        list(engine.generate([other], Sampling(v), PROMPT))
        differing = sum(a != b for a, b in zip(before, outcome(), strict=True))
        return Finding(differing == 0, "equal bits after another prompt" if not differing else
                       f"{differing} of {len(before)} results differ after another prompt", float(differing), 0.0)


def compared(report: Report) -> Finding:
    """A comparison's verdict as a gate's: its value is the worst error as a share of its limit."""
    if report.verdict == "unmeasured":
        report.require()
    shares = [p.measured.relative_l2 / p.limit.relative_l2 for p in report.positions]
    shares += [t.relative_l2 / t.limit.relative_l2 for t in report.together]
    worst = max(shares, key=lambda x: math.inf if math.isnan(x) else x)
    text = f"{report.what}: {len(report.positions)} positions"
    if report.verdict != "pass":
        try:
            report.require()
        except AprError as e:
            text = str(e)
    return Finding(report.verdict == "pass", text, worst, THRESHOLDS["share_of_limit"])


def decoding_rate(engine: Engine) -> float:
    """Tokens per second after the first, one sequence, greedily: the median of a few generations."""
    prompt = np.random.default_rng(4).integers(0, engine.config.V, min(PROMPT, engine.S // 2)).tolist()
    limit, rates, begin = min(TOKENS, engine.S - len(prompt)), [], time.perf_counter()
    if limit < 2:
        raise NotRun(f"a context of {engine.S} tokens has no room to decode")
    for iteration in range(WARM_UP + ITERATIONS):
        steps = engine.generate([prompt], Sampling(engine.config.V), limit)
        next(steps)
        start = time.perf_counter()
        count = sum(1 for _ in steps)
        if iteration >= WARM_UP:
            rates.append(count / (time.perf_counter() - start))
        if rates and time.perf_counter() - begin > PATIENCE:
            break
    return statistics.median(rates)


def anomalies(name: str, values: np.ndarray, matrix: bool) -> list[str]:
    """What is odd about a parameter (float32), in words."""
    if not np.isfinite(values).all():
        return [f"{name}: {int((~np.isfinite(values)).sum())} values that are not finite"]
    t, largest = THRESHOLDS, float(np.abs(values).max())
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    limit = t["max_abs_matrix" if matrix else "max_abs_vector"]
    odd = [f"{name}: largest {largest:.4g} > {limit:g}"] if largest > limit else []
    odd += [f"{name}: mean {mean:.4g} beyond {t['mean']:g}"] if abs(mean) > t["mean"] else []
    return odd + ([f"{name}: standard deviation {std:.2g} < {t['std']:g}"] if matrix and std < t["std"] else [])


def odd_metadata(source: ModelSource, prompter: Prompter | None) -> list[str]:
    """What is implausible about a model's numbers, in words."""
    c, odd = source.config, []
    if not EPS[0] <= c.rms_norm_eps <= EPS[1]:
        odd.append(f"rms_norm_eps {c.rms_norm_eps:g} outside [{EPS[0]:g}, {EPS[1]:g}]")
    if c.hf_model_type.startswith("qwen") and not math.isclose(c.rms_norm_eps, QWEN_EPS, rel_tol=1e-6):
        odd.append(f"rms_norm_eps {c.rms_norm_eps:g}, where every {c.hf_model_type} has {QWEN_EPS:g}")
    if not THETA[0] <= c.rope_theta <= THETA[1]:
        odd.append(f"rope_theta {c.rope_theta:g} outside [{THETA[0]:g}, {THETA[1]:g}]")
    if not c.C / WIDTH <= c.NH * c.HS <= c.C * WIDTH:
        odd.append(f"{c.NH} heads of {c.HS} beside a width of {c.C}")
    ids, origin = eos_ids(source.assets, source.hf_config, str(source.path))
    odd += [f"end id {i} of {origin} beyond the vocabulary of {c.V}" for i in ids if i >= c.V]
    if prompter is not None:
        size = prompter.tokenizer.vocab_size
        odd += [f"a tokenizer of {size} ids beside a vocabulary of {c.V}"] if 2 * size < c.V else []
        odd += [] if prompter.eos else ["a tokenizer without an id that ends a text"]
    return odd


