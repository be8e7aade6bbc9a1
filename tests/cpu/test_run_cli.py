"""`apr run` and `apr.load` as a person or a script meets them: text, JSON, batches, templates, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from chat_templates import CHATML, INST
from models import FAMILIES
from test_cpu_engine import parameters

import apr
from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, FormatError, NotFoundError, ShapeError
from apr.formats.apr_file import write_apr
from apr.formats.model_file import load_model, model_metadata
from apr.reference.model import model_forward

ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
CONTEXT = 20_000


def command(*arguments):
    return [sys.executable, "-m", "apr", "run", *map(str, arguments)]


def run(*arguments, stdin=b"", env=ENV):
    """Exit code, stdout, stderr."""
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=60, env=env, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    return done.returncode, out, err


def objects(*arguments, **options):
    code, out, err = run(*arguments, "--json", "--no-gpu", **options)
    assert code == 0, err
    return sorted((json.loads(line) for line in out.splitlines()), key=lambda c: c["index"])


@pytest.fixture(scope="module")
def tokenizer():
    """Of 300 ids or fewer, with the special tokens of a chat."""
    inner = Tokenizer.train(["a small text of words, to train on, Grüße 日本"] * 4, 290).inner
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer.from_json(inner.to_str().encode(), "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Models: plain, chat (ChatML), inst (a template that refuses), bare (no tokenizer), small (tokenizer too large).

    All but small have twice as many ids as the tokenizer, and padded ids that always score highest.
    """
    path = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(FAMILIES["llama"], vocab_size=2 * tokenizer.vocab_size,
                                 max_position_embeddings=CONTEXT)
    params = parameters(config)
    head = params["lm_head.weight"]
    head[tokenizer.vocab_size:] = 5 * head[:tokenizer.vocab_size]
    def save(name, c, arrays, json_text, **assets):
        metadata = model_metadata(c, name, json_text, None)
        write_apr(path / f"{name}.apr", arrays, metadata | ({"hf_assets": assets} if assets else {}))
    save("plain", config, params, tokenizer.json)
    save("bare", config, params, None)
    settings = json.dumps({"eos_token": "<|im_end|>"})
    save("chat", config, params, tokenizer.json, **{"chat_template.jinja": CHATML, "tokenizer_config.json": settings})
    save("inst", config, params, tokenizer.json, **{"chat_template.jinja": INST})
    save("broken", config, params, tokenizer.json, **{"chat_template.jinja": "{% for"})
    low = dataclasses.replace(config, vocab_size=97)
    save("small", low, parameters(low), tokenizer.json)
    return path


def greedy(folder, ids, count, limit):
    """The likeliest ids below `limit`, by whole forward passes."""
    config, params, _ = load_model(folder / "plain.apr")
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model_forward(params, config, np.array([ids]))[0, -1, :limit].argmax()))
    return ids[-count:]


def test_text_goes_to_stdout_and_the_figures_to_stderr(folder, tokenizer):
    code, out, err = run(folder / "plain.apr", "a small", "--max-tokens", 12, "--no-gpu")
    expected = tokenizer.decode(greedy(folder, tokenizer.encode("a small"), 12, tokenizer.vocab_size))
    assert (code, out) == (0, expected + "\n" * (not expected.endswith("\n")))
    assert len(err.splitlines()) == 1 and "tok/s" in err and "end: length [cpu, fp32]" in err


def test_json_says_everything(folder, tokenizer):
    found, = objects(folder / "plain.apr", "a small", "--max-tokens", 12)
    ids = greedy(folder, tokenizer.encode("a small"), 12, tokenizer.vocab_size)
    assert found["tokens"] == ids and found["text"] == tokenizer.decode(ids)
    assert found["finish_reason"] == "length" and found["prompt_tokens"] == len(tokenizer.encode("a small"))
    assert found["ttft_ms"] > 0 and found["decode_tok_s"] > 0 and found["prefill_tok_s"] > 0
    assert (found["device"], found["precision"], found["format"], found["family"]) == ("cpu", "fp32", "apr", "llama")
    assert found["gate"]["status"] == "not run" and found["tokenizer_sha256"] == tokenizer.sha256


def test_padded_ids_are_never_sampled(folder, tokenizer):
    config, params, _ = load_model(folder / "plain.apr")
    logits = model_forward(params, config, np.array([tokenizer.encode("a small")]))[0, -1]
    assert logits.argmax() >= tokenizer.vocab_size  # the model's own choice is one
    for options in ([], ["--temperature", 3], ["--temperature", 1, "--top-k", 5], ["--temperature", 2, "--top-p", 0.5]):
        found, = objects(folder / "plain.apr", "a small", "--max-tokens", 60, *options)
        assert max(found["tokens"]) < tokenizer.vocab_size


