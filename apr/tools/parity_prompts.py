"""The prompts of `apr parity`: real texts in several scripts, and token ids at which kernels and caches go wrong.

They come longest first, so that in a slot of the cache every prompt but the first follows a longer one: a kernel that
reads beyond a sequence's length then meets keys that are old, and not zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apr.config import TransformerConfig, require
from apr.errors import ConfigError, MeasureError
from apr.infer.prompt import Prompter

TOKENS = 200  # of all prompts together, unless --tokens says otherwise
MAX_TOKENS = 2048  # several float32 copies of a vocabulary each: 1.2 GB a copy at 152k ids
SPECIALS = 6
# Ids of each prompt at TOKENS in all. Tiles of attention are 64 long: `long` has one that is full and one that is not.
LENGTHS = {"long": 81, "repeated": 24, "random": 17, "edges": 6, "special": SPECIALS, "single": 1}
TEXT_LENGTH = 11
TEXTS = {
    "english": "The ferry was late again, so they sat on the wall above the harbour and shared what was left of the "
               "bread, while gulls argued over the nets below and the lighthouse began its slow round.",
    "python": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def pop(self, default=None):\n"
              "        return self.items.pop() if self.items else default\n\n\nassert Stack().pop(-1) == -1\n",
    "german": "Übermütig läuft der Fuchs über die Straße, während große Käfer unter dem Laub auf wärmere Tage warten.",
    "russian": "Старый мост скрипел под снегом, но почтальон всё равно шёл по нему каждое утро до рассвета.",
    "chinese": "雨停了以后，孩子们跑到院子里，看见屋檐下的燕子正在修补去年的旧巢。",
    "symbols": "∑ xᵢ² ≤ 1.5e-3 · n\t|\t[0x1F600] 🙂👩‍🚀 → «naïve» №42; 50 % off!!  \r\n",
}


class Prompt(NamedTuple):
    """A named list of token ids."""

    name: str
    ids: list[int]


def built_in(config: TransformerConfig, prompter: Prompter | None, tokens: int = TOKENS) -> list[Prompt]:
    """Our own prompts, longest first, of `tokens` ids in all at most; texts only where there is a tokenizer.

    Raises ConfigError for a `tokens` out of range.
    """
    check_tokens(tokens)
    named = _ids(config, prompter, tokens)
    prompts, left = [], tokens
    for name, ids in named.items():
        share = LENGTHS.get(name, TEXT_LENGTH) * tokens // TOKENS
        length = min(max(1, share), len(ids), left, config.max_position_embeddings)
        if length:
            prompts.append(Prompt(name, ids[:length]))
            left -= length
    return sorted(prompts, key=lambda p: -len(p.ids))


def _ids(config: TransformerConfig, prompter: Prompter | None, tokens: int) -> dict[str, list[int]]:
    """Enough ids of every prompt."""
    draw = np.random.default_rng(0).integers(0, config.V, tokens).tolist
    other = np.random.default_rng(1).integers(0, config.V, tokens).tolist()
    named = {"long": draw(), "repeated": [config.V // 2] * tokens, "random": other,
             "edges": [0, config.V - 1] * tokens, "single": [config.V // 3]}
    if prompter is not None:
        added = prompter.tokenizer.inner.get_added_tokens_decoder()
        special = sorted({i for i in (*added, *prompter.eos) if i < config.V})[:SPECIALS]
        named |= {"special": special} if special else {}
        named |= {name: prompter.raw(text) for name, text in TEXTS.items()}
    return named


def given(texts: Sequence[str], config: TransformerConfig, prompter: Prompter, tokens: int = TOKENS) -> list[Prompt]:
    """The user's own texts as prompts, longest first; what is beyond `tokens` ids in all is cut off.

    Raises ConfigError for a text of no tokens or a `tokens` out of range, MeasureError when nothing is left of one.
    """
    check_tokens(tokens)
    prompts, left = [], tokens
    for number, text in enumerate(texts, 1):
        ids = prompter.raw(text)
        if not ids:
            raise ConfigError(f"--prompt {number}", "at least one token", "none", "write something")
        ids = ids[:min(left, config.max_position_embeddings)]
        if not ids:
            raise MeasureError(f"--prompt {number}", "room for it", f"--tokens {tokens} used up by those before",
                               "raise --tokens")
        left -= len(ids)
        prompts.append(Prompt(f"prompt {number}", ids))
    return sorted(prompts, key=lambda p: -len(p.ids))


def check_tokens(tokens: int) -> None:
    """Raise ConfigError unless so many tokens can be compared."""
    require("--tokens", tokens, f"from 1 to {MAX_TOKENS}", 1 <= tokens <= MAX_TOKENS, "command line")
