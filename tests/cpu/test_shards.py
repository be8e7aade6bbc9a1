"""Token shards: whole or not at all, read back as written, and what must be refused before training starts."""

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apr import files
from apr.data.shards import DTYPES, TokenSource, is_shards, memory_source, open_shards, read_manifest, write_shards
from apr.errors import ConfigError, FormatError, GateError, IntegrityError, NotFoundError, StorageError

EOS, V = 0, 1000
DOCUMENTS = [[5, 6, 7], [8], [], [9] * 10, list(range(11, 30)), [31, 32]]
FLAT = [t for d in DOCUMENTS for t in (*d, EOS)]
STARTS = np.cumsum([0] + [len(d) + 1 for d in DOCUMENTS[:-1]]).tolist()


def stand_in(vocab_size: int = V, sha256: str = "a" * 64):
    """What write_shards needs of a tokenizer."""
    return SimpleNamespace(vocab_size=vocab_size, sha256=sha256, json='{"stand": "in"}', eos_id=EOS,
                           require_eos=lambda: EOS)


def written(folder: Path, documents=DOCUMENTS, tokens_per_shard: int = 7, vocab_size: int = V) -> Path:
    """A folder of shards."""
    write_shards(folder / "out", iter(documents), stand_in(vocab_size), tokens_per_shard)
    return folder / "out"


def corpus(ids, vocab_size: int = V, eos_id: int | None = EOS) -> TokenSource:
    """A corpus in memory of exactly these ids."""
    array = np.asarray(ids, np.int32)
    return TokenSource([SimpleNamespace(tokens=array.size, read=lambda a, b: array[a:b])], ["memory"], vocab_size,
                       eos_id)


@pytest.mark.parametrize("tokens_per_shard", [1, 2, 7, len(FLAT) - 1, len(FLAT), len(FLAT) + 1, 10**7])
def test_what_was_written_is_read_whatever_the_split(tmp_path, tokens_per_shard):
    out = written(tmp_path, tokens_per_shard=tokens_per_shard)
    source = open_shards(out, stand_in(), V)
    assert source.tokens == len(FLAT) and len(source.shards) == -(-len(FLAT) // tokens_per_shard)
    for start in range(len(FLAT)):
        for stop in range(start, len(FLAT) + 1):
            part = source.read(start, stop)
            assert part.dtype == np.int32 and part.tolist() == FLAT[start:stop]
    assert source.starts.tolist() == STARTS
    assert source.histogram.tolist() == np.bincount(FLAT, minlength=V).tolist()


def test_files_and_manifest(tmp_path):
    out = written(tmp_path)
    manifest = read_manifest(out / "manifest.json")
    names = [s["file"] for s in manifest["shards"]]
    assert sorted(os.listdir(out)) == sorted(["manifest.json", "tokenizer.json",
                                              *names]) and os.listdir(tmp_path) == ["out"]
    assert (manifest["token_count"], manifest["documents"], manifest["vocab_size"], manifest["eos_id"]) == (len(FLAT),
                                                                                                            6, V, EOS)
    assert (out / "tokenizer.json").read_text() == stand_in().json and manifest["tokenizer_sha256"] == stand_in().sha256
    for shard in manifest["shards"]:
        data = (out / shard["file"]).read_bytes()
        assert (len(data) // 2, hashlib.sha256(data).hexdigest()) == (shard["tokens"], shard["sha256"])
    assert b"".join((out / n).read_bytes() for n in names) == np.asarray(FLAT, "<u2").tobytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "u16"), (65536, "u16"), (65537, "u32"), (151_936, "u32")])
def test_the_narrowest_type_that_fits_is_used(tmp_path, vocab_size, dtype):
    ids = [1, 2, 255, vocab_size - 1]
    out = written(tmp_path, [ids], vocab_size=vocab_size)
    assert read_manifest(out / "manifest.json")["dtype"] == dtype
    assert (out / "shard-0000.bin").stat().st_size == 5 * DTYPES[dtype].itemsize
    assert open_shards(out, None, vocab_size).read(0, 5).tolist() == [*ids, EOS]


