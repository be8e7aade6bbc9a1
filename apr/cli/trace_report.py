"""What `apr trace` prints: tables for people, or lines of JSON, one per point and a summary."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apr.errors import one_line
from apr.formats.source import ModelSource
from apr.params import EMBED, HEAD, NORM, param_specs, parameter_count
from apr.strict import plain
from apr.taps import split_name
from apr.tools.config_diff import differing_fields
from apr.tools.trace import Trace
from apr.tools.trace_diff import PointDifference, weak_tokens
from apr.tools.trace_file import facts
from apr.tools.trace_points import point_shape

WIDTH = 20  # of a point's name


class Report:
    """Prints, as lines of JSON or not."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def skeleton(self, source: ModelSource, points: Sequence[str]) -> None:
        """The points, and the parameters; nothing was computed."""
        c = source.config
        counts = {"total": parameter_count(c), "embedding": c.V * c.C,
                  "per_layer": sum(s.size for s in param_specs(c) if s.name.startswith("model.layers.0.")),
                  "final_norm": c.C, "head": 0 if c.tie_word_embeddings else c.V * c.C}
        if self.as_json:
            for name in points:
                self._point(name, [f"{s}" if s in "BT" else n for s, n in _sizes(name, source)], None)
            self._line("summary", stats_source="metadata-only", model=str(source.path), format=source.format,
                       family=c.hf_model_type, layers=c.L, points=len(points), parameters=counts)
            return
        layers = sorted({layer for name in points if (layer := split_name(name)[1]) is not None})
        print(one_line(f"{source.path}: {c.hf_model_type}, {c.L} layers, {counts['total']:,} parameters"))
        print("nothing was computed: --payload runs the model and prints the statistics of every point")
        inside = False
        for name in points:
            stage, layer, grad = split_name(name)
            if layer not in (None, layers[0]) or grad:
                continue
            if not inside and layer is not None:
                inside = True
                print(f"in each of the layers {layers[0]} to {layers[-1]}, of {counts['per_layer']:,} parameters "
                      f"(L{layer:02d}.{stage.name} is a point's name):")
            here = " x ".join(s if s in "BT" else str(n) for s, n in _sizes(name, source))
            print(f"{'' if layer is None else '  '}{stage.name:{WIDTH}} {stage.shape:12} {here:18} {stage.meaning}")
        if any(split_name(name)[2] for name in points):
            print("and the gradient with respect to each, as dlogits or L00.dattn_norm, in the reverse order")
        print("parameters of a layer:", *(f"{s.name.removeprefix('model.layers.0.')} {_by(s.shape)}"
                                          for s in param_specs(c) if s.name.startswith("model.layers.0.")), sep="\n  ")
        head = "the embedding table" if c.tie_word_embeddings else f"{counts['head']:,}"
        print(f"others: {EMBED} {counts['embedding']:,}; {NORM} {counts['final_norm']:,}; {HEAD} {head}")

    def payload(self, trace: Trace, points: Sequence[str]) -> None:
        """The statistics."""
        if not self.as_json:
            print(f"{'point':{WIDTH}} {'shape':>14} {'count':>10} {'mean':>11} {'std':>11} {'min':>11} {'max':>11} "
                  f"{'NaN':>5} {'Inf':>5} {'zeros':>7}")
        for name in points:
            s, shape = trace.statistics[name], point_shape(name, trace.config, len(trace.tokens))
            if self.as_json:
                self._point(name, shape, asdict(s))
            else:
                print(f"{name:{WIDTH}} {_by(shape):>14} {s.count:10} {_number(s.mean)} {_number(s.std)} "
                      f"{_number(s.min)} {_number(s.max)} {s.nan:5} {s.inf:5} {s.zeros:7}")

    def saved(self, path: Path, count: int) -> None:
        """A file was written."""
        if self.as_json:
            self._line("saved", path=str(path), points=count)
        else:
            print(one_line(f"saved {count} points: {path}"))

    def summary(self, trace: Trace, origin: str) -> None:
        """What the numbers are of."""
        if self.as_json:
            self._line("summary", stats_source="forward" if trace.loss is None else "forward and backward",
                       tokens_from=origin, points=len(trace.statistics), **facts(trace))
            return
        print(one_line(_what(trace)))
        print(one_line(f"every point is of all {len(trace.tokens)} tokens, from {origin}: {_ids(trace)}"))

    def difference(self, mine: Trace, other: Trace, points: Sequence[PointDifference], origin: str) -> None:
        """Every point's difference, then what was compared; `other` is what it is relative to."""
        others, weak = differing_fields(mine.config, other.config), weak_tokens(mine.tokens)
        first = next((p.name for p in points if not p.within), None)
        if self.as_json:
            for p in points:
                self._line("difference", name=p.name, **asdict(p.difference), std=p.std, other_std=p.other_std,
                           not_finite=p.strange, tolerance=p.tolerance, within=p.within)
            self._line("summary", stats_source="difference", tokens_from=origin, points=len(points), first_beyond=first,
                       beyond=sum(not p.within for p in points), of=facts(mine), against=facts(other),
                       other_config=others, weak=weak)
            return
        print(f"{'point':{WIDTH}} {'rel. L2':>10} {'scale':>9} {'cosine':>9} {'max abs':>10} {'NaN':>5} {'std':>11} "
              f"{'other std':>11}")
        for p in points:
            d = p.difference
            print(f"{p.name:{WIDTH}} {d.relative_l2:10.3g} {d.scale:9.5f} {d.cosine:9.5f} {d.max_abs:10.3g} {d.nans:5} "
                  f"{_number(p.std)} {_number(p.other_std)}{'' if p.within else f'  > {p.tolerance:.3g}'}")
        print(one_line(f"{_what(mine)}\nagainst {_what(other)}".replace("\n", " ")))
        print(one_line(f"every point is of all {len(mine.tokens)} tokens, from {origin}: {_ids(mine)}"))
        for name, (a, b) in others.items():
            print(one_line(f"{name} differs: {a}, and {b}"))
        if mine.stored != other.stored:
            print(f"stored as {'/'.join(mine.stored)}, and as {'/'.join(other.stored)}: their rounding is in this")
        if weak is not None:
            print(f"weak: {weak}")
        limits = sorted({f"{p.tolerance:.3g}" for p in points})
        print(f"{len(points)} points compared, tolerance {' and '.join(limits)}: "
              + ("all within" if first is None else f"beyond from {first} on"))

    def _point(self, name: str, shape: Sequence[Any], values: dict[str, Any] | None) -> None:
        stage, layer, grad = split_name(name)
        self._line("point", name=name, stage=stage.name, layer=layer, gradient=grad, symbols=stage.shape,
                   shape=list(shape), meaning=stage.meaning, statistics=values)

    def _line(self, kind: str, **values: Any) -> None:
        print(json.dumps({"kind": kind, **plain(values)}, allow_nan=False))


def _sizes(name: str, source: ModelSource) -> list[tuple[str, int]]:
    """(symbols, number) of each size; those of B and T mean nothing here."""
    return list(zip(split_name(name)[0].shape.split(), point_shape(name, source.config, 1), strict=True))


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _number(value: float | None) -> str:
    return f"{'none':>11}" if value is None else f"{value:11.4g}"


def _what(trace: Trace) -> str:
    loss = "" if trace.loss is None else f", mean loss {trace.loss:.6f} nats"
    return f"{trace.model} on {trace.device}, {trace.precision}{loss}"


def _ids(trace: Trace) -> str:
    return ",".join(map(str, trace.tokens[:32])) + ",…" * (len(trace.tokens) > 32)
