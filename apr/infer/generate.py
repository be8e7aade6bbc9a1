"""Text from an engine: prompts in; pieces of text as they become certain, and a Completion at each sequence's end.

A piece is certain when no later token can change it: a character whose bytes have not all come is held back, and so is
what may turn out to be the beginning of a stop string. An engine ends when one sequence has filled the context; the
others go on, from a new prefill of what they have.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from apr.config import Sampling
from apr.data.tokenizer import Tokenizer
from apr.errors import ShapeError
from apr.infer.engine import Engine

UNKNOWN = "\ufffd"  # what bytes that are no UTF-8, or not yet, decode to
CONTEXT = 8  # tokens, decoded with the next ones: some tokenizers drop a space at a text's beginning
LONGEST_CHARACTER = 4  # bytes, each of which may be a token


@dataclass(frozen=True)
class Completion:
    """What was generated for a prompt: text before any stop string, token ids before any end-of-text token.

    `finish_reason` is eos, stop, length (max_tokens), context (no room) or interrupted. Times in seconds from when the
    prompt's batch began; ttft_s None and rates 0 where there was nothing to measure. str() is the text.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    ttft_s: float | None
    prefill_tok_s: float
    decode_tok_s: float

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Piece:
    """Text that continues prompt number `index`; `completion` with the last piece."""

    index: int
    text: str
    completion: Completion | None = None


class TextStream:
    """Token ids in, certain text out; `prompt` is what they continue."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        tails = [list(prompt[-n:]) for n in range(CONTEXT, 0, -1)]
        texts = [tokenizer.decode(tail) for tail in tails]
        # The longest tail that begins with a whole character, and ends with one unless the prompt does not.
        best = min(range(CONTEXT), key=lambda i: (UNKNOWN in texts[i], UNKNOWN in texts[i].rstrip(UNKNOWN), i))
        self.ids = tails[best]
        self.bounds = [len(self.ids)]  # where whole characters end
        self.given = len(texts[best].rstrip(UNKNOWN))  # characters of the text of `ids` that are out

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith(UNKNOWN):
            whole = len(self.ids) - self.bounds[-1] >= LONGEST_CHARACTER  # all but the last character is
            return self._give(text[:-1]) if whole else ""
        out = self._give(text)
        self.bounds.append(len(self.ids))
        if len(self.bounds) > 2 * CONTEXT:
            cut = self.bounds[-CONTEXT]
            self.ids, self.bounds = self.ids[cut:], [b - cut for b in self.bounds[-CONTEXT:]]
            self.given = len(self.tokenizer.decode(self.ids))
        return out

    def end(self) -> str:
        """What was held back."""
        return self._give(self.tokenizer.decode(self.ids))

    def _give(self, text: str) -> str:
        out = text[self.given:]
        self.given = max(self.given, len(text))
        return out


class StopFilter:
    """Text in, text before the first stop string out; the beginning of one is held back until it is decided."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = tuple(stop), "", False

    def push(self, text: str) -> str:
        """The text that is certainly before any stop string; `found` is set when one has come."""
        text = self.held + text
        places = [at for s in self.stop if (at := text.find(s)) >= 0]
        if places:
            self.held, self.found = "", True
            return text[:min(places)]
        keep = max((n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
                   default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]


@dataclass
class _Sequence:
    """One prompt on its way."""

    prompt: Sequence[int]
    stream: TextStream
    stops: StopFilter
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    completion: Completion | None = None


class Generation:
    """Completions of prompts (token ids), in batches of the engine's B; iterate once for the pieces.

    `eos` are ids that end a sequence, `stop` texts. Raises ShapeError for no prompt, no token to make, an empty stop
    string; iterating raises as engine.generate.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling, *,
                 max_tokens: int, eos: Iterable[int] = (), stop: Sequence[str] = (),
                 clock: Callable[[], float] = time.perf_counter) -> None:
        if max_tokens < 1 or not all(stop) or not prompts:
            raise ShapeError("generation", "a prompt, max_tokens of 1 or more, stop strings that are not empty",
                             f"{len(prompts)} prompts, {max_tokens}, {list(stop)[:4]!r}", "correct it")
        self.engine, self.sampling, self.max_tokens, self.clock = engine, sampling, max_tokens, clock
        self.eos = frozenset(eos)
        self.sequences = [_Sequence(p, TextStream(tokenizer, p), StopFilter(stop)) for p in prompts]
        self.began = 0.0

    def __iter__(self) -> Iterator[Piece]:
        for at in range(0, len(self.sequences), self.engine.B):
            batch = self.sequences[at:at + self.engine.B]
            self.began = self.clock()
            while any(s.completion is None for s in batch):
                yield from self._run(batch, at)

    def completions(self) -> list[Completion]:
        """All completions; those that have not ended are `interrupted`."""
        return [s.completion or self._complete(s, "interrupted") for s in self.sequences]

    def _run(self, batch: list[_Sequence], first: int) -> Iterator[Piece]:
        """One run of the engine; what has ended takes part as a single token, so that rows keep their numbers."""
        texts = [[*s.prompt, *s.tokens] if s.completion is None else s.prompt[:1] for s in batch]
        left = self.max_tokens - min(len(s.tokens) for s in batch if s.completion is None)
        steps = self.engine.generate(texts, replace(self.sampling, first=self.sampling.first + first), left)
        now = None
        for step in steps:
            now = self.clock()
            for row, (sequence, token) in enumerate(zip(batch, step.tolist(), strict=True)):
                if sequence.completion is None:
                    yield self._advance(sequence, first + row, token, now)
            if all(s.completion is not None for s in batch):
                break
        if isinstance(steps, Generator):
            steps.close()
        full = [s.completion is None and len(s.prompt) + len(s.tokens) >= self.engine.S for s in batch]
        if now is None and not any(full):
            raise ShapeError("engine", "tokens, until a sequence is full", "an end without one", "report this defect")
        for row, sequence in enumerate(batch):
            if full[row]:
                yield self._end(sequence, first + row, "context")

    def _advance(self, sequence: _Sequence, index: int, token: int, now: float) -> Piece:
        sequence.times.append(now)
        if token in self.eos:
            return self._end(sequence, index, "eos")
        sequence.tokens.append(token)
        text = sequence.stops.push(sequence.stream.push(token))
        sequence.text += text
        if sequence.stops.found:
            sequence.completion = self._complete(sequence, "stop")
        elif len(sequence.tokens) == self.max_tokens:
            return self._end(sequence, index, "length", text)
        return Piece(index, text, sequence.completion)

    def _end(self, sequence: _Sequence, index: int, reason: str, text: str = "") -> Piece:
        """The last piece: `text` and what was held back, in which a stop string may still be found."""
        rest = sequence.stops.push(sequence.stream.end())
        rest += sequence.stops.held
        sequence.text += rest
        sequence.completion = self._complete(sequence, "stop" if sequence.stops.found else reason)
        return Piece(index, text + rest, sequence.completion)

    def _complete(self, sequence: _Sequence, reason: str) -> Completion:
        times, ttft = sequence.times, sequence.times[0] - self.began if sequence.times else None
        seconds = times[-1] - times[0] if times else 0.0
        return Completion(sequence.text, tuple(sequence.tokens), len(sequence.prompt), reason, ttft,
                          len(sequence.prompt) / ttft if ttft else 0.0, (len(times) - 1) / seconds if seconds else 0.0)