def test_memory_and_files_are_the_same_corpus(tmp_path):
    memory, shards = memory_source(DOCUMENTS, V, EOS), open_shards(written(tmp_path, tokens_per_shard=10**6), None, V)
    assert memory.read(0, memory.tokens).tolist() == shards.read(0, shards.tokens).tolist() == FLAT
    assert memory.starts.tolist() == shards.starts.tolist() and memory.histogram.tolist() == shards.histogram.tolist()
    with pytest.raises(FormatError, match="at least one document"):
        memory_source([], V, EOS)


@pytest.mark.parametrize("documents", [[*DOCUMENTS, None], [None], []])
def test_a_failure_leaves_nothing(tmp_path, documents):
    """A stream that breaks after many documents, or at once; and no documents."""
    with pytest.raises((TypeError, FormatError)):
        written(tmp_path, documents)
    assert os.listdir(tmp_path) == []


def count_syncs(monkeypatch, fail_at: int = 0) -> list[str]:
    """The names of what is made durable, and "rename", in order; one call may be made to fail."""
    calls: list[str] = []
    sync, rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    return calls


def test_all_is_durable_before_it_has_its_name_and_the_manifest_is_last(tmp_path, monkeypatch):
    calls = count_syncs(monkeypatch)
    written(tmp_path)
    names = [*(f"shard-{i:04d}.bin" for i in range(6)), "tokenizer.json", "manifest.json"]
    assert calls[:8] == names and calls[8].startswith(".out.tmp-") and calls[9:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("at", range(1, 10))
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, at):
    calls = count_syncs(monkeypatch, at)
    with pytest.raises(StorageError, match="room to write"):
        written(tmp_path)
    assert os.listdir(tmp_path) == [] and len(calls) == at


def test_an_interrupt_leaves_nothing(tmp_path):
    def stop(documents: int, tokens: int) -> None:
        assert tokens == sum(len(d) + 1 for d in DOCUMENTS[:documents])
        if documents == 4:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "out", iter(DOCUMENTS), stand_in(), 7, stop)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_output_is_refused_and_kept(tmp_path, kind):
    out = tmp_path / "out"
    out.write_text("mine") if kind == "file" else out.mkdir()
    with pytest.raises(ConfigError, match="something there"):
        write_shards(out, iter(DOCUMENTS), stand_in())
    assert os.listdir(tmp_path) == ["out"] and out.is_file() == (kind == "file")


def test_upstreams_headerless_shards(tmp_path):
    """u32, little-endian, no header and no manifest: one file, or a folder of them in the order of their names."""
    for n in (3, 0, 10, 7, 1, 9, 2, 8, 4, 6, 5):  # made in an order that is not the answer
        (tmp_path / f"{'abcdefghijk'[n]}.bin").write_bytes(np.asarray(FLAT[4 * n:4 * n + 4], "<u4").tobytes())
    (tmp_path / "notes.txt").write_text("not a shard")
    assert is_shards(tmp_path) and is_shards(tmp_path / "a.bin") and not is_shards(tmp_path / "notes.txt")
    folder, single = open_shards(tmp_path, stand_in(), V), open_shards(tmp_path / "a.bin", None, V)
    assert folder.read(0, folder.tokens).tolist() == FLAT and single.read(0, single.tokens).tolist() == FLAT[:4]
    assert folder.starts.size == len(DOCUMENTS) and single.starts.tolist() == [0]  # without a tokenizer: one document


def test_what_is_no_shard_is_not_taken_for_one(tmp_path):
    assert not is_shards(tmp_path) and not is_shards(tmp_path / "missing.txt")
    for path in (tmp_path, tmp_path / "missing.bin"):
        with pytest.raises(NotFoundError):
            open_shards(path, None, V)


def test_a_changed_byte_is_an_integrity_error_naming_the_shard(tmp_path):
    out = written(tmp_path)
    data = bytearray((out / "shard-0002.bin").read_bytes())
    data[4] ^= 1
    (out / "shard-0002.bin").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"shard-0002\.bin: expected SHA-256") as caught:
        open_shards(out, None, V)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(("at", "where"), [
    (0, "shard-0000.bin token 0"), (6, "shard-0000.bin token 6"), (7, "shard-0001.bin token 0"),
    (len(FLAT) - 2, "shard-0005.bin token 4")])
