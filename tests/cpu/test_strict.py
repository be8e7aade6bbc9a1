"""The strict readers of JSON and YAML: what they take, what they refuse, and that the refusal is one line."""

import dataclasses
import json
import math

import pytest

from apr.errors import FormatError
from apr.strict import MAX_DEPTH, MAX_YAML_BYTES, parse_json, parse_yaml, plain, read_json, read_yaml


def refused(parse, data: bytes, *parts: str) -> None:
    """`data` is refused in one line of ordinary length that names the file and holds every part."""
    with pytest.raises(FormatError) as caught:
        parse(data, "some.file")
    text = str(caught.value)
    assert text.startswith("some.file: expected ") and text.isprintable() and len(text) <= 600
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("value", [
    None, True, 0, -7, 2**70, 1.5, 1e-300, "", "é日本🙂\n\x00", [], {}, [1, [2, {"a": None}]], {"": {"a b": [1.0]}}])
def test_json_values(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        back = parse_json(text.encode(), "x")
        assert back == value and type(back) is type(value)


@pytest.mark.parametrize(("data", "part"), [
    (b"", "JSON"), (b" ", "JSON"), (b"{", "JSON"), (b"{'a': 1}", "line 1 column 2"), (b'{"a": 1} x', "JSON"),
    (b'{"a": 1}\n\n{"b": 2}', "line 3 column 1"), (b'{"a": 1, "a": 1}', "key 'a' twice"),
    (b'[{"x": {"b": 1, "c": 2, "b": 3}}]', "key 'b' twice"), (b'{"a\\u0062": 1, "ab": 2}', "key 'ab' twice"),
    (b'{"a\\u001b[31m\\n": 1, "a\\u001b[31m\\n": 2}', "twice"), (b"NaN", "NaN"), (b'{"a": -Infinity}', "-Infinity"),
    (b"[Infinity]", "Infinity"), (b"1e999", "1e999"), (b"-1e999", "-1e999"), (b"0x10", "JSON"), (b"01", "JSON"),
    (b'"\xff"', "byte 0xff at offset 1"), (b'{"a": "\xe9"}', "byte 0xe9 at offset 7"),
    (b"\xff\xfe{\x00}\x00", "byte 0xff"), (b'"\\ud800"', "lone surrogate"), (b'{"\\udfff": 1}', "lone surrogate"),
    (b"9" * 5000, "numbers of ordinary size"),
    (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), f"at most {MAX_DEPTH} levels"), (b"[" * 200_000, "levels"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "levels"), (b"// a\n1", "JSON"), (b"[1,]", "JSON"), (b"True", "JSON")])
def test_json_refuses(data, part):
    refused(parse_json, data, part)


def test_json_depth_and_size_limits_are_exact():
    deep = b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH
    assert parse_json(deep, "x") is not None
    refused(parse_json, b"[" + deep + b"]", "levels")
    assert parse_json(b" " * 9 + b"1", "x", limit=10) == 1
    refused(lambda d, w: parse_json(d, w, limit=10), b" " * 10 + b"1", "at most 10 bytes", "11 bytes")


def test_a_surrogate_pair_is_one_character():
    assert parse_json(b'"\\ud83d\\ude42"', "x") == "🙂"


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("5e-1", 0.5), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("-0.25", -0.25),
    ("3", 3), ("-3", -3), ("+3", 3), ("0", 0), ("true", True), ("false", False), ("null", None), ("~", None),
    ("", None), ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("No", "No"), ("True", "True"),
    ("NULL", "NULL"), ("017", "017"), ("0o17", "0o17"), ("0x1F", "0x1F"), ("0b11", "0b11"), ("1_000", "1_000"),
    ("12:30:45", "12:30:45"), ("2026-11-20", "2026-11-20"), (".inf", ".inf"), (".nan", ".nan"), ("NaN", "NaN"),
    ("1e", "1e"), ("e5", "e5"), ("'1'", "1"), ('"true"', "true"), ("qwen2_0_5b", "qwen2_0_5b"), ("a b # c", "a b"),
    ("=", "="), ("|\n  x\n  y\n", "x\ny\n")])
def test_yaml_scalars(text, value):
    back = parse_yaml(f"a: {text}".encode(), "x")["a"]
    assert back == value and type(back) is type(value)


def test_yaml_collections():
    text = b"train: {lr: 3e-4, warmup_steps: 20}\nlist:\n  - 1\n  - [a, b]\n'<<': 1\n"
    assert parse_yaml(text, "x") == {"train": {"lr": 3e-4, "warmup_steps": 20}, "list": [1, ["a", "b"]], "<<": 1}
    assert parse_yaml(b"<<: {a: 1}", "x") == {"<<": {"a": 1}}  # no merging
    assert parse_yaml(b"", "x") is None
    assert parse_yaml(json.dumps({"a": [1, "é", None]}).encode(), "x") == {"a": [1, "é", None]}


@pytest.mark.parametrize(("text", "part"), [
    ("a: 1\nb: 2\na: 3", "'a' twice at line 3"), ("x: {b: 1, b: 1}", "'b' twice"), ("a: &x 1\nb: *x", "aliases"),
    ("a: &a [*a]", "aliases"), ("!!python/object/apply:os.system ['true']", "tags"),
    ("a: !!python/name:os.system", "tags"), ("!!python/object/new:type [x, [], {}]", "tags"), ("a: !x 1", "tags"),
    ("a: [1", "line"), ("a: b: c", "line 1"), ("\ta: 1", "line 1"), ("a: 1\n--- \nb: 2", "document"),
    ("? [a]\n: 1", "key"), ("a: 1e999", "finite"), ("a: \x07", "plain YAML"), ("[" * 1000, "level"), ("@a", "line 1"),
    ("a: %b", "line 1")])
def test_yaml_refuses(text, part):
    refused(parse_yaml, text.encode(), part)


def test_yaml_refuses_what_is_not_utf8_and_what_is_too_long():
    refused(parse_yaml, b"a: \xe9", "byte 0xe9 at offset 3")
    refused(parse_yaml, b"# " + b"x" * MAX_YAML_BYTES, f"at most {MAX_YAML_BYTES} bytes")


def test_an_alias_bomb_costs_nothing():
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    refused(parse_yaml, text.encode(), "aliases are not allowed")


def test_numbers_stay_finite_and_typed():
    assert type(parse_yaml(b"1e3", "x")) is float and type(parse_yaml(b"1000", "x")) is int
    assert math.isclose(parse_yaml(b"1e-4", "x"), 1e-4)


@pytest.mark.parametrize(("read", "good", "bad"), [(read_json, b'{"a": 1}', b"{"), (read_yaml, b"a: 1", b"a: [")])
def test_reading_a_file_names_it_in_one_line(tmp_path, read, good, bad):
    path = tmp_path / "a\n\x1b[31mb.txt"
    path.write_bytes(good)
    assert read(path) == {"a": 1}
    path.write_bytes(bad)
    with pytest.raises(FormatError) as caught:
        read(path)
    assert str(caught.value).isprintable() and "a\\x0a\\x1b[31mb.txt" in str(caught.value)


def test_plain_is_what_json_can_say():
    @dataclasses.dataclass
    class Row:
        value: float
        items: tuple

    found = plain({1: Row(math.nan, (1, -math.inf)), "text": "x", "none": None})
    assert found == {"1": {"value": None, "items": [1, None]}, "text": "x", "none": None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
