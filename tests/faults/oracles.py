"""What a valid .apr, safetensors or GGUF file is, a second time: over the bytes as a whole, by other means than apr's.

Each takes the bytes of a file and gives {name: bytes of the tensor}; ValueError for any breach of the format.
"""

import json
import struct
import zlib
from itertools import pairwise

WIDTH = {"F32": 4, "F16": 2, "F64": 8, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "BF16": 2}
APR_WIDTH = {0: 4, 1: 2, 3: 8, 4: 4, 5: 8, 6: 1, 7: 1, 30: 2}
# ggml's types: code, values of a block, bytes of a block, from ggml's own structures. (The gguf library gives Q8_1 40
# bytes, where ggml has 36: no type is taken that apr cannot read.)
GGML = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
        10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18)}
GGUF_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def require(ok, what):
    """ValueError unless `ok`."""
    if not ok:
        raise ValueError(what)


def count(dims, width=1):
    """The bytes of so many elements, in Python's integers; NumPy makes no array of 2^63, not even an empty one."""
    total = nonzero = width
    for d in dims:
        total *= d
        nonzero *= d or 1
    require(nonzero < 2**63, "too large")
    return total


def covered(spans, start, align, ends):
    """Demand that (start, size) spans follow each other from `start`, each begun at `align`, and end at one of `ends`.

    The end is that of the last without (first of `ends`) or with its padding.
    """
    edges = [start]
    for at, size in sorted(spans):
        require(at == edges[-1], "a gap or an overlap")
        edges.append(at + size + (-size) % align)
    require(all(a <= b for a, b in pairwise(edges)) and edges[-1] in ends, "not the end of the data")


def apr_tensors(data):
    """The tensors of an .apr file."""
    magic, major, minor, flags, n, meta_at, meta_size, index_at, data_at, crc = struct.unpack_from("<4sBBHIQIQQI", data)
    require((magic, major, minor) == (b"APR\0", 2, 0) and len(data) >= 68, "head")
    require(zlib.crc32(data[:40] + data[44:64]) == crc, "checksum of the head")
    require(data[-4:] == struct.pack("<I", zlib.crc32(data[:-4])), "checksum")
    require(flags & 1024 and not flags & ~(1024 + 512 + 128 + 32) and not any(data[44:64]), "flags")
    require(meta_at == 64 and index_at % 64 == 0 and data_at % 64 == 0 and data_at <= len(data) - 4, "places")
    require(0 <= index_at - 64 - meta_size < 64 and not any(data[64 + meta_size:index_at]), "metadata's place")
    require(isinstance(json.loads(data[64:64 + meta_size]), dict), "metadata")
    index, at, found, last = data[index_at:data_at], 0, {}, b""
    for _ in range(n):
        length, = struct.unpack_from("<H", index, at)
        name = index[at + 2:at + 2 + length]
        require(0 < length <= 256 and len(name) == length and name > last and b"\0" not in name, "name")
        code, ndim = struct.unpack_from("<BB", index, at + 2 + length)
        require(code in APR_WIDTH and ndim <= 8, "type")
        *dims, offset, size = struct.unpack_from(f"<{ndim + 2}Q", index, at + 4 + length)
        require(count(dims, APR_WIDTH[code]) == size and offset % 64 == 0, "size")
        found[name.decode()] = data_at + offset, size
        at, last = at + 4 + length + 8 * (ndim + 2), name
    require(len(index) - at < 64 and not any(index[at:]), "index's end")
    covered(found.values(), data_at, 64, {len(data) - 4})
    for start, size in found.values():
        require(not any(data[start + size:start + size + -size % 64]), "padding")
    return {name: data[start:start + size] for name, (start, size) in found.items()}


def safetensors_tensors(data):
    """The tensors of a safetensors file."""
    def once(pairs):
        require(len({k for k, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    length, = struct.unpack_from("<Q", data)
    require(8 + length <= len(data), "header's length")
    header = json.loads(data[8:8 + length].decode(), object_pairs_hook=once)
    require(data[8:9] == b"{" and all(isinstance(v, str) for v in header.pop("__metadata__", {}).values()), "header")
    found = {}
    for name, value in header.items():
        require(set(value) == {"dtype", "shape", "data_offsets"}, "fields")
        (start, end), shape = value["data_offsets"], value["shape"]
        require(isinstance(shape, list) and all(type(d) is int and d >= 0 for d in (start, end, *shape)), "numbers")
        require(count(shape, WIDTH[value["dtype"]]) == end - start, "size")
        found[name] = 8 + length + start, end - start
    covered(found.values(), 8 + length, 1, {len(data)})
    return {name: data[start:start + size] for name, (start, size) in found.items()}


def gguf_tensors(data):
    """The tensors of a GGUF file."""
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)  # struct.error past the end
        at += struct.calcsize("<" + form)
        return values

    def text():
        nonlocal at
        length, = take("Q")
        require(length <= len(data) - at, "a text past the end")
        at += length
        return data[at - length:at].decode()

    def numbers(kind, n):
        nonlocal at
        size = GGUF_WIDTH[kind] * n
        require(size <= len(data) - at, "numbers past the end")
        raw, at = data[at:at + size], at + size
        if kind in (6, 12):
            bits = [(v >> (23 if kind == 6 else 52)) & (255 if kind == 6 else 2047)
                    for v in struct.unpack(f"<{n}{'I' if kind == 6 else 'Q'}", raw)]
            require((255 if kind == 6 else 2047) not in bits, "a number that is not finite")
        require(kind != 7 or not raw.strip(b"\0\1"), "neither true nor false")
        return raw

    magic, version, n_tensors, n_keys = take("4sIQQ")
    require(magic == b"GGUF" and version in (2, 3), "head")
    align, keys, entries = 32, set(), {}
    for _ in range(n_keys):
        key = text()
        kind, = take("I")
        require(key and key not in keys and "\0" not in key and len(key.encode()) < 2**16, "key")
        keys.add(key)
        if kind == 8:
            text()
        elif kind == 9:
            inner, n = take("IQ")
            require(inner in GGUF_WIDTH or inner == 8, "array")
            for _ in range(n if inner == 8 else 0):
                text()
            if inner != 8:
                numbers(inner, n)
        else:
            raw = numbers(kind, 1)
            if key == "general.alignment":
                align = int.from_bytes(raw, "little")
                require(kind == 4 and 8 <= align <= 65536 and align.bit_count() == 1, "alignment")
    for _ in range(n_tensors):
        name = text()
        ndim, = take("I")
        require(name and name not in entries and "\0" not in name and len(name.encode()) < 64, "name")
        require(1 <= ndim <= 4, "sizes")
        *dims, kind, offset = take(f"{ndim}QIQ")
        block, size = GGML[kind]
        require(min(dims) > 0 and dims[0] % block == 0 and offset % align == 0, "sizes")
        entries[name] = offset, count(dims) // block * size
    start = at + -at % align
    spans = {name: (start + offset, size) for name, (offset, size) in entries.items()}
    end = max((a + size for a, size in spans.values()), default=at)
    require(len(data) in (end, end + -end % align), "the file's end")
    covered(spans.values(), start, align, {end + -end % align})
    for edge in (at, *(a + size for a, size in spans.values())):
        require(not any(data[edge:edge + -edge % align]), "padding")
    return {name: data[a:a + size] for name, (a, size) in spans.items()}