def test_an_id_out_of_range_is_named_with_shard_and_token(tmp_path, at, where):
    ids = list(FLAT[:-1])
    ids[at] = 500
    source = written(tmp_path, [ids])
    assert open_shards(source, None, 501).tokens == len(FLAT)
    with pytest.raises(FormatError) as caught:
        open_shards(source, None, 500)
    assert f"{where}: expected an id in [0, 500), found 500; these shards are for another" in str(caught.value)
    with pytest.raises(FormatError, match=r"memory token 2: expected an id in \[0, 1000\), found -1"):
        corpus([1, 2, -1])


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"shards of this tokenizer \(bbbb"):
        open_shards(written(tmp_path), stand_in(sha256="b" * 64), V)


@pytest.mark.parametrize("keep", [0, 1, 13, 12])
def test_a_shard_of_another_length_is_refused(tmp_path, keep):
    out = written(tmp_path)
    data = (out / "shard-0001.bin").read_bytes()
    for damaged, says in ((data[:keep], "expected "), (data + b"\0\0", "expected 7 tokens, found 8")):
        (out / "shard-0001.bin").write_bytes(damaged)
        with pytest.raises(FormatError, match=rf"shard-0001\.bin: {says}"):
            open_shards(out, None, V)
    (out / "shard-0001.bin").unlink()
    with pytest.raises(NotFoundError):
        open_shards(out, None, V)


@pytest.mark.parametrize("change", [
    {"format": "x"}, {"version": 2}, {"version": True}, {"dtype": "u64"}, {"dtype": "<u2"}, {"token_count": "39"},
    {"token_count": 38}, {"documents": None}, {"vocab_size": 0}, {"vocab_size": 2**40}, {"vocab_size": 1e3},
    {"eos_id": -1}, {"eos_id": V}, {"tokenizer_sha256": 3}, {"shards": []}, {"shards": {}}, {"shards": [1]},
    {"file": "../shard-0000.bin"}, {"file": "/etc/passwd"}, {"file": "a\0"}, {"file": ""}, {"file": "shard-0001.bin"},
    {"tokens": -7}, {"tokens": 7.0}, {"sha256": None}], ids=str)
def test_a_manifest_that_is_wrong_is_refused(tmp_path, change):
    path = written(tmp_path) / "manifest.json"
    values = json.loads(path.read_text())
    (values["shards"][0] if next(iter(change)) in ("file", "tokens", "sha256") else values).update(change)
    path.write_text(json.dumps(values))
    with pytest.raises(FormatError) as caught:
        open_shards(path.parent, None, V)
    assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()


@pytest.mark.parametrize(("counts", "good"), [
    ([1, 1], True), ([2, 1, 1], True), ([50, 25, 25], True), ([51, 25, 24], False), ([1], False), ([999, 1], False),
    ([3, 2], False), ([1] * 100, True)])
def test_entropy_gate(counts, good):
    source = corpus(np.repeat(np.arange(len(counts)), counts), eos_id=None)
    share = np.asarray(counts) / sum(counts)
    if good:
        assert source.check_entropy() == pytest.approx(-(share * np.log2(share)).sum())
    else:
        with pytest.raises(GateError, match="GATE-CORPUS-ENTROPY") as caught:
            source.check_entropy()
        assert caught.value.exit_code == 5 and f"{share.max():.2%}" in str(caught.value)


def test_a_corpus_longer_than_one_scan_is_checked_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("apr.data.shards.SCAN", 10)
    out = written(tmp_path, tokens_per_shard=1000)
    assert open_shards(out, None, V).starts.tolist() == STARTS
    with pytest.raises(FormatError, match=f"token {FLAT.index(32)}: "):
        open_shards(out, None, 32)


def test_fingerprint_is_of_the_contents(tmp_path):
    (tmp_path / "x").mkdir()
    same = [open_shards(written(p), None, V).fingerprint for p in (tmp_path, tmp_path / "x")]
    other = memory_source([*DOCUMENTS, [1]], V, EOS).fingerprint
    assert same[0] == same[1] and other not in same and memory_source(DOCUMENTS, V, EOS).fingerprint != other
