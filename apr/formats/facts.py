"""What a model's files say beside the configuration, in lines for people: types, biases, head, ids that end a text."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from apr.config import TransformerConfig
from apr.errors import FormatError
from apr.params import EMBED, HEAD
from apr.strict import parse_json

GENERATION = "generation_config.json"


def tensor_facts(config: TransformerConfig, dtypes: Mapping[str, str]) -> list[str]:
    """How the tensors are stored, and which of the parts are there that not every model has."""
    facts = [f"stored as {dtype}: {count} tensors" for dtype, count in sorted(Counter(dtypes.values()).items())]
    if config.use_bias:
        facts.append(f"qkv bias: {3 * config.L} tensors")
    if config.qk_norm:
        facts.append(f"q and k norm: {2 * config.L} tensors")
    facts.append(f"tied head: lm_head is {EMBED}" if config.tie_word_embeddings else f"untied head: {HEAD}")
    return facts


def eos_ids(assets: Mapping[str, str], hf_config: Mapping[str, Any], where: str) -> tuple[list[int], str]:
    """The token ids that end a generated text, and where they come from; none when the maker names none.

    generation_config.json decides; config.json where there is none, or where it is silent. Raises FormatError unless
    they are ids.
    """
    origin, found = GENERATION, None
    if GENERATION in assets:
        values = parse_json(assets[GENERATION].encode(), f"{where}: {GENERATION}")
        if not isinstance(values, dict):
            raise FormatError(f"{where}: {GENERATION}", "a JSON object", type(values).__name__, "correct the file")
        found = values.get("eos_token_id")
    if found is None:
        origin, found = "config.json", hf_config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise FormatError(f"{where}: {origin}: eos_token_id", "an id, or a list of ids", repr(found)[:60],
                          "correct the file")
    return ids, origin


def eos_facts(assets: Mapping[str, str], hf_config: Mapping[str, Any], where: str) -> list[str]:
    """The line about eos_ids."""
    ids, origin = eos_ids(assets, hf_config, where)
    return [f"eos ids {ids} from {origin}" if ids else "no eos id"]