def test_seeds_stops_and_stdin(folder):
    model = folder / "plain.apr"
    def text(*more, **options):
        return objects(model, *more, "--max-tokens", 30, "--temperature", 2, **options)[0]["text"]
    one = text("words", "--seed", 1)
    assert one == text("-", "--seed", 1, stdin=b"words") == text("--seed", 1, stdin=b"words") != text("words")
    cut, = objects(model, "words", "--max-tokens", 30, "--temperature", 2, "--seed", 1, "--stop", "zzzzzz", "--stop",
                   one[6:8])
    assert cut["text"] == one[:one.index(one[6:8])] and cut["finish_reason"] == "stop"


def test_a_chat_is_templated_unless_raw(folder, tokenizer):
    ids = tokenizer.encode_templated("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nwords<|im_end|>\n"
                                     "<|im_start|>assistant\n")
    def count(*more):
        return objects(folder / "chat.apr", "words", "--max-tokens", 5, *more)[0]
    assert count()["prompt_tokens"] == len(ids) and count()["tokens"] == greedy(folder, ids, 5, tokenizer.vocab_size)
    assert count("--raw")["prompt_tokens"] == len(tokenizer.encode("words"))
    assert count("--system", "Be brief.")["prompt_tokens"] == len(tokenizer.encode_templated(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwords<|im_end|>\n<|im_start|>assistant\n"))


def test_prompts_of_a_file_each_as_alone(folder, tmp_path):
    texts = ["a small", "words, to train", "日本", "text", "of words"]
    (tmp_path / "p.txt").write_text("\n".join(texts[:2]) + "\r\n\n" + "\n".join(texts[2:]))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    model, more = folder / "plain.apr", ["--max-tokens", 10]
    alone = [objects(model, t, *more)[0]["tokens"] for t in texts]
    for options in (["--prompts", tmp_path / "p.txt"], ["--prompts", tmp_path / "p.jsonl", "--batch-size", 2],
                    ["--prompts", tmp_path / "p.txt", "--batch-size", 1]):
        assert [c["tokens"] for c in objects(model, *more, *options)] == alone
    code, out, err = run(model, "--prompts", tmp_path / "p.txt", *more, "--no-gpu")
    assert code == 0 and [line for line in out.splitlines() if line.startswith("--- prompt ")] == [
        f"--- prompt {n}" for n in range(1, 6)] and len(err.splitlines()) == 5
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "words"}]}))
    chat, = objects(folder / "chat.apr", "--prompts", tmp_path / "m.jsonl", *more)
    assert chat["prompt_tokens"] == objects(folder / "chat.apr", "words", *more)[0]["prompt_tokens"]


def test_the_context_ends_a_text(folder):
    found, = objects(folder / "plain.apr", "a small", "--context", 9, "--max-tokens", 100)
    assert found["finish_reason"] == "context" and found["prompt_tokens"] + len(found["tokens"]) == 9


FILES = {"empty.txt": b"\n \n", "bad.txt": b"fine\nnot \xff\n", "bad.jsonl": b'{"prompt": "x"}\n{"prompt"\n',
         "other.jsonl": b'{"text": "x"}\n',
         "twice.jsonl": b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}'}


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["plain.apr", "x" * 60, "--context", "8"], 2, "prompt 1: expected at most 8 tokens"),
    (["plain.apr", ""], 2, "empty"),
    (["plain.apr"], 2, "empty"),
    (["small.apr", "x"], 4, "at most 97 ids"),
    (["bare.apr", "x"], 4, "put tokenizer.json beside"),
    (["none.apr", "x"], 3, "none.apr"),
    (["gemma", "x"], 2, "model_type: expected one of llama"),
    (["plain.apr", "x", "--stop", ""], 2, "--stop"),
    (["plain.apr", "x", "--temperature", "-1"], 2, "--temperature"),
    (["plain.apr", "x", "--temperature", "nan"], 2, "--temperature"),
    (["plain.apr", "x", "--top-p", "0"], 2, "--top-p"),
    (["plain.apr", "x", "--top-p", "1.1"], 2, "--top-p"),
    (["plain.apr", "x", "--top-k", "-1"], 2, "--top-k"),
    (["plain.apr", "x", "--seed", "-1"], 2, "--seed"),
    (["plain.apr", "x", "--max-tokens", "0"], 2, "--max-tokens"),
    (["plain.apr", "x", "--batch-size", "0"], 2, "--batch-size"),
    (["plain.apr", "x", "--context", "0"], 2, "--context"),
    (["plain.apr", "x", "--context", "20001"], 2, "from 1 to 20000"),
    (["plain.apr", "x", "--tempo", "1"], 2, "--tempo"),
    (["plain.apr", "x", "--device", "cuda"], 9, "--device"),
    (["plain.apr", "x", "--precision", "bf16"], 9, "fp32"),
    (["plain.apr", "x", "--no-gpu", "--device", "auto"], 2, "--no-gpu"),
    (["plain.apr", "x", "--system", "s"], 2, "--system"),
    (["chat.apr", "x", "--system", "s", "--raw"], 2, "--raw"),
    (["broken.apr", "x"], 4, "TemplateSyntaxError"),
    (["inst.apr", "--prompts", "twice.jsonl"], 2, "must alternate"),
    (["plain.apr", "x", "--prompts", "empty.txt"], 2, "both"),
    (["plain.apr", "--prompts", "empty.txt"], 4, "empty file"),
    (["plain.apr", "--prompts", "none.txt"], 3, "none.txt"),
    (["plain.apr", "--prompts", "bad.txt"], 4, "bad.txt line 2: expected UTF-8"),
    (["plain.apr", "--prompts", "bad.jsonl"], 4, "bad.jsonl line 2: expected JSON"),
    (["plain.apr", "--prompts", "other.jsonl"], 4, 'other.jsonl line 1: expected {"prompt"'),
    (["plain.apr", "--prompts", "twice.jsonl"], 2, "plain text"),
    (["plain.apr", b'\xff'], 2, "UTF-8")])
