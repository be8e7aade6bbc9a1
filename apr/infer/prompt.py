"""From a model's text files to prompts as token ids: its tokenizer, its chat template, its first and last tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, FormatError
from apr.formats.facts import eos_ids
from apr.formats.source import ModelSource
from apr.infer.chat import ChatTemplate, Message, chat_template, special_tokens, tokenizer_config


@dataclass(frozen=True)
class Prompter:
    """A model's tokenizer and chat template; `bos`, the id before a raw text, and `eos`, those that end one."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    bos: int | None
    eos: frozenset[int]
    where: str

    def raw(self, text: str) -> list[int]:
        """Ids of a text as it is; the special tokens in it are meant, and bos is put before it unless it is there."""
        ids = self.tokenizer.encode_templated(text)
        return ids if self.bos is None or ids[:1] == [self.bos] or not ids else [self.bos, *ids]

    def chat(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Ids of conversations, each by the template. Raises ConfigError where there is none, and as its render."""
        if self.template is None:
            raise ConfigError(self.where, "a chat template, to take messages or --system", "none in this model",
                              "give prompts as plain text")
        return [self.tokenizer.encode_templated(text) for text in self.template.render(conversations)]


def open_prompter(source: ModelSource) -> Prompter:
    """What a model's text files say of prompts. Raises FormatError: no tokenizer, a bad one, one too large."""
    where, assets = str(source.path), source.assets
    tokenizer = _tokenizer(source)
    if tokenizer.vocab_size > source.config.V:
        raise FormatError(f"{where}: tokenizer", f"at most {source.config.V} ids, as the model has",
                          f"{tokenizer.vocab_size}", "give the model its own tokenizer")
    ids, _ = eos_ids(assets, source.hf_config, where)
    names, settings, vocab = special_tokens(assets, where), tokenizer_config(assets, where), tokenizer.inner
    named = vocab.token_to_id(names["eos_token"]) if "eos_token" in names else None
    eos = {i for i in (*ids, tokenizer.eos_id, named) if i is not None and i < tokenizer.vocab_size}
    bos = tokenizer.first_id
    if settings.get("add_bos_token") is False:
        bos = None
    elif settings.get("add_bos_token") is True and bos is None and "bos_token" in names:
        bos = vocab.token_to_id(names["bos_token"])
    return Prompter(tokenizer, chat_template(assets, where), bos, frozenset(eos), where)


def _tokenizer(source: ModelSource) -> Tokenizer:
    assets, where = source.assets, str(source.path)
    if "tokenizer.json" in assets:
        return Tokenizer.from_json(assets["tokenizer.json"].encode(), f"{where}: tokenizer.json")
    if "vocab.json" in assets and "merges.txt" in assets:
        return Tokenizer.from_gpt2(assets["vocab.json"].encode(), assets["merges.txt"].encode(), f"{where}: ")
    raise FormatError(f"{where}: tokenizer", "tokenizer.json, or vocab.json and merges.txt, with the model", "neither",
                      "put tokenizer.json beside the model's files, or import the model again with it")
