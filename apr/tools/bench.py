"""What `apr bench` measures, and our side of benchmarks/bench_step.py: a step's rate, memory, groups and ops; decoding.

Memory is what the device holds more after the trainer was made and has made steps than before its arena: the plan's
buffers, and what CUDA adds for code and graphs. The context that a process has before that is `context_gib`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from apr import registry
from apr.buffers import STORAGE
from apr.config import Sampling, TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.device import Device
from apr.infer.cuda_engine import CudaEngine
from apr.tools import decode_speed
from apr.tools.step_cost import PEAK, PRODUCT, floors, flops_per_token, step_costs
from apr.tools.timed_device import GROUPS, TimedDevice, by_name, group_of, step_times
from apr.tools.timing import Lab, ceilings
from apr.train.cuda_trainer import CudaTransformerTrainer

GIB = 2**30
WARM_STEPS = 6  # the first runs kernel by kernel, the second is recorded
OPS = {**{group: op for op, group in GROUPS.items()},
       **{f"products {name}": "linear" for name in ("forward", "dinput", "dweight")},
       "attention forward": "attention", "attention backward": "attention"}  # the op of a group
REPEATS = 15  # of each measurement of decoding

Row = dict[str, Any]
Say = Callable[[str], None]


def paths(model: TransformerConfig, precision: str, dev: Device) -> Mapping[str, str]:
    """Which path each op that has a fast one takes with this model on this GPU."""
    return registry.paths(model, STORAGE[precision], dev.fast)


def seconds_a_step(start: Callable[[Any], Callable[[], Any]], batches: Sequence[Any]) -> float:
    """Of one step, by the clock: `start(batch)` starts it, and what that returns waits for its loss and norm.

    A step's numbers are read when the next one has been started, as the training loop does; the last one's at the end.
    """
    begin, read = time.perf_counter(), None
    for batch in batches:
        following = start(batch)
        if read is not None:
            read()
        read = following
    if read is not None:
        read()
    return (time.perf_counter() - begin) / len(batches)


def used(dev: Device) -> int:
    """Bytes of device memory that anyone holds."""
    free, total = dev.free_bytes()
    return total - free


def train_config(batch: int, length: int, precision: str) -> TransformerTrainConfig:
    """How a measured model is trained."""
    return TransformerTrainConfig(lr=1e-4, batch_size=batch, max_seq_len=length, precision=precision, weight_decay=0.1,
                                  beta2=0.95)


def random_batches(model: TransformerConfig, batch: int, length: int, count: int) -> list[LMBatch]:
    """Random tokens."""
    rng = np.random.default_rng(1)
    return [LMBatch.from_rows(rng.integers(0, model.V, (batch, length + 1))) for _ in range(count)]


def speed(seconds: Sequence[float], model: TransformerConfig, batch: int, length: int, prefix: str = "") -> Row:
    """Milliseconds of a step (median, p20 and p80 of rounds), tokens per second, and both shares of what is possible.

    `of_measured` is as MFU, of PRODUCT instead of PEAK.
    """
    median, low, high = (float(x) for x in np.percentile(seconds, [50, 20, 80]))
    rate, per_token = batch * length / median, flops_per_token(model, length)
    out = {"ms": 1e3 * median, "p20_ms": 1e3 * low, "p80_ms": 1e3 * high, "tok_s": rate, "mfu": rate * per_token / PEAK,
           "of_measured": rate * per_token / PRODUCT}
    return {prefix + name: value for name, value in out.items()}


class OurStep:
    """A trainer with random weights at a shape, warmed up; `steps` steps are a round. `weights`: given ones instead.

    Raises what CudaTransformerTrainer raises.
    """

    def __init__(self, dev: TimedDevice, model: TransformerConfig, batch: int, length: int, precision: str,
                 steps: int = 5, weights: dict[str, np.ndarray] | None = None) -> None:
        self.dev, self.model, self.batch, self.length, self.precision = dev, model, batch, length, precision
        config, make = train_config(batch, length, precision), CudaTransformerTrainer
        self.batches, self.lr = random_batches(model, batch, length, steps), config.lr
        gc.collect()  # what a trainer before this one held
        before = used(dev)
        self.trainer = make.new(model, config, dev) if weights is None else make.with_model(model, weights, config, dev)
        for i in range(WARM_STEPS):
            self.trainer.train_batch(self.batches[i % steps])
        self.gib, self.plan_gib = (used(dev) - before) / GIB, self.trainer.arena.plan.bytes / GIB
        self.context_gib = before / GIB

    def round(self) -> float:
        """Seconds of a step, over one round, by the clock: with sorting ids, uploads and the reading of the loss."""
        return seconds_a_step(lambda batch: self.trainer.start_batch(batch, self.lr).result, self.batches)

    def memory(self) -> Row:
        """GiB as measured and as planned, and how far off the plan is."""
        return {"gib": self.gib, "plan_gib": self.plan_gib, "off_plan": self.gib / self.plan_gib - 1}

    def times(self) -> list[list[tuple[str, float]]]:
        """Milliseconds of every launch of some steps, kernel by kernel."""
        return step_times(self.dev, self.trainer, self.batches)

    def groups(self, rates: Mapping[str, float]) -> list[Row]:
        """Milliseconds of each group of kernels beside its floor; a group that is fused into another has 0."""
        found = by_name(self.times(), group_of)
        least = floors(step_costs(self.model, self.batch, self.length, self.precision), rates, self.precision)
        return [{"group": group, "ms": found.get(group, (0.0, 0.0))[0], "floor_ms": least.get(group)}
                for group in [*found, *(g for g in least if g not in found)]]


def measure_step(dev: TimedDevice, model: TransformerConfig, batch: int, length: int, precision: str, rounds: int,
                 steps: int, say: Say) -> Iterator[Row]:
    """A row for the step, then one for each group of its kernels. Raises what CudaTransformerTrainer raises."""
    say("making the model, and the first steps")
    ours = OurStep(dev, model, batch, length, precision, steps)
    say(f"{rounds} rounds of {steps} steps")
    seconds = [ours.round() for _ in range(rounds)]
    say("what this GPU does at best; the step kernel by kernel")
    rates, path = ceilings(Lab(dev)), paths(model, precision, dev)
    yield {"bench": "step", **speed(seconds, model, batch, length), **ours.memory(), "context_gib": ours.context_gib,
           "copy_gbps": rates["copy"] / 1e9, "product_tflops": rates[STORAGE[precision]] / 1e12, "paths": dict(path)}
    for row in ours.groups(rates):
        yield {"bench": "group", **row, "path": path.get(OPS.get(row["group"], ""), "general")}


def measure_ops(dev: TimedDevice, model: TransformerConfig, batch: int, length: int, precision: str, only: str | None,
                say: Say) -> Iterator[Row]:
    """A row for each op of a training step, or for one, as the step launches it: with its kernels and its floor."""
    say("making the model, and the first steps")
    ours = OurStep(dev, model, batch, length, precision, 1)
    say("the step kernel by kernel; what this GPU does at best")
    rounds, rates, path = ours.times(), ceilings(Lab(dev)), paths(model, precision, dev)
    least = floors(step_costs(model, batch, length, precision), rates, precision)
    kernels: dict[str, list[Row]] = {}
    names = {name: OPS.get(group_of(name), group_of(name)) for launches in rounds for name, _ in launches}
    for name, (ms, launches) in by_name(rounds, str).items():
        kernel = name.partition(" of ")[0]
        kernels.setdefault(names[name], []).append({"kernel": kernel, "launches": launches, "us": 1e3 * ms / launches,
                                                    **product_rate(kernel, 1e-3 * ms / launches)})
    for op, of in kernels.items():
        floor = sum(ms for group, ms in least.items() if OPS.get(group, group) == op)
        if only in (None, op):
            yield {"bench": "op", "op": op, "ms": sum(k["us"] * k["launches"] for k in of) / 1e3,
                   "floor_ms": floor or None, "path": path.get(op, "general"), "kernels": of}


def product_rate(name: str, seconds: float) -> Row:
    """TFLOP/s of a product by its name, "1152x16384x896-TN-bf16-bf16-0"; nothing for a kernel."""
    sizes = name.split("-")[0].split("x")
    if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        return {}
    m, n, k = map(int, sizes)
    return {"tflops": 2 * m * n * k / seconds / 1e12}


def measure_decode(dev: TimedDevice, model: TransformerConfig, batch: int, context: int, prompt: int, precision: str,
                   say: Say) -> Iterator[Row]:
    """Rows of generation with random weights: step and generate after `context` tokens, first and prefill of `prompt`.

    What each is: benchmarks/bench_decode.py. Raises what CudaEngine raises.
    """
    say("making the model")
    arrays = decode_speed.random_model(model, precision)
    S = max(context, prompt) + decode_speed.STEPS + 8
    with decode_speed.source_of(model, arrays, precision) as source:
        engine = CudaEngine(source, dev, precision, batch, S)
    del arrays
    say("decoding")
    prompts, how = decode_speed.prompts_of(model, batch, context), Sampling(model.V)
    found = [(what, function(engine, prompts, how, decode_speed.STEPS, REPEATS))
             for what, function in (("step", decode_speed.step_seconds), ("generate", decode_speed.generate_seconds))]
    first, prefill = decode_speed.first_seconds(engine, prompt, REPEATS)
    copy = ceilings(Lab(dev))["copy"]
    size = decode_speed.step_bytes(model, 2 if precision == "bf16" else 4, batch, context + decode_speed.STEPS // 2)
    for what, seconds in found:
        yield {"bench": "decode", "what": what, "batch": batch, "context": context, "ms": 1e3 * seconds,
               "tok_s": batch / seconds, "roof_tok_s": batch * copy / size, "of_roof": size / copy / seconds}
    for what, seconds in (("first", first), ("prefill", prefill)):
        yield {"bench": "decode", "what": what, "batch": 1, "context": prompt, "ms": 1e3 * seconds,
               "tok_s": prompt / seconds}
