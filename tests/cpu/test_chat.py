"""Chat templates: as transformers renders them; what a hostile one may not do; special tokens, first and last ids."""

import dataclasses
import json
import time

import pytest
from chat_templates import CHATML, EXPECTED, INST, MESSAGES, TEMPLATES
from models import SMALL
from test_cpu_engine import parameters
from tokenizers import processors

from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, FormatError
from apr.formats.model_file import save_model
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.infer import chat
from apr.infer.chat import ChatTemplate, chat_template, special_tokens
from apr.infer.prompt import open_prompter

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def template(text):
    return ChatTemplate(text, NAMES, "m: template")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    assert template(TEMPLATES[name]).render([MESSAGES]) == [EXPECTED[name]]


def test_conversations_are_rendered_each_on_its_own():
    ours = template(CHATML).render([MESSAGES, MESSAGES[1:2]])
    assert ours[0] == EXPECTED["chatml"] and ours[1].startswith("<|im_start|>system\nYou help.<|im_end|>\n")


def test_messages_that_the_template_refuses_are_the_users_mistake():
    with pytest.raises(ConfigError, match="roles must alternate"):
        template(INST).render([[MESSAGES[1], MESSAGES[1]]])


@pytest.mark.parametrize(("text", "says"), [
    ("{% for x in y", "TemplateSyntaxError"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{% set n = namespace(__class__=1) %}", "SecurityError"),
    ("{{ missing.field }}", "UndefinedError"), ("{{ 'a' * 10**10 }}", "MemoryError"),
    ("{{ '%9999999999d' % 1 }}", "MemoryError"), ("{{ range(10**6) | list }}", "OverflowError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"), ("{% include 'x' %}", "TypeError"),
    ("{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}", "4194304")])
def test_a_template_that_fails_is_a_bad_file(text, says):
    with pytest.raises(FormatError, match=says) as caught:
        template(text).render([MESSAGES])
    assert str(caught.value).startswith("m: template: ") and "\n" not in str(caught.value)


LOOPS = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_stopped():
    start = time.monotonic()
    with pytest.raises(FormatError, match="ends soon"):
        template(LOOPS).render([MESSAGES])
    assert time.monotonic() - start < chat.SECONDS


def test_the_clock_stops_what_uses_no_processor(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    with pytest.raises(FormatError, match="ends soon"):
        template(LOOPS).render([MESSAGES])


def test_where_a_template_comes_from():
    config = {"chat_template": "from config", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    def find(**files):
        return chat_template({n.replace("__", "."): t if isinstance(t, str) else json.dumps(t)
                              for n, t in files.items()}, "m")
    assert find() is None and find(tokenizer_config__json={}) is None
    found = find(tokenizer_config__json=config)
    assert (found.text, dict(found.names)) == ("from config", NAMES)
    assert find(tokenizer_config__json=config, chat_template__jinja="from file").text == "from file"
    assert find(tokenizer_config__json={"chat_template": named}).text == "d"
    for bad in ({"chat_template": named[:1]}, {"chat_template": 3}, {"chat_template": "x" * 2**19}, []):
        with pytest.raises(FormatError, match="m: tokenizer_config"):
            find(tokenizer_config__json=bad)
    assert special_tokens({"special_tokens_map.json": '{"eos_token": "<e>", "bos_token": "<b>"}',
                           "tokenizer_config.json": '{"eos_token": "</s>"}'}, "m") == {"eos_token": "</s>",
                                                                                       "bos_token": "<b>"}


@pytest.fixture(scope="module")
def tokenizer_json():
    """A byte-level tokenizer of 300 with <s>, </s> and <|im_start|>, and no post-processor of its own."""
    inner = Tokenizer.train(["some text to train on, with words"] * 5, 300).inner
    inner.add_special_tokens(["<s>", "</s>", "<|im_start|>"])
    return inner


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of 400 ids without text files."""
    config = dataclasses.replace(SMALL, vocab_size=400)
    path = tmp_path_factory.mktemp("chat") / "m.apr"
    save_model(path, config, parameters(config), "m")
    with open_model(path) as opened:
        yield opened


def with_assets(source: ModelSource, inner, **settings):
    return dataclasses.replace(source, assets={"tokenizer.json": inner.to_str(),
                                               "tokenizer_config.json": json.dumps(settings)})


def test_special_tokens_are_meant_in_prompts_and_text_elsewhere(source, tokenizer_json):
    p = open_prompter(with_assets(source, tokenizer_json))
    special = tokenizer_json.token_to_id("<|im_start|>")
    assert p.raw("<|im_start|>a")[0] == special and special not in p.tokenizer.encode("<|im_start|>a")
    assert p.tokenizer.inner.encode_special_tokens and len(p.raw("<|im_start|>")) == 1
    with pytest.raises(ConfigError, match="chat template"):
        p.chat([MESSAGES])


def test_bos_is_put_once_and_only_where_the_tokenizer_says(source, tokenizer_json):
    bos, plain = tokenizer_json.token_to_id("<s>"), tokenizer_json.encode("words").ids
    def raw(inner, text, **settings):
        return open_prompter(with_assets(source, inner, bos_token="<s>", **settings)).raw(text)
    assert raw(tokenizer_json, "words") == plain == raw(tokenizer_json, "words", add_bos_token=False)
    assert raw(tokenizer_json, "words", add_bos_token=True) == [bos, *plain]
    assert raw(tokenizer_json, "<s>words", add_bos_token=True) == [bos, *plain]
    own = type(tokenizer_json).from_str(tokenizer_json.to_str())
    own.post_processor = processors.TemplateProcessing(single="<s> $A </s>",
                                                       special_tokens=[("<s>", bos), ("</s>", bos + 1)])
    assert raw(own, "words") == raw(own, "<s>words") == [bos, *plain] == raw(own, "words", add_bos_token=True)
    assert raw(own, "words", add_bos_token=False) == plain
    chatty = open_prompter(with_assets(source, own, bos_token="<s>", chat_template=INST, eos_token="</s>"))
    ids = chatty.chat([MESSAGES])[0]
    assert ids.count(bos) == 1 and ids[0] == bos and bos + 1 in ids


def test_ids_that_end_a_text_come_from_every_file(source, tokenizer_json):
    whole = with_assets(source, tokenizer_json, eos_token="</s>")
    end = tokenizer_json.token_to_id("<|endoftext|>")
    assert open_prompter(whole).eos == {end, tokenizer_json.token_to_id("</s>")}
    def eos(value):
        return open_prompter(dataclasses.replace(whole, assets=whole.assets | {
            "generation_config.json": json.dumps({"eos_token_id": value})})).eos
    assert {5, 6} < eos([5, 6]) and 7 in eos(7) and eos(None) == eos([399]) == open_prompter(whole).eos
    with pytest.raises(FormatError, match="eos_token_id: expected an id, or a list of ids"):
        eos([5, -1, "x"])
    assert 9 in open_prompter(dataclasses.replace(whole, hf_config={"eos_token_id": 9})).eos


def test_a_model_without_its_tokenizer_is_refused(source, tokenizer_json):
    with pytest.raises(FormatError, match=r"tokenizer: expected tokenizer.json.* put tokenizer.json beside"):
        open_prompter(source)
    large = Tokenizer.train(["".join(chr(c) for c in range(300, 800))] * 3, 420)
    with pytest.raises(FormatError, match="at most 400 ids"):
        open_prompter(dataclasses.replace(source, assets={"tokenizer.json": large.json}))
    gpt2 = json.loads(tokenizer_json.to_str())["model"]
    merges = "\n".join(m if isinstance(m, str) else " ".join(m) for m in gpt2["merges"])
    old = dataclasses.replace(source, assets={"vocab.json": json.dumps(gpt2["vocab"]), "merges.txt": merges})
    assert open_prompter(old).raw("some words") == tokenizer_json.encode("some words").ids
