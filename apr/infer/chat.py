"""Chat templates: messages to the text that a model was trained to continue, in Hugging Face's way.

The template is in chat_template.jinja, or in tokenizer_config.json under `chat_template`: a text, or several with
names, of which "default" is taken. It is a program of unknown origin and runs in a process of its own, with limits
(apr/infer/template_worker.py). It writes the special tokens, the first one included, so none is added after it.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr.errors import ConfigError, FormatError
from apr.strict import parse_json

Message = dict[str, Any]
MAX_TEMPLATE = 2**18  # characters; the longest in use have about 2**14
MAX_TEXT = 2**22  # characters, all conversations together
SECONDS = 15  # on the clock; the worker has its own limit of processor time
CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name; `where` is for messages."""

    text: str
    names: Mapping[str, str]
    where: str

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """The text of each conversation, up to where the assistant's next message begins.

        Raises ConfigError when the template refuses the messages, FormatError when it fails or does not end.
        """
        request = {"template": self.text, "conversations": [list(c) for c in conversations], "names": dict(self.names),
                   "limit": MAX_TEXT}
        worker = Path(__file__).with_name("template_worker.py")
        try:
            done = subprocess.run([sys.executable, "-P", str(worker)], input=json.dumps(request).encode(),
                                  capture_output=True, timeout=SECONDS, check=False)
            answer: dict[str, Any] = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            raise FormatError(self.where, "a template that ends soon and in little memory", "one that does not",
                              "use --raw, or another template") from None
        if "texts" in answer:
            return list(answer["texts"])
        if answer["by"] == "messages":
            raise ConfigError(f"{self.where}: messages", "those that the template allows", answer["error"],
                              "change the messages, or use --raw")
        raise FormatError(self.where, "a template that works", answer["error"], "use --raw, or another template")


def chat_template(assets: Mapping[str, str], where: str) -> ChatTemplate | None:
    """The template in a model's text files, None if there is none. Raises FormatError."""
    config = tokenizer_config(assets, where)
    text: Any = assets.get(FILE)
    place = f"{where}: {FILE}"
    if text is None:
        text, place = config.get("chat_template"), f"{where}: {CONFIG}: chat_template"
    if isinstance(text, list):
        named = {t["name"]: t.get("template") for t in text
                 if isinstance(t, dict) and isinstance(t.get("name"), str)}
        if "default" not in named:
            raise FormatError(place, "a template named 'default'", ", ".join(sorted(named))[:80] or "none",
                              "use --raw, or name one")
        text = named["default"]
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > MAX_TEMPLATE:
        raise FormatError(place, f"a text of at most {MAX_TEMPLATE} characters",
                          f"{len(text)}" if isinstance(text, str) else type(text).__name__, "use --raw")
    return ChatTemplate(text, special_tokens(assets, where), place)


def tokenizer_config(assets: Mapping[str, str], where: str) -> dict[str, Any]:
    """The object in tokenizer_config.json, empty if there is none. Raises FormatError."""
    return _object(assets, CONFIG, where)


def special_tokens(assets: Mapping[str, str], where: str) -> dict[str, str]:
    """The texts of bos_token, eos_token and their like, as the tokenizer's settings name them. Raises FormatError."""
    out = {}
    for values in (_object(assets, "special_tokens_map.json", where), tokenizer_config(assets, where)):
        for name in NAMES:
            value = values.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                out[name] = value
    return out


def _object(assets: Mapping[str, str], name: str, where: str) -> dict[str, Any]:
    if name not in assets:
        return {}
    values = parse_json(assets[name].encode(), f"{where}: {name}")
    if not isinstance(values, dict):
        raise FormatError(f"{where}: {name}", "an object", type(values).__name__, "write the file again")
    return values
