"""`apr cache` through the command line: what it lists, explains, finds bad, compiles and removes; exit codes."""

import json
import os
import re

import pytest
from fake_driver import H200, found

from apr.cli import cache as command
from apr.cli.main import main
from apr.driver import DriverInfo
from apr.ptx_store import Entry, decode, file_name

NONE = DriverInfo(False, "no NVIDIA driver", "", ())


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    """The bytes of a cache that holds what `tiny` needs in fp32 on sm_90a."""
    folder = tmp_path_factory.mktemp("warmed") / "cache"
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE_DIR", str(folder))
        assert main(["cache", "warm", "--preset", "tiny", "--precision", "fp32", "--arch", "sm_90a"]) == 0
    return {p.name: p.read_bytes() for p in folder.glob("*.kernel")}


@pytest.fixture
def folder(warmed, tmp_path, monkeypatch):
    """A copy of it, which is the user's cache now."""
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    for name, data in warmed.items():
        (path / name).write_bytes(data)
        (path / name).chmod(0o600)
    monkeypatch.setenv("APR_CACHE_DIR", str(path))
    return path


def entry_of(folder, stem) -> tuple:
    (path,) = folder.glob(f"{stem}-*")
    return path, decode(path.read_bytes())


def test_list(folder, capsys):
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("9 entries, ") and str(folder) in lines[-1]
    (norm,) = [line for line in lines if line.startswith("rmsnorm-")]
    assert re.fullmatch(r"rmsnorm-BLOCK=128-C=64-EPS=f358637bd-FLOATX=f32-sm_90a-[0-9a-f]{64}  \d+\.\d kB, [\d.]+ ms, "
                        r"registers: rmsnorm_backward \d+, rmsnorm_forward \d+, rmsnorm_weight_backward \d+", norm)
    assert main(["cache", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 9 and all(row["bytes"] > 1000 and row["entries"] and not row["problem"] for row in rows)


def test_explain_one_key_by_a_prefix_or_a_part(folder, capsys):
    _, entry = entry_of(folder, "rope")
    for text in ("rope", entry.key, entry.key[-20:], "THETA="):
        assert main(["cache", "explain", text]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == entry.key
        fields = dict(line.split(maxsplit=1) for line in lines[1:])
        assert (fields["kernel"], fields["EPS"], fields["THETA"], fields["arch"]) == ("rope", "1e-06", "10000.0",
                                                                                     "sm_90a")
        assert fields["compiler"].startswith("NVRTC ") and "--ftz=false" in fields["options"]
    assert main(["cache", "explain", "rope", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fields"]["HS"] == "32"


def test_explain_the_difference_of_two_keys(folder, capsys):
    assert main(["cache", "warm", "--preset", "llama3_2_1b", "--precision", "fp32", "--arch", "sm_90a"]) == 0
    capsys.readouterr()
    assert main(["cache", "explain", "rmsnorm-BLOCK=128-C=64", "rmsnorm-BLOCK=128-C=2048"]) == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [["C", "64", "->", "2048"], ["EPS", "1e-06", "->", "1e-05"]]
    assert main(["cache", "explain", "adamw", "adamw"]) == 0
    assert capsys.readouterr().out == "the same key\n"
    assert main(["cache", "explain", "adamw", "swiglu-F=256", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differ"]["F"] == ["", "256"]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["explain", "nonesuch"], 3, "none among 9"), (["explain", "sm_90a-"], 2, "9: "), (["explain"], 2, "one or two"),
    (["explain", "a", "b", "c"], 2, "one or two"), (["list", "x"], 2, "1 after 'list'"), (["sweep"], 2, "invalid"),
    (["clear", "--preset", "tiny"], 2, "with 'warm' alone"), (["warm"], 2, "--preset NAME"),
    (["warm", "--preset", "tinny"], 2, "did you mean 'tiny'"),
    (["warm", "--preset", "tiny", "--arch", "sm_1"], 9, "a compiler that knows sm_1,")], ids=lambda a: "-".join(a)
    if isinstance(a, list) else None)
def test_mistakes(folder, capsys, arguments, code, words):
    assert main(["cache", *arguments]) == code
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


def test_verify_finds_every_kind_of_bad_entry(folder, capsys):
    assert main(["cache", "verify"]) == 0
    assert capsys.readouterr().out == f"9 entries, all sound, in {folder}\n"
    damaged, _ = entry_of(folder, "adamw")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    open_to_all, _ = entry_of(folder, "swiglu")
    open_to_all.chmod(0o666)
    norm, entry = entry_of(folder, "rmsnorm")  # an eps of 1e-5 under the key of 1e-6, with a right checksum
    wrong = entry.image.replace(bytes.fromhex("bd378635"), bytes.fromhex("acc52737"))
    norm.write_bytes(Entry(entry.key, entry.meta, wrong).encode())
    rope, other = entry_of(folder, "rope")[0], entry_of(folder, "embedding")
    rope.write_bytes(other[0].read_bytes())
    renamed, entry = entry_of(folder, "cross_entropy")
    renamed.write_bytes(Entry(entry.key, entry.meta | {"label": "x"}, entry.image).encode())
    assert main(["cache", "verify"]) == 6
    out, err = capsys.readouterr()
    problems = dict(line.split(": ", 1) for line in out.splitlines())
    assert {name.partition("-")[0]: problem for name, problem in problems.items()} == {
        "adamw": "damaged (its SHA-256 differs)", "swiglu": "others may write in it",
        "rmsnorm": "its code has no EPS=9.999999974752427e-07", "rope": f"it holds {other[1].key}",
        "cross_entropy": "it says that it is x"}
    assert "5 of 9 bad" in err and err.count("\n") == 1
    assert main(["cache", "verify", "--json"]) == 6
    assert len([1 for line in capsys.readouterr().out.splitlines() if json.loads(line)["problem"]]) == 5
    assert main(["cache", "list"]) == 0 and "damaged" in capsys.readouterr().out


def test_warm_without_a_gpu_is_for_all_architectures_and_again_compiles_nothing(folder, monkeypatch, capsys):
    (folder / ".1-2.tmp").touch()
    os.utime(folder / ".1-2.tmp", (1, 1))
    (folder / ".3-4.tmp").touch()
    monkeypatch.setattr(command, "probe", lambda: NONE)
    assert main(["cache", "warm", "--preset", "tiny", "--precision", "fp32", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["arch"], r["modules"], r["compiled"], r["found"]) for r in rows] == [
        ("sm_80", 8, 8, 0), ("sm_90", 8, 8, 0), ("sm_90a", 9, 0, 9)]  # with the fast cross-entropy
    assert not (folder / ".1-2.tmp").exists() and (folder / ".3-4.tmp").exists()  # the one may be written just now
    monkeypatch.setattr(command, "probe", lambda: found(H200))
    assert main(["cache", "warm", "--preset", "tiny", "--precision", "fp32"]) == 0
    assert capsys.readouterr().out.startswith("sm_90a: 9 modules, 0 compiled, 9 found")


def test_clear(folder, capsys):
    (folder / ".1-2.tmp").touch()
    (folder / "notes.txt").touch()
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 9 entries and 1 leftovers from {folder}\n"
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert main(["cache", "clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 0


@pytest.mark.parametrize("action", ["list", "verify", "clear", "warm"])
def test_a_folder_that_others_may_write_is_refused(folder, capsys, action):
    folder.chmod(0o777)
    assert main(["cache", action, *(["--preset", "tiny"] if action == "warm" else [])]) == 7
    out, err = capsys.readouterr()
    assert "others may write in it" in err and out == "" and len(list(folder.iterdir())) == 9


def test_names_of_files_are_not_trusted_with_a_terminal(folder, capsys):
    (folder / "\x1b[31m.kernel").touch()
    assert main(["cache", "list"]) == 0
    assert "\\x1b[31m" in capsys.readouterr().out
    assert file_name("a") == "a.kernel"
