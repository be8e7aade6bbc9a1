"""What `apr parity` holds scores against: the NumPy reference's own, or those that another program left in a file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apr.config import TransformerConfig
from apr.dtypes import BY_NUMPY
from apr.errors import FormatError, MeasureError
from apr.formats.safetensors import open_safetensors
from apr.formats.source import ModelSource
from apr.params import EMBED, NORM
from apr.reference.block import block_forward
from apr.reference.linear import linear_forward
from apr.reference.model import head_name
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.rope import rope_tables
from apr.taps import Tap
from apr.tools.parity_prompts import Prompt
from apr.tools.weights import BF16, Weights

IDS, LOGITS = "ids", "logits"
FLOATS, WHOLE_NUMBERS = ("F32", "F16", "BF16", "F64"), ("I32", "I64")
# What storing a score in so many bits changes it by, at most: half the distance to the next number.
ROUNDING = {"F32": 0.0, "F64": 0.0, "F16": 2.0 ** -11, "BF16": 2.0 ** -8}


def reference_scores(source: ModelSource, prompts: Sequence[Sequence[int]], weights: str, arithmetic: str = "fp32"
                     ) -> list[np.ndarray]:
    """Scores (T, V) at every position of each prompt, by the reference, layer by layer.

    `weights` (fp32 or bf16): the file's are rounded to that. `arithmetic`: fp32 and fp64 are NumPy's, and bf16 is fp32
    with every stage rounded, the plainest computation of that kind: how far the plainest one is from a finer one is
    what rounding costs with this model and this prompt. float64 for fp64, else float32. Raises as source.read.
    """
    c, read, groups = source.config, Weights(source, weights), _groups([len(p) for p in prompts])
    kind = np.dtype(np.float64 if arithmetic == "fp64" else np.float32)
    look: Tap = _round if arithmetic == "bf16" else _leave
    table = read.read(EMBED).astype(kind, copy=False)
    streams = [table[_padded([prompts[i] for i in group])] for group in groups]
    with np.errstate(all="ignore"):  # what is no number in the scores is reported there
        for layer, arrays in read.layers(c.L):
            params = {name: array.astype(kind, copy=False) for name, array in arrays.items()}
            for i, x in enumerate(streams):
                tables = rope_tables(np.arange(x.shape[1]), c.HS, c.rope_theta, c.rope_scaling, kind)
                streams[i] = block_forward(params, c, layer, x, tables, None, look)
        head = table if head_name(c) == EMBED else read.read(head_name(c)).astype(kind, copy=False)
        norm, out = read.read(NORM).astype(kind, copy=False), dict[int, np.ndarray]()
        for group, x in zip(groups, streams, strict=True):
            for i, row in zip(group, x, strict=True):
                normed = rmsnorm_forward(row[:len(prompts[i])], norm, c.rms_norm_eps)[0]
                look("final_norm", normed)
                out[i] = linear_forward(normed, head)
                look("logits", out[i])
    return [out[i] for i in range(len(prompts))]


def _round(_name: str, array: np.ndarray) -> None:
    """A tap that rounds: the array is live, so what follows starts from the rounded values."""
    array[...] = array.astype(BF16)


def _leave(_name: str, _array: np.ndarray) -> None:
    """A tap that does nothing."""


def _groups(lengths: list[int]) -> list[list[int]]:
    """Indices of prompts that go through a layer together: none is less than half as long as its group's longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and 2 * lengths[i] >= lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _padded(prompts: list[Sequence[int]]) -> np.ndarray:
    """(B, T) ids, zeros after a shorter prompt's end: attention is causal, so they change nothing before them."""
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[:len(prompt)] = prompt
    return ids


def read_logits(path: Path, config: TransformerConfig) -> tuple[list[Prompt], list[np.ndarray], float]:
    """The prompts of a file, longest first, their scores (T, V) each, and the rounding that their dtype brought.

    A .safetensors with `ids` (T,) or (B, T) and `logits` (T, V) or (B, T, V), nothing else. Raises NotFoundError,
    StorageError, FormatError for other contents, ids that the model lacks or scores that are not finite, and
    MeasureError where there is no position.
    """
    with open_safetensors(path) as opened:
        names = sorted(opened.entries)
        if names != [IDS, LOGITS]:
            raise FormatError(str(path), f"the tensors '{IDS}' and '{LOGITS}'", f"{names[:4]}", "write those two alone")
        ids, logits = opened.entries[IDS], opened.entries[LOGITS]
        wanted = (*ids.shape, config.V)
        if ids.dtype.name not in WHOLE_NUMBERS or len(ids.shape) not in (1, 2):
            raise FormatError(f"{path}: tensor '{IDS}'", "I32 or I64 of shape (T) or (B, T)",
                              f"{ids.dtype.name} {list(ids.shape)}", "write the file again")
        if logits.dtype.name not in FLOATS or logits.shape != wanted:
            raise FormatError(f"{path}: tensor '{LOGITS}'", f"floating point of shape {list(wanted)}, as the ids and "
                              "the model's vocabulary say", f"{logits.dtype.name} {list(logits.shape)}",
                              "give the scores of this model")
        if 0 in ids.shape:
            raise MeasureError(f"{path}: tensor '{IDS}'", "at least one position", f"shape {list(ids.shape)}",
                               "write the scores of a prompt")
        rows, scores = np.atleast_2d(opened.read(IDS)), opened.read(LOGITS)
    return _checked(path, config, rows, scores.reshape(*rows.shape, config.V))


def _checked(path: Path, config: TransformerConfig, rows: np.ndarray, scores: np.ndarray
             ) -> tuple[list[Prompt], list[np.ndarray], float]:
    if rows.min() < 0 or rows.max() >= config.V:
        raise FormatError(f"{path}: tensor '{IDS}'", f"ids in [0, {config.V})", f"{rows.min()} to {rows.max()}",
                          "give the ids that the scores are of")
    if rows.shape[1] > config.max_position_embeddings:
        raise FormatError(f"{path}: tensor '{IDS}'", f"at most {config.max_position_embeddings} positions",
                          f"{rows.shape[1]}", "give scores of shorter prompts")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise FormatError(f"{path}: tensor '{LOGITS}'", "finite scores",
                          f"{scores.reshape(-1)[bad[0]]} at element {bad[0]}", "write the file again")
    return ([Prompt(f"row {i}", row) for i, row in enumerate(rows.tolist())], list(scores.astype(np.float32)),
            ROUNDING[BY_NUMPY[scores.dtype].name])
