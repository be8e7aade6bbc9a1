"""Strict readers of JSON and YAML, the only two in the project; and what is written as JSON made fit for them.

JSON: UTF-8; size, depth and number of values bounded; no duplicate key (Python keeps the last silently), no NaN or
Infinity, no lone surrogate. YAML: `1e-4` is a number (PyYAML says string), `no` is a string (PyYAML says False);
duplicate keys, aliases and tags are refused, as is what JSON cannot say. Both raise FormatError with the file's name.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from apr.errors import FormatError
from apr.files import read_bytes

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**15  # PyYAML takes 17 s and 300 MB for 2**20 bytes of "[],"
MAX_DEPTH = 64
MAX_VALUES = 2**18  # brackets and commas; each can cost 200 bytes of memory, against 2 in the file
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def parse_json(data: bytes, where: str, limit: int = MAX_JSON_BYTES, most: int = MAX_VALUES) -> Any:
    """The value of a JSON text.

    Raises FormatError: over `limit` bytes or `most` values, not UTF-8, not JSON, too deep, duplicate key, non-finite
    number.
    """
    def refuse(expected: str, found: str) -> NoReturn:
        raise FormatError(where, expected, found[:200], "write the file again with a correct tool")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            name = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            refuse("each key once", f"key {name!r} twice")
        return out

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            refuse("finite numbers", f"{text[:40]}")
        return value

    if len(data) > limit:
        refuse(f"at most {limit} bytes of JSON", f"{len(data)} bytes")
    if _marks(data) > most and (values := _marks(_STRING.sub(b"", data))) > most:
        refuse(f"at most {most} values", f"{values}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_float=finite,
                           parse_constant=lambda c: refuse("finite numbers", c))
    except UnicodeDecodeError as e:
        refuse("UTF-8", f"byte 0x{data[e.start]:02x} at offset {e.start}")
    except json.JSONDecodeError as e:
        refuse("JSON", f"{e.msg} at line {e.lineno} column {e.colno}")
    except RecursionError:
        refuse(f"at most {MAX_DEPTH} levels", "nesting beyond the parser's limit")
    except ValueError as e:  # an integer of thousands of digits
        refuse("numbers of ordinary size", str(e)[:80])
    _check_tree(value, refuse)
    return value


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """parse_json of a file."""
    return parse_json(read_bytes(path, limit), str(path), limit)


def _marks(data: bytes) -> int:
    """Brackets and commas: at least as many as there are values below the first."""
    return sum(data.count(mark) for mark in (b"[", b"{", b","))


def _check_tree(value: Any, refuse: Any, depth: int = 0) -> None:
    """Depth cap, no infinities, and no lone surrogates, which would blow up later, when the string is written."""
    if depth > MAX_DEPTH:
        refuse(f"at most {MAX_DEPTH} levels", "more")
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                refuse("valid Unicode", f"a lone surrogate in {value[:40]!r}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            refuse("finite numbers", str(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_tree(key, refuse, depth + 1)
            _check_tree(item, refuse, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_tree(item, refuse, depth + 1)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with JSON's idea of scalars, no duplicate keys, no aliases and no tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases are not allowed here"
        elif event.tag is not None:  # !!bool x is a KeyError in PyYAML, !!int "" an IndexError, !!set no JSON
            problem = f"tags are not allowed here: {event.tag}"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no scalar", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key_node.value!r} twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        out = super().construct_mapping(node, deep)
        if len(out) != len(node.value):  # 1 and 1.0 and true
            raise yaml.MarkedYAMLError(problem="keys that are equal", problem_mark=node.start_mark)
        return out


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(data: bytes, where: str) -> Any:
    """The value of a YAML text.

    Raises FormatError: over MAX_YAML_BYTES, not UTF-8, not YAML, a tag, an alias, a duplicate key, an infinity, too
    deep.
    """
    def refuse(expected: str, found: str) -> NoReturn:
        raise FormatError(where, expected, found, "correct the file")

    if len(data) > MAX_YAML_BYTES:
        refuse(f"at most {MAX_YAML_BYTES} bytes of YAML", f"{len(data)} bytes")
    try:
        value = _StrictLoader(data.decode("utf-8")).get_single_data()
    except UnicodeDecodeError as e:
        refuse("UTF-8", f"byte 0x{data[e.start]:02x} at offset {e.start}")
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        refuse("plain YAML", f"{e.problem}" + (f" at line {mark.line + 1}" if mark else ""))
    except (yaml.YAMLError, ValueError, OverflowError) as e:
        refuse("plain YAML", str(e)[:120])
    except RecursionError:
        refuse(f"at most {MAX_DEPTH} levels", "nesting beyond the parser's limit")
    _check_tree(value, refuse)
    return value


def read_yaml(path: Path) -> Any:
    """parse_yaml of a file."""
    return parse_yaml(read_bytes(path, MAX_YAML_BYTES), str(path))


def plain(value: Any) -> Any:
    """A value as JSON can say it: records as dictionaries, tuples as lists, null for a number that is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
