"""From tokens to text: whole characters only, stop strings across tokens, ends and their reasons, batches and times."""

import itertools

import numpy as np
import pytest
import tokenizers
from models import SMALL
from test_cpu_engine import parameters
from tokenizers import decoders, models

from apr.config import Sampling
from apr.data.tokenizer import Tokenizer
from apr.errors import ShapeError
from apr.infer.cpu_engine import CpuEngine
from apr.infer.engine import Engine
from apr.infer.generate import Generation, StopFilter, TextStream

TEXT = "Grüße, 日本語 🙂🙃! naïve… ﷽ end"


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer.train(["Grüße und Küsse, in naïve words"] * 3, 280)


@pytest.fixture(scope="module")
def fallback():
    """As sentencepiece models are: words that begin with ▁, and a token for each byte of what is not in the words."""
    words = ["▁", "G", "r", "e", "n", "d", "▁e", "▁en", "▁end", "!", ",", "</s>"]
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=[("▁", "e"), ("▁e", "n"), ("▁en", "d")], byte_fallback=True))
    inner.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                        tokenizers.normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    return Tokenizer(inner, "fallback")


@pytest.fixture(params=["byte_level", "fallback"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


class Script(Engine):
    """An engine that says what it is told, row by row, as far as S goes; it records what it was asked."""

    config, device, precision = SMALL, "cpu", "fp32"

    def __init__(self, says, B=4, S=1000):
        self.says, self.B, self.S, self.calls, self.closed = says, B, S, [], 0

    def generate(self, prompts, sampling, limit):
        self.calls.append(([list(p) for p in prompts], sampling.first, limit))
        try:
            for step in range(min(limit, self.S - max(map(len, prompts)))):
                rows = [self.says[sampling.first + r] for r in range(len(prompts))]
                at = [len(p) + step - 1 for p in prompts]
                yield np.array([row[i] if i < len(row) else 0 for row, i in zip(rows, at, strict=True)], np.int32)
        finally:
            self.closed += 1

    def scores(self, prompts, cached, tap=None):
        raise NotImplementedError


def run(engine, tokenizer, prompts, **options):
    """Completions, and the pieces' texts by prompt."""
    generation = Generation(engine, tokenizer, prompts, Sampling(vocab=tokenizer.vocab_size),
                            **{"max_tokens": 100, **options})
    texts = [""] * len(prompts)
    for piece in generation:
        texts[piece.index] += piece.text
    assert texts == [c.text for c in generation.completions()]
    return generation.completions()


def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer):
    ids = tokenizer.encode(TEXT * 3)
    for cut in (0, 1, 3, 8, 40):
        stream = TextStream(tokenizer, ids[:cut])
        pieces = [stream.push(t) for t in ids[cut:]] + [stream.end()]
        assert not any("\ufffd" in p for p in pieces)
        before = tokenizer.decode(ids[:cut])
        assert before.rstrip("\ufffd") + "".join(pieces) == TEXT * 3
        assert sum(map(bool, pieces)) > 20  # as it comes, not at the end


def test_a_space_after_the_prompt_is_kept(fallback):
    stream = TextStream(fallback, fallback.encode("Gr"))
    assert "".join(stream.push(t) for t in [fallback.inner.token_to_id("▁end")] * 2) == " end end"


def test_bytes_that_are_no_text_come_out_without_end(byte_level, rng):
    """A model of random weights writes such: held back for as long as they could become a character, no longer."""
    ids = rng.integers(0, byte_level.vocab_size, 600).tolist()
    stream, longest, waiting = TextStream(byte_level, []), 0, 0
    out = ""
    for token in ids:
        piece = stream.push(token)
        waiting = 0 if piece else waiting + 1
        longest, out = max(longest, waiting), out + piece
    assert out + stream.end() == byte_level.decode(ids)
    assert longest <= 6 and len(stream.ids) < 200
    stream = TextStream(byte_level, [])
    never = byte_level.encode("🙂")[0]  # the first byte of four, again and again
    assert len("".join(stream.push(never) for _ in range(50))) >= 45


def test_a_character_that_never_ends_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("G🙂")
    stream = TextStream(tokenizer, [])
    text = "".join(stream.push(t) for t in ids[:-1])
    assert text == "G" and set(stream.end()) == {"\ufffd"}


@pytest.mark.parametrize(("stop", "text", "expected"), [
    (["END"], "so it ENDs", "so it "), (["END"], "EEND", "E"), (["abab"], "xababab", "x"),
    (["cd", "bcx"], "abcd", "ab"), (["d", "bcd"], "abcd", "a"), (["zz"], "plain z", "plain z"), ([], "any", "any"),
    (["\n\n"], "a\nb\n\nc", "a\nb"), (["本"], "日本", "日")])
def test_stop_strings_end_the_text_wherever_tokens_end(stop, text, expected):
    for size in (1, 2, 3, 100):
        found, out = StopFilter(stop), ""
        for at in range(0, len(text), size):
            out += found.push(text[at:at + size])
            assert text.startswith(out) and not any(s in out for s in stop)
            if found.found:
                break
        assert (out + found.held, found.found) == (expected, expected != text)
        assert found.held == "" or not found.found


def test_reasons_to_end(byte_level):
    t, words = byte_level, byte_level.encode("Grüße und naïve")
    def one(says, **options):
        return run(Script([says], S=options.pop("S", 1000)), t, [[5]], **options)[0]
    end = one([*words, 7, 8, 9], eos=[6, 7])
    assert (end.text, end.finish_reason, end.tokens) == ("Grüße und naïve", "eos", tuple(words))
    cut = one(words, max_tokens=3)
    assert (cut.finish_reason, len(cut.tokens), cut.text) == ("length", 3, t.decode(words[:3]))
    full = one(words, S=6)
    assert (full.finish_reason, len(full.tokens)) == ("context", 5)
    stopped = one(words, stop=["ße un"])
    assert (stopped.finish_reason, stopped.text) == ("stop", "Grü")
    nothing = one(words, S=1)
    assert (nothing.finish_reason, nothing.text, nothing.ttft_s) == ("context", "", None)
    at_once = one([7], eos=[7])
    assert (at_once.finish_reason, at_once.text, at_once.tokens) == ("eos", "", ())
    assert str(stopped) == "Grü"


def test_what_was_held_back_is_given_at_the_end_and_may_hold_a_stop(byte_level):
    words = byte_level.encode("Grüße EN")
    assert run(Script([words]), byte_level, [[5]], stop=["END"], max_tokens=len(words))[0].text == "Grüße EN"
    half = byte_level.encode("G🙂")[:-1]
    ended = run(Script([half]), byte_level, [[5]], stop=["\ufffd"], max_tokens=len(half))[0]
    assert (ended.text, ended.finish_reason) == ("G", "stop")


def test_sequences_end_each_on_its_own_and_the_engine_then_stops(byte_level):
    words = [byte_level.encode(w) for w in ("Grüße", "und Küsse", "in naïve words")]
    script = Script([[*w, 7] for w in words])
    out = run(script, byte_level, [[5], [6], [8]], eos=[7])
    assert [c.text for c in out] == ["Grüße", "und Küsse", "in naïve words"]
    assert len(script.calls) == 1 and script.closed == 1


def test_prompts_beyond_the_batch_follow_with_numbers_of_their_own(byte_level):
    script = Script([byte_level.encode(f"{n}{n}") for n in range(5)], B=2)
    out = run(script, byte_level, [[5]] * 5, max_tokens=2)
    assert [c.text for c in out] == ["00", "11", "22", "33", "44"]
    assert [first for _, first, _ in script.calls] == [0, 2, 4]


def test_a_full_sequence_does_not_end_the_others(byte_level):
    """Where one has filled the context, the others go on with what they have, in their rows."""
    says = [byte_level.encode("und naïve und naïve words") for _ in range(2)]
    long, short = [5] * 12, [6]
    says[0] = [0] * 11 + says[0]
    alone = run(Script([says[1]], S=16), byte_level, [short], max_tokens=10)[0]
    script = Script(says, S=16)
    out = run(script, byte_level, [long, short], max_tokens=10)
    assert (out[0].finish_reason, len(out[0].tokens)) == ("context", 4)
    assert (out[1].finish_reason, out[1].tokens) == ("length", alone.tokens)
    assert [c[0] for c in script.calls] == [[long, short], [[5], [6, *out[1].tokens[:4]]]] and script.calls[1][2] == 6


def test_the_cpu_engine_gives_the_same_text_after_a_restart_and_alone(byte_level):
    engine = CpuEngine(SMALL, parameters(SMALL), 2, 40)
    def tokens(prompts, first=0):
        generation = Generation(engine, byte_level, prompts, Sampling(vocab=97, temperature=1.0, seed=5, first=first),
                                max_tokens=30)
        for _ in generation:
            pass
        return [c.tokens for c in generation.completions()]
    both = tokens([[1] * 30, [2, 3]])
    assert len(both[0]) == 10 and len(both[1]) == 30 and tokens([[2, 3]], first=1) == [both[1]]


def test_times_are_those_of_the_clock(byte_level):
    clock = itertools.count(0, 0.5).__next__
    script = Script([byte_level.encode("Grüße und naïve words")])
    out = run(script, byte_level, [[5, 5, 5]], max_tokens=5, clock=clock)[0]
    assert (out.ttft_s, out.prefill_tok_s, out.decode_tok_s, out.prompt_tokens) == (0.5, 6.0, 2.0, 3)


def test_what_is_there_when_interrupted(byte_level):
    generation = Generation(Script([byte_level.encode("Grüße und naïve")] * 2), byte_level, [[5], [6]],
                            Sampling(vocab=300), max_tokens=50)
    pieces = iter(generation)
    for _ in range(8):
        next(pieces)
    assert {c.finish_reason for c in generation.completions()} == {"interrupted"}
    assert len(generation.completions()[0].tokens) == 4 and generation.completions()[0].text


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"stop": ["a", ""]}, {"prompts": []}])
def test_what_makes_no_sense_is_refused(byte_level, bad):
    options = {"prompts": [[1]], "max_tokens": 5, **bad}
    with pytest.raises(ShapeError):
        Generation(Script([[]]), byte_level, options.pop("prompts"), Sampling(vocab=9), **options)


def test_an_engine_that_gives_nothing_is_a_defect_and_no_endless_loop(byte_level):
    class Silent(Script):
        def generate(self, prompts, sampling, limit):
            return iter(())
    with pytest.raises(ShapeError, match="engine"):
        list(Generation(Silent([[]]), byte_level, [[1]], Sampling(vocab=9), max_tokens=5))
