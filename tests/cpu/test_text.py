"""Documents in a fixed order; what is passed over is counted; a bad file is named with the place in it."""

import json
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from apr.data.text import SOURCES_SKIPPED, documents, read_text, standard_library
from apr.errors import AprError, ConfigError, FormatError, NotFoundError


def texts(*paths: Path, field: str = "content") -> tuple[list[str], dict[str, int]]:
    """The documents under `paths`, and what was passed over."""
    skipped: Counter[str] = Counter()
    return list(documents(list(paths), field, skipped)), dict(skipped)


def fault(path: Path, field: str = "content") -> str:
    """The one line of the FormatError that reading `path` raises."""
    with pytest.raises(FormatError) as caught:
        texts(path, field=field)
    assert str(caught.value).isprintable() and str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path))


TREE = {"b.txt": b"second", "a.txt": b"first", "sub/z.py": b"x = 1\n", "sub/a.md": "é🙂\r\n".encode(),
        "c/d/e/f": b"deep", ".hidden": b"no", ".git/config": b"no", "sub/.cache/x.txt": b"no", "empty": b"",
        "image.png": b"\x89PNG\0\0", "latin1.txt": b"caf\xe9", "sub/zero.txt": b"a\0b", "space.txt": b" "}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder of texts and of what is no text, made in an order that is not the answer."""
    for name, data in TREE.items():
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_bytes(data)
    (tmp_path / "outside.txt").write_bytes(b"outside")
    (tmp_path / "t" / "link.txt").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "t" / "broken.txt").symlink_to("nowhere")
    (tmp_path / "t" / "folder_link").symlink_to(tmp_path / "t" / "sub")
    (tmp_path / "t" / "loop").symlink_to(tmp_path / "t")
    os.mkfifo(tmp_path / "t" / "fifo")
    return tmp_path / "t"


def test_a_folder_in_order_with_what_was_passed_over(tree):
    found, skipped = texts(tree)
    assert found == ["first", "second", "deep", " ", "é🙂\r\n", "x = 1\n"]
    assert skipped == {"hidden": 3, "link": 1, "empty": 1, "not UTF-8 text": 3}
    assert texts(tree) == (found, skipped)


def test_the_order_is_that_of_the_names_given(tree):
    found, _ = texts(tree / "b.txt", tree / "sub", tree / "a.txt", tree / "b.txt")
    assert found == ["second", "é🙂\r\n", "x = 1\n", "first", "second"]


def test_the_order_does_not_depend_on_where_the_folder_is(tree, tmp_path):
    moved = tmp_path / "0" / ".hidden_above"  # what is hidden counts from the folder that was named
    moved.parent.mkdir()
    os.rename(tree, moved)
    assert texts(moved)[0] == ["first", "second", "deep", " ", "é🙂\r\n", "x = 1\n"]


@pytest.mark.parametrize(("name", "says"), [
    ("empty", "expected some text, found an empty file"), ("image.png", "byte at offset 4"),
    ("sub/zero.txt", "zero byte at offset 1"), ("latin1.txt", "byte 0xe9 at offset 3")])
def test_a_file_named_by_the_user_must_be_text(tree, name, says):
    assert says in fault(tree / name)


def test_a_named_link_is_read_and_a_named_hole_is_refused(tree):
    assert texts(tree / "link.txt") == (["outside"], {})
    for name, kind in (("broken.txt", NotFoundError), ("missing", NotFoundError), ("fifo", FormatError)):
        with pytest.raises(kind):
            texts(tree / name)


def test_text_is_taken_as_it_is(tmp_path):
    text = "\ufeffa\r\nb\r\x0c\u2028 \t\n\n"
    (tmp_path / "a").write_bytes(text.encode())
    assert read_text(tmp_path / "a") == text


ROWS = [{"content": "one\ntwo", "n": 1}, {"content": "é🙂\u2028", "n": None},
        {"content": '"quoted" <|endoftext|>', "n": [1]}]


def jsonl(path: Path, rows: list, end: str = "\n") -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + end for r in rows),
                    encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n  \n"])
def test_jsonl_is_one_document_per_line(tmp_path, end):
    path = jsonl(tmp_path / "a.jsonl", ROWS, end)
    assert texts(path)[0] == [r["content"] for r in ROWS]
    path.write_bytes(path.read_bytes().rstrip())  # the last line need not be ended
    assert texts(path)[0] == [r["content"] for r in ROWS]
    assert texts(tmp_path)[0] == [r["content"] for r in ROWS]  # in a folder too


def test_jsonl_field_is_chosen(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t", "content": "c"}])
    assert (texts(path)[0], texts(path, field="text")[0]) == (["c"], ["t"])
    assert "line 1: expected an object with text in 'body', found fields text, content; set" in fault(path, "body")


@pytest.mark.parametrize("bad", [
    '{"content": 1}', '{"content": null}', '{"other": "x"}', "[]", '"x"', "3", "{", '{"content": "a", "content": "b"}',
    '{"content": "\\ud800"}', "\ufeff{}", '{"content": NaN}'])
def test_a_bad_line_is_named(tmp_path, bad):
    assert fault(jsonl(tmp_path / "a.jsonl", [ROWS[0], "", bad, ROWS[1]])).startswith(" line 3: ")
    with pytest.raises(FormatError, match=r"a\.jsonl line 3: "):  # in a folder it is an error too, not passed over
        texts(tmp_path)


def test_bad_bytes_in_jsonl_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "a"}\n{"content": "\xff"}\n')
    assert fault(tmp_path / "a.jsonl").startswith(" line 2: expected UTF-8, found byte 0xff")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"pip install 'apr\[parquet\]'"):
        texts(tmp_path / "a.parquet")


def parquet(path: Path, columns: dict) -> Path:
    """A Parquet file of these columns."""
    pa = pytest.importorskip("pyarrow", reason="the 'parquet' extra is not installed")
    import pyarrow.parquet as pq
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def test_parquet_is_one_document_per_row(tmp_path):
    contents = [f"row {i} é🙂\n" for i in range(700)]
    path = parquet(tmp_path / "a.parquet", {"n": list(range(700)), "content": contents})
    assert texts(path)[0] == texts(tmp_path)[0] == contents
    assert "a column 'body', found n, content" in fault(path, "body")


@pytest.mark.parametrize("bad", [0, 255, 256, 599])
def test_a_bad_parquet_row_is_named(tmp_path, bad):
    path = parquet(tmp_path / "a.parquet", {"content": [None if i == bad else "x" for i in range(600)]})
    assert fault(path).startswith(f" row {bad + 1}: ")


def test_what_is_no_parquet_is_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"content": ["x"] * 1000})
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-1], data[:len(data) // 2], data[:4] + b"\xff" * 40 + data[44:]):
        path.write_bytes(damaged)
        with pytest.raises(AprError):
            texts(path)
    assert "row 1: " in fault(parquet(tmp_path / "b.parquet", {"content": [1, 2]}))


def test_the_standard_library_is_a_corpus():
    skipped: Counter[str] = Counter()
    first = list(islice(standard_library(skipped), 30))
    assert first == list(islice(standard_library(Counter()), 30)) and all(first)
    assert sum(map(len, first)) > 100_000 and "import" in first[0] + first[1]
    assert {"test", "site-packages"} <= SOURCES_SKIPPED


def test_empty_rows_are_counted_and_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n{"content": ""}\n{"content": "two"}\n')
    skipped = Counter()
    assert list(documents([tmp_path / "a.jsonl"], "content", skipped)) == ["one", "two"] and skipped == {"empty": 1}