def test_refusals_are_one_line_with_the_right_code(folder, monkeypatch, arguments, code, says):
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "gemma").mkdir(exist_ok=True)
    (folder / "gemma" / "config.json").write_text('{"model_type": "gemma2"}')
    monkeypatch.chdir(folder)
    done = subprocess.run([sys.executable, "-m", "apr", "run", *arguments], input=b"", capture_output=True, timeout=60,
                          env={**ENV, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}, check=False)
    err = [line for line in done.stderr.decode().splitlines() if not line.startswith("device: ")]
    assert (done.returncode, done.stdout) == (code, b""), err
    assert len(err) == 1 and err[0].startswith("apr: ") and says in err[0]


def test_stdin_that_is_no_text_is_refused(folder):
    code, out, err = run(folder / "plain.apr", "--no-gpu", stdin=b"abc\xff")
    assert (code, out) == (2, "") and "byte 0xff at offset 3" in err and len(err.splitlines()) == 1


def interruptible():
    """Ctrl-C counts, even where these tests run in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_there_is(folder):
    with subprocess.Popen(command(folder / "plain.apr", "words", "--max-tokens", 19000, "--no-gpu"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, preexec_fn=interruptible) as p:
        first = p.stdout.read(20)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=30)
    assert (p.returncode, len(first), err) == (130, 20, b"interrupted\n")


def test_ctrl_c_in_json_gives_a_line_for_each_prompt(folder, tmp_path, tokenizer):
    (tmp_path / "p.txt").write_text(tokenizer.decode(tokenizer.encode("a small text of words ")) * 400 + "\nwords\n")
    size = len(tokenizer.encode("a small text of words " * 400)) + 5
    assert size > 2000  # what the second prompt takes: seconds
    with subprocess.Popen(command(folder / "plain.apr", "--prompts", tmp_path / "p.txt", "--batch-size", 1, "--context",
                                  size, "--max-tokens", size, "--no-gpu", "--json"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, preexec_fn=interruptible) as p:
        first = json.loads(p.stdout.readline())
        time.sleep(0.3)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=30)
    second = json.loads(out)
    assert (p.returncode, err, first["index"], second["index"]) == (130, b"", 0, 1)
    assert second["finish_reason"] == "interrupted" and 0 < len(second["tokens"]) < size


def test_a_reader_that_goes_away_ends_it_quietly(folder):
    with subprocess.Popen(command(folder / "plain.apr", "words", "--max-tokens", 19000, "--no-gpu"),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV) as p:
        p.stdout.read(1)
        p.stdout.close()
        err = p.stderr.read()
    assert p.returncode == 7 and err == b""


def test_the_python_api(folder, tokenizer):
    model = apr.load(folder / "plain.apr", device="cpu", context=200)
    ids = tokenizer.encode("a small")
    expected = greedy(folder, ids, 8, tokenizer.vocab_size)
    done = model.generate("a small", max_tokens=8)
    assert done.tokens == tuple(expected) == model.generate(ids, max_tokens=8).tokens
    assert str(done) == done.text == tokenizer.decode(expected) and isinstance(model, apr.Model)
    cut = done.text[2:5]
    for stop in (cut, [cut, "never there"]):
        assert model.generate("a small", max_tokens=8, stop=stop).text == done.text[:done.text.index(cut)]
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 2 * tokenizer.vocab_size) and logits.dtype == np.float32
    chat = apr.load(str(folder / "chat.apr"), device="cpu")
    asked = chat.generate([{"role": "user", "content": "words"}], max_tokens=2)
    assert asked.prompt_tokens > len(tokenizer.encode("words"))
    for call, error in ((lambda: model.generate(""), ShapeError),
                        (lambda: model.generate("a", max_tokens=0), ConfigError),
                        (lambda: model.generate([10**6]), ShapeError), (lambda: model.logits([]), ShapeError),
                        (lambda: model.generate("a", temperature=-1.0), ConfigError),
                        (lambda: apr.load(folder / "none.apr", device="cpu"), NotFoundError),
                        (lambda: apr.load(folder / "plain.apr", device="cpu", context=0), ConfigError),
                        (lambda: apr.load(folder / "bare.apr", device="cpu").generate("a"), FormatError)):
        with pytest.raises(error):
            call()
    assert apr.load(folder / "bare.apr", device="cpu").logits([1, 2]).shape[0] == 2
    with pytest.raises(AttributeError, match="lode"):
        apr.lode  # noqa: B018
