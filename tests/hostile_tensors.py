"""Malformed .apr and safetensors files, byte by byte."""

import json
import os
import pickle
import socket
import struct
import zipfile
import zlib

import numpy as np
from hostile import FORMAT, INTEGRITY, Case, put

WRAPS = (4194305, 4194305, 211106198978564)  # times 4 bytes: 16 modulo 2^64, which is how such a file got past others
A = np.arange(6, dtype="<f4").tobytes().ljust(64, b"\0")
B = b"hello".ljust(64, b"\0")


def up(position):
    return -(-position // 64) * 64


def entry(name, code, dims, offset, nbytes, ndim=None):
    """An entry of an .apr index."""
    ndim = len(dims) if ndim is None else ndim
    return struct.pack(f"<H{len(name)}sBB{len(dims)}QQQ", len(name), name, code, ndim, *dims, offset, nbytes)


ENTRIES = [entry(b"a", 0, (2, 3), 0, 24), entry(b"b", 7, (5,), 64, 5)]


def apr_bytes(entries=ENTRIES, data=A + B, meta=b'{"name": "x"}', good_crc=True, **change):
    """An .apr file made from the table in the format's description, with any field of its header changed."""
    index = b"".join(entries)
    index_at = up(64 + len(meta))
    f = {"magic": b"APR\0", "version": (2, 0), "flags": 1024, "count": len(entries), "meta_at": 64,
         "meta_size": len(meta),
         "index_at": index_at, "data_at": up(index_at + len(index)), "reserved": bytes(20), **change}
    head = struct.pack("<4sBBHIQIQQ", f["magic"], *f["version"], f["flags"], f["count"], f["meta_at"], f["meta_size"],
                       f["index_at"], f["data_at"])
    crc = zlib.crc32(head + f["reserved"]) ^ (not good_crc)
    body = (head + struct.pack("<I", crc) + f["reserved"] + meta).ljust(index_at, b"\0") + index
    body = body.ljust(up(len(body)), b"\0") + data
    return body + struct.pack("<I", zlib.crc32(body))


def st_bytes(header, data=bytes(29), length=None):
    """A safetensors file of this header (text or plain data) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ST = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
      "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}}


def st_with(data=bytes(29), **fields):
    """A safetensors file whose tensor 'a' has other fields."""
    return st_bytes({**ST, "a": {**ST["a"], **fields}}, data)


def special_files(name):
    """What is no such file at all, by description: a function of the folder that makes it. Row B13."""
    def archive(path):
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("data.pkl", b"x" * 99)

    def socket_at(path):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(os.path.relpath(path))

    makers = {
        "pickle": lambda p: p.write_bytes(pickle.dumps({"weight": [1.0]})),
        "zip": archive,
        "LFS pointer": lambda p: p.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\n"),
        "HTML": lambda p: p.write_text("<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"),
        "empty": lambda p: p.touch(),
        "FIFO": os.mkfifo,
        "/dev/zero": lambda p: p.symlink_to("/dev/zero"),
        "folder": lambda p: p.mkdir(),
        "socket": socket_at,
    }

    def made(maker):
        def write(folder):
            maker(folder / name)
            return folder / name
        return write

    return {what: made(maker) for what, maker in makers.items()}


def replaced(make, name, write):
    """A `write` of a folder as `make` makes it, with what `write` makes in place of one of its files."""
    def write_all(folder):
        path = make(folder)
        (path / name).unlink()
        write(path)
        return path
    return write_all


def appended(name, data):
    """Complete files with something after their end: row B14."""
    return {f"{len(tail)} more bytes": put(name, data + tail) for tail in (b"\0", bytes(64), b"PK\3\4" + bytes(60))}


BAD_JSON = {
    "NaN": b"NaN", "Infinity": b"Infinity", "-Infinity": b"-Infinity", "1e999": b"1e999", "5000 digits": b"9" * 5000,
    "200k levels": b"[" * 200_000, "100 levels": b"[" * 100 + b"]" * 100,
            "too many lists": b"[" + b"[]," * 300_000 + b"[]]",
    "lone surrogate": b'"\\ud800"', "not UTF-8": b'"\xff"', "key twice": b'{"k": 1, "k": 2}', "no JSON": b"'x'",
    "cut": b'{"k": ',
}


def apr_cases():
    def case(row, what, data, code=FORMAT, says="", cli=False):
        return Case(row, "apr", what, put("x.apr", data), code, says, cli)

    good = apr_bytes()
    for n in range(len(good)):
        yield case("B1", f"cut to {n} bytes", good[:n], cli=n in (0, 300))
    for field, size in (("meta_size", 4), ("meta_at", 8), ("index_at", 8), ("data_at", 8)):
        for n in (0, 7, len(good) + 1, 100_000_001, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1):
            if n < 256**size:
                yield case("B2", f"{field} {n}", apr_bytes(**{field: n}), cli=(field, n) == ("meta_at", 2**64 - 1))
    yield case("B2", "checksum of the header", apr_bytes(good_crc=False), INTEGRITY, "CRC32", cli=True)
    for n in (0, 1, 3, 2**16, 2**31, 2**32 - 1):
        yield case("B3", f"{n} tensors", apr_bytes(count=n))
    yield case("B3", "a name of 65535 bytes in a short index", apr_bytes([b"\xff\xff" + ENTRIES[0][2:], ENTRIES[1]]))
    yield Case("B3", "apr", "128 MB of index for two tensors", sparse_index, FORMAT, cli=True)
    for what, second in (("overlap", (0, 5)), ("hole", (128, 5)), ("past the end", (64, 69)),
                         ("offset 2^64-64", (2**64 - 64, 5)), ("bytes 2^64-1", (64, 2**64 - 1)),
                         ("unaligned", (72, 5)), ("empty beyond the end", (192, 0))):
        dims = (second[1],) if second[1] < 2**63 else (5,)
        yield case("B4", what, apr_bytes([ENTRIES[0], entry(b"b", 7, dims, *second)]), cli=what == "overlap")
    yield case("B4", "hole, with the data to fill it", apr_bytes([ENTRIES[0], entry(b"b", 7, (5,), 128, 5)],
                                                                data=A + bytes(64) + B))
    yield case("B4", "data without tensors", apr_bytes([]))
    for what, dims, nbytes in (("wraps to 16 bytes", WRAPS, 16), ("wraps to 0", (2**32, 2**30), 0),
                               ("2^63", (2**63,), 0), ("empty, yet too large", (0, 2**62), 0),
                               ("2^64-1", (2**64 - 1,), 24),
                               ("too few dims", (6, 1), 28)):
        yield case("B5", what, apr_bytes([entry(b"a", 0, dims, 0, nbytes), ENTRIES[1]]), cli=dims == WRAPS)
    for ndim in (0, 1, 9, 255):
        yield case("B5", f"{ndim} sizes", apr_bytes([entry(b"a", 0, (2, 3), 0, 24, ndim), ENTRIES[1]]))
    for n in (-3, -2, -1, 1, 2, 3):
        yield case("B6", f"{24 + n} bytes for F32 [2, 3]", apr_bytes([entry(b"a", 0, (2, 3), 0, 24 + n), ENTRIES[1]]))
    for code, says in ((2, "dtype 2"), (31, "dtype 31"), (255, "dtype 255"), (8, "AprQ4"), (9, "AprQ8"), (12, "Q4_K"),
                       (14, "Q6_K"), (128, "AprQ4"), (129, "AprQ8")):
        yield case("B6", f"dtype {code}", apr_bytes([entry(b"a", code, (2, 3), 0, 24), ENTRIES[1]]), says=says,
                   cli=code == 8)
    yield case("B6", "another version", apr_bytes(version=(2, 1)), says="2.1")
    yield case("B6", "version 1", apr_bytes(magic=b"APRN"), says="version 1")
    yield case("B13", "another magic", apr_bytes(magic=b"GGUF"), says="APR")
    yield case("B6", "reserved bytes", apr_bytes(reserved=b"\1" + bytes(19)))
    for bit in (1, 2, 4, 8, 16, 64, 256, 2048, 32768):
        yield case("B6", f"flag {bit}", apr_bytes(flags=1024 | bit))
    yield case("B6", "not row-major", apr_bytes(flags=0))
    for what, names in (("twice", (b"a", b"a")), ("not sorted", (b"b", b"a")), ("empty", (b"", b"a")),
                        ("zero byte", (b"a\0", b"b")), ("not UTF-8", (b"a\xfe", b"a\xff")),
                        ("surrogate", (b"\xed\xa0\x80", b"\xee\x80\x80")),
                        ("257 bytes", (b"a" * 257, b"b"))):
        yield case("B7", f"name {what}", apr_bytes([entry(names[0], 0, (2, 3), 0, 24),
                                                    entry(names[1], 7, (5,), 64, 5)]), cli=what == "twice")
    for what, text in BAD_JSON.items():
        yield case("B8", f"metadata: {what}", apr_bytes(meta=b'{"x": ' + text + b"}"), cli=what == "200k levels")
    yield case("B8", "5 million lists", lambda: apr_bytes(meta=b'{"x": [' + b"[]," * 5_000_000 + b"[]]}"), cli=True)
    yield case("B8", "17 MB of spaces", lambda: apr_bytes(meta=b"{" + b" " * (17 * 2**20) + b"}"), cli=True)
    yield case("B8", "metadata: a list", apr_bytes(meta=b"[]"))
    for what, write in special_files("x.apr").items():
        yield Case("B13", "apr", what, write, FORMAT, cli=what == "FIFO")
    for what, write in appended("x.apr", good).items():
        yield Case("B14", "apr", what, write, FORMAT, cli=what == "1 more bytes")
    for what, data in (("after the metadata", good[:100] + b"\1" + good[101:]),
                       ("after the index", good[:230] + b"\1" + good[231:]),
                       ("after a tensor", good[:-40] + b"\1" + good[-39:])):
        yield case("B14", f"bytes in the padding {what}", data[:-4] + struct.pack("<I", zlib.crc32(data[:-4])))
    for name, says in (("a\nb\x1b[2J.apr", "\\x0a"), ("é\u202e.apr", "")):
        yield Case("B7", "apr", f"file name {name!r}", put(name, b"x"), FORMAT, says)


def sparse_index(folder):
    """An index of 128 MB that holds two entries and zeros: it must not be read to see that."""
    data = apr_bytes(data_at=2**27)
    path = put("x.apr", data[:-4 - len(A + B)])(folder)
    with open(path, "r+b") as f:
        f.truncate(2**27 + 132)
    return path


def safetensors_cases():
    def case(row, what, data, says="", cli=False):
        return Case(row, "safetensors", what, put("x.safetensors", data), FORMAT, says, cli)

    good = st_bytes(ST)
    for n in range(len(good)):
        yield case("B1", f"cut to {n} bytes", good[:n], cli=n == 50)
    for n in (0, 7, len(good) - 7, len(good) + 1, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
        yield case("B2", f"header of {n} bytes", st_bytes(ST, length=n), cli=n == 2**63 - 1)
    for what, start, end in (("overlap", 0, 20), ("hole", 4, 28), ("reversed", 24, 0), ("past the end", 24, 48),
                             ("negative", -24, 0), ("2^64", 2**64, 2**64 + 24),
                             ("4000 digits", 10**4000, 10**4000 + 24)):
        yield case("B4", what, st_with(data_offsets=[start, end]), cli=what == "reversed")
    yield case("B4", "hole, with the data to fill it", st_bytes({**ST, "b": {**ST["b"], "data_offsets": [28, 33]}},
                                                                bytes(33)))
    for value in ([True, 24], [0.0, 24.0], ["0", "24"], [0], [0, 24, 24], None, {}, 24, "ab", [[0], [24]]):
        yield case("B4", f"offsets {value!r}", st_with(data_offsets=value))
    for what, shape in (("wraps", list(WRAPS)), ("zeros", [0, 2**62]), ("2^63", [2**63]), ("nine", [1] * 7 + [2, 3]),
                        ("text", "6"), ("bool", [True, 6]), ("float", [6.0]), ("negative", [-2, -3]),
                        ("huge", [10**4000, 10**4000]),
                        ("null", None)):
        yield case("B5", what, st_with(shape=shape), cli=what == "wraps")
    yield case("B5", "empty, yet too large", st_bytes({"a": {"dtype": "F32", "shape": [0, 2**62],
                                                             "data_offsets": [0, 0]}}, b""))
    for n in (1, 2, 3):
        yield case("B6", f"{n} bytes over", st_bytes({"a": {"dtype": "F32", "shape": [6],
                                                            "data_offsets": [0, 24 + n]}}, bytes(24 + n)))
    for dtype in ("F8_E4M3", "f32", "Q4_K", "", 0, None, [], {}, True):
        yield case("B6", f"dtype {dtype!r}", st_with(dtype=dtype))
    yield case("B6", "no shape", st_bytes({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, bytes(24)))
    yield case("B6", "a field more", st_with(extra=1))
    yield case("B6", "tensor is a list", st_bytes({**ST, "a": []}))
    for what, name in (("empty", ""), ("zero byte", "a\0"), ("10 MB", "n" * 10_000_000)):
        yield case("B7", f"name {what}", lambda name=name: st_bytes({name: ST["a"]}, bytes(24)), cli=what == "10 MB")
    both = json.dumps(ST)[:-1] + ", " + json.dumps(ST)[1:]
    yield case("B7", "each name twice", st_bytes(both.encode()), cli=True)
    yield case("B7", "a field twice", st_bytes(json.dumps(ST).replace('"dtype"', '"dtype": "F32", "dtype"').encode()))
    for value in ([], 5, {"k": 1}, {"k": None}, None, "text"):
        yield case("B7", f"__metadata__ {value!r}", st_bytes({"__metadata__": value, **ST}))
    for what, text in BAD_JSON.items():
        yield case("B8", f"header: {what}", st_bytes(b'{"a": ' + text + b"}"), cli=what == "key twice")
    yield case("B8", "17 MB of spaces", lambda: st_bytes(b"{" + b" " * (17 * 2**20) + b"}", b""))
    for text in (b"[]", b"5", b"null", b" {}"):
        yield case("B8", f"header {text!r}", st_bytes(text, b""))
    for what, write in special_files("x.safetensors").items():
        yield Case("B13", "safetensors", what, write, FORMAT, cli=what == "pickle")
    for what, write in appended("x.safetensors", good).items():
        yield Case("B14", "safetensors", what, write, FORMAT, cli=what == "64 more bytes")


def cases():
    return [*apr_cases(), *safetensors_cases()]
