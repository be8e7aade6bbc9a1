"""For the fuzzer: small valid files put together field by field, and changed."""

import json
import struct
import zlib

import fuzz_models
import oracles
from gguf_files import STRING

POWERS = [2**n + d for n in (3, 5, 6, 7, 8, 15, 16, 20, 31, 32, 40, 60, 62, 63, 64) for d in (-1, 0, 1)]
NAMES = ["a", "b", "layer.0.w", "é", "x" * 63, "general.alignment", "__metadata__", "model.norm.weight"]
TEXTS = [b"", b"\0", b"\xff", b"\xed\xa0\x80", b"a" * 64, b"a" * 257, b"general.alignment", b"GGUF"]
KINDS = {"apr": list(oracles.APR_WIDTH), "gguf": [0, 1, 30, 2, 8, 12, 14], "safetensors": list(oracles.WIDTH)}


def number(rng, old, size, room):
    """Another integer for a field of `size` bytes, near the old one, near a power of two, or anything."""
    choice = rng.randrange(5)
    new = (rng.choice(POWERS) if choice == 0 else old + rng.choice((-64, -32, -8, -2, -1, 1, 2, 8, 32, 64))
           if choice == 1 else rng.getrandbits(8 * size) if choice == 2 else rng.randrange(room + 2) if choice == 3
           else rng.choice((0, 1, old * 2, old * 256, -old, -1)))
    return (new % 256**size).to_bytes(size, "little")


def named_arrays(rng, form):
    """Names, type codes and sizes of some tensors."""
    names = rng.sample(NAMES, rng.randrange(4))
    out = []
    for name in sorted(names, key=str.encode):
        kind = rng.choice(KINDS[form])
        dims = [rng.randrange(form == "gguf", 5) for _ in range(rng.randrange(form == "gguf", 4))]
        if form == "gguf":
            dims[0] *= oracles.GGML[kind][0]
        out.append((name, kind, dims))
    return out


def apr_fields(rng):
    """The fields of an .apr file: [bytes, is it a number]."""
    tensors = named_arrays(rng, "apr")
    meta = json.dumps(rng.choice([{}, {"k": [1, 2.5, None]}, {"name": "é" * rng.randrange(40)}])).encode()
    index, data = [], b""
    for name, kind, dims in tensors:
        raw = name.encode()
        size = oracles.count(dims) * oracles.APR_WIDTH[kind]
        index += [[struct.pack("<H", len(raw)), 1], [raw, 0], [bytes([kind]), 1], [bytes([len(dims)]), 1]]
        index += [[struct.pack("<Q", n), 1] for n in (*dims, len(data), size)]
        data += rng.randbytes(size).ljust(size + -size % 64, b"\0")
    index_size = sum(len(f[0]) for f in index)
    index_at = 64 + len(meta) + -len(meta) % 64
    data_at = index_at + index_size + -index_size % 64
    head = [[b"APR\0", 0], [b"\2", 1], [b"\0", 1], [struct.pack("<H", 1024), 1], [struct.pack("<I", len(tensors)), 1],
            [struct.pack("<Q", 64), 1], [struct.pack("<I", len(meta)), 1], [struct.pack("<Q", index_at), 1],
            [struct.pack("<Q", data_at), 1], [bytes(4), 0], [bytes(20), 0]]
    return [*head, [meta, 0], [bytes(-len(meta) % 64), 0], *index, [bytes(-index_size % 64), 0], [data, 0],
            [bytes(4), 0]]


def gguf_fields(rng):
    """The fields of a GGUF file."""
    tensors, align = named_arrays(rng, "gguf"), rng.choice((8, 32, 32, 64))
    keys, index, data = [], [], b""

    def text(raw):
        return [[struct.pack("<Q", len(raw)), 1], [raw, 0]]

    chosen = rng.sample(NAMES[:5], rng.randrange(4)) + ["general.alignment"] * (align != 32)
    for name in chosen:
        kind = 4 if name == "general.alignment" else rng.randrange(13)
        keys += [*text(name.encode()), [struct.pack("<I", kind), 1]]
        inner, n = (rng.choice([k for k in range(13) if k != 9]), rng.randrange(4)) if kind == 9 else (kind, 1)
        if kind == 9:
            keys += [[struct.pack("<I", inner), 1], [struct.pack("<Q", n), 1]]
        for _ in range(n):
            keys += (text(rng.choice(NAMES).encode()) if inner == STRING else
                     [[struct.pack("<I", align), 1]] if name == "general.alignment" else
                     [[rng.choice((b"\0", b"\1")) + bytes(oracles.GGUF_WIDTH[inner] - 1), 1]])
    for name, kind, dims in tensors:
        block, width = oracles.GGML[kind]
        size = oracles.count(dims) // block * width
        index += [*text(name.encode()), [struct.pack("<I", len(dims)), 1]]
        index += [[struct.pack("<Q", d), 1] for d in dims]
        index += [[struct.pack("<I", kind), 1], [struct.pack("<Q", len(data)), 1]]
        data += rng.randbytes(size).ljust(size + -size % align, b"\0")
    head = [[b"GGUF", 0], [struct.pack("<I", rng.choice((2, 3))), 1], [struct.pack("<Q", len(tensors)), 1],
            [struct.pack("<Q", len(chosen)), 1], *keys, *index]
    return [*head, [bytes(-sum(len(f[0]) for f in head) % align), 0], [data, 0]]


