"""Some cases of the structured fuzzer for each format, a time box of each, and broken readers, which it must see."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
import yaml
from fuzz_forms import FORMS

from apr.data.shards import TokenSource
from apr.strict import _StrictLoader

# Rows of the list of faults that the cases of a format are of, and how many there are in make test.
ROWS = {"apr": ("B3", 2000), "safetensors": ("B2", 2000), "gguf": ("B11", 2000), "gguf-model": ("B5", 500),
        "json": ("B8", 2000), "config": ("B8", 2000), "yaml": ("H2", 250), "run": ("H3", 1000), "shards": ("C3", 600),
        "index": ("B10", 400), "checkpoint": ("A9", 300), "tokenizer": ("B7", 250), "kernel": ("F3", 2000)}


def fuzzed(form, capsys, *how):
    """The row of the table for a format, in a process of its own, which must end well and say nothing else."""
    command = [sys.executable, str(Path(fuzz.__file__)), "--format", form, "--seed", "7", *how]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    with capsys.disabled():
        print("\n" + found.stdout.rstrip())
    assert (found.returncode, found.stderr) == (0, "")
    row = dict(zip(fuzz.COLUMNS, found.stdout.splitlines()[1].split(), strict=True))
    cases, accepted, refused = (int(row[name]) for name in ("cases", "accepted", "refused"))
    assert cases == accepted + refused
    assert accepted > cases / 20, "a fuzzer whose files are all refused at once looks at nothing"
    assert refused > cases / 3
    return cases


@pytest.mark.parametrize("form", [pytest.param(form, id=f"{row}-{form}") for form, (row, _) in ROWS.items()])
def test_structured_fuzz(form, capsys):
    assert fuzzed(form, capsys, "--cases", str(ROWS[form][1])) == ROWS[form][1]


@pytest.mark.long
@pytest.mark.parametrize("form", [pytest.param(form, id=f"{row}-{form}") for form, (row, _) in ROWS.items()])
def test_structured_fuzz_for_half_a_minute(form, capsys):
    assert fuzzed(form, capsys, "--seconds", "30") > ROWS[form][1]


def test_every_format_is_fuzzed():
    assert ROWS.keys() == FORMS.keys()


def test_a_case_is_a_function_of_format_seed_and_number():
    for form in FORMS:
        assert fuzz.case(form, 3, 5) == fuzz.case(form, 3, 5) != fuzz.case(form, 4, 5)


def without(*_, **__):
    """Stands for a check that is not made."""


def any_depth(monkeypatch):
    """JSON as deep as Python takes it, with lone surrogates."""
    monkeypatch.setattr("apr.strict._check_tree", without)


def any_scaling(monkeypatch):
    """A scaling of the rotation that is not looked at."""
    monkeypatch.setattr("apr.hf_config._scaling", without)


def octal(monkeypatch):
    """YAML's integers as PyYAML has them: 010 is 8."""
    ours, theirs = _StrictLoader.yaml_implicit_resolvers, yaml.SafeLoader.yaml_implicit_resolvers
    monkeypatch.setattr(_StrictLoader, "yaml_implicit_resolvers", {
        first: [*ours.get(first, []), *(pair for pair in theirs[first] if pair[0].endswith(":int"))]
        for first in theirs})


def any_file(monkeypatch):
    """Names and links that lead out of the folder."""
    monkeypatch.setattr("apr.formats.hf_folder.SHARD_NAME", re.compile(r"[^\0]*"))
    monkeypatch.setattr("apr.formats.hf_folder._inside", lambda folder, name: folder / name)


def any_hash(monkeypatch):
    """Shards whose hash is not looked at."""
    monkeypatch.setattr("apr.data.shards.TokenSource", lambda *args: TokenSource(*args[:4]))


def any_bytes(monkeypatch):
    """A tokenizer without a token for every byte, whose round trip is not tried."""
    monkeypatch.setattr("apr.data.tokenizer.BYTES", ([], []))
    monkeypatch.setattr("apr.data.tokenizer.PROBE", "")


def no_tiling(reader):
    return lambda monkeypatch: monkeypatch.setattr(f"apr.formats.{reader}.checked_tiling", without)


BROKEN = {  # what is done to a reader, and in how many cases that must show
    "B4-apr": (no_tiling("apr_file"), 200), "B4-safetensors": (no_tiling("safetensors"), 200),
    "B4-gguf": (no_tiling("gguf_file"), 200), "B8-json": (any_depth, 900), "H3-config": (any_scaling, 400),
    "H2-yaml": (octal, 100), "C3-shards": (any_hash, 100), "B10-index": (any_file, 150),
    "B7-tokenizer": (any_bytes, 60)}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_fuzzer_sees_a_reader_that_does_not_look(broken, monkeypatch, capsys):
    form, (change, cases) = broken.partition("-")[2], BROKEN[broken]
    before = fuzz.run(form, cases, 7).counts()["accepted-though-invalid"]
    change(monkeypatch)
    assert fuzz.run(form, cases, 7).counts()["accepted-though-invalid"] > before


def test_the_fuzzer_sees_a_reader_that_crashes_hangs_or_takes_memory(monkeypatch, capsys):
    def crash(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("apr.formats.gguf_file.checked_tiling", crash)
    assert fuzz.run("gguf", 100, 7).counts()["crash"] > 0
    monkeypatch.setattr("apr.formats.gguf_file.checked_tiling", lambda *_, **__: b"x" * 2**27)
    assert fuzz.run("gguf", 20, 7).counts()["over-memory"] > 0
    monkeypatch.setattr("apr.formats.gguf_file.checked_tiling", lambda *_, **__: time.sleep(9))
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    assert fuzz.run("gguf", 20, 7).counts()["hang"] > 0
    assert "case" in capsys.readouterr().err


def test_the_fuzzer_sees_a_reader_that_refuses_good_files(monkeypatch, capsys):
    def refuse(*_, **__):
        raise fuzz.AprError("a", "b", "c", "d")

    monkeypatch.setattr("apr.formats.apr_file.checked_tiling", refuse)
    assert fuzz.run("apr", 100, 7).counts()["refused-though-valid"] > 0


def deaf():
    """Hang, and hear no alarm."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)


@pytest.mark.parametrize(("end", "kill"), [("crash", os.abort), ("hang", deaf), ("over-memory", lambda: bytes(2**30))])
def test_the_fuzzer_goes_on_after_a_case_that_kills_it(end, kill, monkeypatch, capfd):
    """A library in Rust or C may end the process or hear no signal, or want it all: one case, and the next is tried."""
    form, deadly = FORMS["kernel"], fuzz.case("kernel", 7, 9)

    def read(path):
        return kill() if path.read_bytes() == deadly else form.read(path)

    monkeypatch.setitem(FORMS, "kernel", form._replace(read=read))
    monkeypatch.setattr(fuzz, "STALL", 1.0)
    tally = fuzz.watched("kernel", 60, 7, None, False)
    assert (tally.number, tally.counts()[end], tally.bad()) == (60, 1, 1)
    assert f"{end}: case 9" in capfd.readouterr().err
