"""Error messages are one printable line whatever is in them, and exit codes are those of the table."""

import re

import pytest

import apr.errors
from apr.errors import AprError, ConfigError, NotFoundError, did_you_mean, one_line
from apr.files import os_errors, read_bytes
from apr.strict import read_json

KINDS = [e for e in vars(apr.errors).values() if isinstance(e, type) and issubclass(e, AprError)]
HOSTILE = ["a\nb", "a\r\nb", "\x1b[2J\x1b[31m", "\x1b]0;title\x07", "tab\t", "\u2028line\u2029", "\u202egnp.exe",
           "\x7f\x85", "\udcff", "\x00", "🙂\n"]


def test_the_docstring_is_the_table_of_exit_codes():
    table = dict(re.findall(r"^    (?:[├└]── )?(\w+) +(\d+) ", apr.errors.__doc__, re.M))
    assert {kind.__name__: str(kind.exit_code) for kind in KINDS} == table


def test_exit_codes_are_those_of_the_design():
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes | {"AprError": 1, "ConfigError": 2, "NotFoundError": 3, "FormatError": 4, "GateError": 5,
                    "IntegrityError": 6, "StorageError": 7, "InferenceError": 8, "UnavailableError": 9,
                    "OutOfMemoryError": 11, "MeasureError": 12,
                    "Stopped": 75, "ShapeError": 1} == codes
    assert all(kind is AprError or kind.__base__ is AprError for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_message_is_one_printable_line(kind, text):
    for parts in ((text, "b", "c", "d"), ("a", text, "c", "d"), ("a", "b", text, "d"), ("a", "b", "c", text)):
        line = str(kind(*parts))
        assert line.isprintable() and len(line.splitlines()) == 1
        line.encode("utf-8")


def test_a_message_has_four_parts():
    error = ConfigError("run.yaml: lr", "a number", "'x'", "correct it")
    assert str(error) == "run.yaml: lr: expected a number, found 'x'; correct it"
    assert (error.where, error.expected, error.found, error.fix) == ("run.yaml: lr", "a number", "'x'", "correct it")


@pytest.mark.parametrize(("text", "line"), [
    ("plain é日本🙂", "plain é日本🙂"), ("a\nb", "a\\x0ab"), ("\x1b[0m", "\\x1b[0m"), ("\u2028", "\\x2028"), ("", ""),
    ("x" * 600, "x" * 600), ("x" * 601, "x" * 599 + "…"), ("\n" * 600, ("\\x0a" * 150)[:599] + "…")])
def test_one_line(text, line):
    assert one_line(text) == line
    assert len(one_line(text, 7)) <= 7


@pytest.mark.parametrize("text", [t for t in HOSTILE if "\0" not in t], ids=ascii)
def test_a_hostile_file_name_stays_one_line(tmp_path, text):
    path = tmp_path / text.replace("/", "")
    for action in (lambda: read_bytes(path, 10), lambda: read_json(path)):
        with pytest.raises(NotFoundError) as caught:
            action()
        assert str(caught.value).isprintable() and str(caught.value).startswith(one_line(str(path)))
    with pytest.raises(NotFoundError) as caught, os_errors(text):
        path.stat()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("name", "answer"), [
    ("learning_rat", "did you mean 'learning_rate'?"), ("learning_rate", "did you mean 'learning_rate'?"),
    ("zzz", "known: batch, learning_rate, seed"), ("", "known: batch, learning_rate, seed"),
    ("sede", "did you mean 'seed'?")])
def test_did_you_mean(name, answer):
    assert did_you_mean(name, ["seed", "learning_rate", "batch"]) == answer
    assert did_you_mean(name, {"seed": 1, "learning_rate": 2, "batch": 3}) == answer