def safetensors_fields(rng):
    """The fields of a safetensors file; its header was changed as JSON before it became bytes."""
    header, data = {}, b""
    for name, kind, dims in named_arrays(rng, "safetensors"):
        size = oracles.count(dims) * oracles.WIDTH[kind]
        header[name] = {"dtype": kind, "shape": dims, "data_offsets": [len(data), len(data) + size]}
        data += rng.randbytes(size)
    header.pop("__metadata__", None)
    if header and rng.random() < 0.7:
        change_json(rng, rng.choice(list(header.values())), len(data))
    if rng.random() < 0.3:
        header["__metadata__"] = rng.choice([{}, {"format": "pt"}, {"k": 5}, [], None, {"k": None}])
    text = json.dumps(header).encode() + b" " * rng.randrange(9)
    pieces = [[text[:len(text) // 2], 0], [text[len(text) // 2:], 0]]
    return [[struct.pack("<Q", len(text)), 1], *pieces, [data, 0]]


def change_json(rng, entry, room):
    """Change a tensor's entry: a number of it, its type, a field's kind, or its fields."""
    name = rng.choice(list(entry))
    odd = [None, True, -1, 0.0, 1.5, "0", [], {}, [0], [0, 0, 0], [True, 4], [0.0, 4.0], "F32", "F8_E4M3", 10**30]
    if rng.random() < 0.5 and isinstance(entry[name], list) and entry[name]:
        at = rng.randrange(len(entry[name]))
        entry[name][at] = int.from_bytes(number(rng, entry[name][at], 8, room), "little")
    elif rng.random() < 0.3:
        entry.pop(name) if rng.random() < 0.5 else entry.update(extra=1)
    else:
        entry[name] = rng.choice([*odd, *oracles.WIDTH])


def mutated(rng, form):
    """The bytes of a file, some of whose fields are not what they were."""
    if form == "gguf-model":
        return fuzz_models.model_bytes(rng)
    fields = {"apr": apr_fields, "gguf": gguf_fields, "safetensors": safetensors_fields}[form](rng)
    room = sum(len(f[0]) for f in fields)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3) if form != "safetensors" else (0, 0, 1, 2))):
        at = rng.randrange(len(fields))
        raw, is_number = fields[at]
        choice = rng.randrange(10)
        if is_number and choice < 7:
            fields[at][0] = number(rng, int.from_bytes(raw, "little"), len(raw), room)
        elif choice < 4:
            fields[at][0] = rng.choice(TEXTS)
        elif choice < 6:  # and the length before it fits
            fields[at][0] = rng.choice(TEXTS)
            if at and fields[at - 1][1]:
                fields[at - 1][0] = (len(fields[at][0]) % 256**len(fields[at - 1][0])).to_bytes(
                    len(fields[at - 1][0]), "little")
        elif choice == 7:
            other = rng.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        elif choice == 8:
            fields[at:at] = [list(f) for f in fields[rng.randrange(len(fields)):][:rng.randrange(1, 9)]]
        else:
            del fields[at:at + rng.randrange(1, 4)]
        if not fields:
            break
    data = b"".join(f[0] for f in fields)
    if rng.random() < 0.3 and data:
        at, kind = rng.randrange(len(data)), rng.randrange(4)
        data = (data[:at] if kind == 0 else data + rng.randbytes(rng.randrange(1, 70)) if kind == 1
                else data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:] if kind == 2
                else data[:at] + data[rng.randrange(len(data)):])
    if form == "apr" and len(data) >= 68 and rng.random() < 0.95:  # past the checksums
        data = data[:40] + struct.pack("<I", zlib.crc32(data[:40] + data[44:64])) + data[44:]
        data = data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))
    return data
