"""A few thousand cases of the structured fuzzer for each format, and broken readers, which it must notice."""

import re
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest

CASES = {"apr": 4000, "safetensors": 4000, "gguf": 4000, "gguf-model": 1500}
READER = {"apr": "apr_file", "safetensors": "safetensors", "gguf": "gguf_file"}


@pytest.mark.parametrize("form", fuzz.READ)
def test_structured_fuzz(form, capsys):
    """In a process of its own, so that its memory is its own."""
    command = [sys.executable, str(Path(fuzz.__file__)), "--format", form, "--cases", str(CASES[form]), "--seed", "7"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    with capsys.disabled():
        print("\n" + found.stdout.strip())
    assert (found.returncode, found.stderr) == (0, "")
    counts = dict(re.findall(r"([a-z-]+) (\d+)", found.stdout))
    assert int(counts["tried"]) == int(counts["refused"]) + int(counts["accepted"]) == CASES[form]
    assert int(counts["accepted"]) > CASES[form] / 20, "a fuzzer whose files are all refused at once looks at nothing"
    assert int(counts["refused"]) > CASES[form] / 3


@pytest.mark.parametrize("form", READER)
def test_the_fuzzer_sees_a_reader_that_does_not_look_at_places(form, monkeypatch, capsys):
    monkeypatch.setattr(f"apr.formats.{READER[form]}.checked_tiling", lambda *_, **__: None)
    assert fuzz.run(form, 3000, 7)[0]["accepted-though-invalid"] > 0


def test_the_fuzzer_sees_a_reader_that_crashes_or_hangs(monkeypatch, capsys):
    def crash(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("apr.formats.gguf_file.checked_tiling", crash)
    assert fuzz.run("gguf", 100, 7)[0]["crash"] > 0
    monkeypatch.setattr("apr.formats.gguf_file.checked_tiling", lambda *_, **__: time.sleep(9))
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    assert fuzz.run("gguf", 20, 7)[0]["hang"] > 0


def test_the_fuzzer_sees_a_reader_that_refuses_good_files(monkeypatch, capsys):
    def refuse(*_, **__):
        raise fuzz.AprError("a", "b", "c", "d")

    monkeypatch.setattr("apr.formats.apr_file.checked_tiling", refuse)
    assert fuzz.run("apr", 100, 7)[0]["refused-though-valid"] > 0
