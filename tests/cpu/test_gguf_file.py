"""GGUF: files read by us as by the `gguf` library, blocks turned into the values that ggml's formulas give."""

import os

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize
from gguf_files import DATA, F32, KEYS, STRING, TENSORS, U32, array, gguf_bytes, key, scalar, string, tensor, text

from apr.errors import FormatError, NotFoundError
from apr.formats.gguf_file import BLOCKS, ROWS_AT_ONCE, dequantised, open_gguf


def opened(tmp_path, data):
    """The file of these bytes, open."""
    (tmp_path / "x.gguf").write_bytes(data)
    return open_gguf(tmp_path / "x.gguf")


def test_gguf_reads_what_the_format_says(tmp_path):
    with opened(tmp_path, gguf_bytes()) as f:
        assert {k: v for k, v in f.metadata.items() if k != "a.numbers"} == {
            "general.architecture": "llama", "a.flag": True, "a.list": ["x", "yz"], "a.float": 0.5}
        assert (f.metadata["a.numbers"].dtype, f.metadata["a.numbers"].tolist()) == (np.int32, [0, 0, 0])
        assert f.read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
        entry = f.entries["q"]
        assert (entry.type, entry.shape, entry.nbytes, list(f.entries)) == ("Q8_0", (2, 32), 68, ["w", "q"])
        assert (f.version, f.alignment) == (3, 32)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("align", [8, 32, 64, 4096])
def test_gguf_versions_and_alignments(version, align, tmp_path):
    data = DATA[:24].ljust(-(-24 // align) * align, b"\0") + DATA[32:100].ljust(-(-68 // align) * align, b"\0")
    second = tensor("q", (32, 2), 8, -(-24 // align) * align)
    with opened(tmp_path, gguf_bytes((*KEYS, key("general.alignment", scalar(U32, align))), (TENSORS[0], second),
                                     data, version=version, align=align)) as f:
        assert f.read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert (f.version, f.alignment) == (version, align)


def test_gguf_without_its_last_padding(tmp_path):
    whole = gguf_bytes()
    with opened(tmp_path, whole[:-28]) as f:
        assert f.read("q").shape == (2, 32)
    with pytest.raises(FormatError, match="end with their section"):
        opened(tmp_path, whole[:-27])


def test_gguf_without_tensors(tmp_path):
    for data in (gguf_bytes(tensors=(), data=b""), gguf_bytes(tensors=(), data=b"").rstrip(b"\0")):
        with opened(tmp_path, data) as f:
            assert not f.entries


def test_gguf_is_read_as_the_library_reads_it(tmp_path, rng):
    """A file of the library's writer, every type of value and of tensor in it."""
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_array("n.ints", [1, -2, 3])
    writer.add_array("n.texts", ["a", "", "é"])
    writer.add_float64("n.double", 0.1)
    writer.add_int64("n.long", -5)
    writer.add_bool("n.yes", True)
    given = {"f32": rng.standard_normal((3, 5)).astype(np.float32), "f16": rng.standard_normal((2, 3, 4)).astype("f2")}
    for name, a in given.items():
        writer.add_tensor(name, a)
    given["bf16"] = rng.standard_normal((5, 6)).astype(ml_dtypes.bfloat16)
    writer.add_tensor("bf16", given["bf16"].view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "x.gguf") as f:
        for name, a in given.items():
            found = f.read(name)
            assert (found.dtype, found.shape, found.tobytes()) == (a.dtype, a.shape, a.tobytes())
        assert f.metadata["n.ints"].tolist() == [1, -2, 3]
        assert [f.metadata[f"n.{k}"] for k in ("texts", "double", "long", "yes")] == [["a", "", "é"], 0.1, -5, True]


def blocks(kind, rng, rows=3, per_row=2):
    """Random blocks of a type: (rows, bytes), and how many values a row has. Half scales are any bits at all."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return rng.integers(0, 256, (rows, per_row * nbytes), dtype=np.uint8), per_row * block


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_blocks_equal_the_library(kind, tmp_path, rng):
    """Bit for bit, scales that are subnormal, huge, infinite or NaN included, whole and in pieces."""
    raw, width = blocks(kind, rng, rows=200)
    code = gguf.GGMLQuantizationType[kind]
    data = raw.tobytes()
    with opened(tmp_path, gguf_bytes((), (tensor("w", (width, 200), int(code), 0),),
                                     data.ljust(-(-len(data) // 32) * 32, b"\0"))) as f:
        found = f.read("w")
    with np.errstate(all="ignore"):
        expected = dequantize(raw, code)
    assert (found.dtype, found.shape) == (np.float32, (200, width))
    assert found.tobytes() == expected.tobytes()
    rows = ROWS_AT_ONCE // 2**15 + 3  # more than are done at once, of short rows
    many = np.tile(raw, (rows * 2**15 // (200 * width) + 1, 1))
    assert dequantised(many.reshape(-1), kind, (len(many), width))[-200:].tobytes() == expected.tobytes()


def halves(raw, at):
    """float16 at a byte of each block, as float32 (n, 1)."""
    return raw[:, at:at + 2].copy().view(np.float16).astype(np.float32)


def q8_0(raw):
    return halves(raw, 0) * raw[:, 2:].view(np.int8).astype(np.float32)


def q4_0(raw):
    low, high = raw[:, 2:] & 15, raw[:, 2:] >> 4
    return halves(raw, 0) * (np.concatenate([low, high], 1).astype(np.float32) - 8)


def q4_k(raw):
    """Eight runs of 32; each has a 6-bit scale and minimum, packed in 12 bytes."""
    packed, nibbles = raw[:, 4:16].astype(np.int64), raw[:, 16:]
    out = []
    for run in range(8):
        if run < 4:
            scale, least = packed[:, run] & 63, packed[:, run + 4] & 63
        else:
            scale = (packed[:, run + 4] & 15) | (packed[:, run - 4] >> 6) << 4
            least = (packed[:, run + 4] >> 4) | (packed[:, run] >> 6) << 4
        part = nibbles[:, run // 2 * 32:run // 2 * 32 + 32]
        q = (part >> 4 if run % 2 else part & 15).astype(np.float32)
        out.append(halves(raw, 0) * scale[:, None].astype(np.float32) * q
                   - halves(raw, 2) * least[:, None].astype(np.float32))
    return np.concatenate(out, 1)


def q6_k(raw):
    """Sixteen runs of 16; six bits of each value lie in two places."""
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    out = np.empty((len(raw), 256), np.float32)
    for i in range(256):
        half, within = divmod(i, 128)
        quarter, lane = divmod(within, 32)
        low = raw[:, half * 64 + lane + 32 * (quarter % 2)] >> (4 if quarter > 1 else 0) & 15
        high = raw[:, 128 + half * 32 + lane] >> 2 * quarter & 3
        out[:, i] = halves(raw, 208)[:, 0] * scales[:, i // 16] * ((low | high << 4).astype(np.float32) - 32)
    return out


@pytest.mark.parametrize("formula", [q8_0, q4_0, q4_k, q6_k], ids=lambda f: f.__name__)
def test_gguf_blocks_by_their_formula(formula, rng):
    """What a block means, written down a second time; finite scales."""
    kind = formula.__name__.upper()
    raw, width = blocks(kind, rng, rows=50, per_row=1)
    for at in {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}[kind]:
        raw[:, at:at + 2] = rng.standard_normal((50, 1)).astype(np.float16).view(np.uint8)
    assert (dequantised(raw.reshape(-1), kind, (50, width)) == formula(raw)).all()


def test_gguf_file_cut_while_open(tmp_path):
    f = opened(tmp_path, gguf_bytes())
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with f, pytest.raises(FormatError, match=r"tensor 'w'.*was cut"):
        f.read("w")


def test_gguf_file_changed_while_open(tmp_path):
    f = opened(tmp_path, gguf_bytes())
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    data[-1] ^= 1
    with open(tmp_path / "x.gguf", "r+b") as other:
        other.write(data)
    os.utime(tmp_path / "x.gguf", ns=(1, 1))
    with f, pytest.raises(FormatError, match=r"tensor 'w'.*changed while it was read"):
        f.read("w")


def test_gguf_messages_name_key_and_tensor(tmp_path):
    for data, says in ((gguf_bytes((*KEYS, key("a.nan", scalar(F32, float("nan"))))), r"x\.gguf: key 'a\.nan'"),
                       (gguf_bytes((*KEYS, KEYS[1])), r"key 'a\.flag'"),
                       (gguf_bytes(tensors=(TENSORS[0], tensor("t", (256,), 16, 32))), r"'t'.*IQ2_XXS"),
                       (gguf_bytes(version=0x03000000), "big endian"),
                       (gguf_bytes((*KEYS, key("k", array(STRING, 2, text("a"))))), "more bytes|texts|bytes of")):
        with pytest.raises(FormatError, match=says):
            opened(tmp_path, data)
    with pytest.raises(NotFoundError):
        open_gguf(tmp_path / "none.gguf")


def test_gguf_text_is_kept(tmp_path):
    with opened(tmp_path, gguf_bytes((*KEYS, key("k", string("日本\n\0x"))))) as f:
        assert f.metadata["k"] == "日本\n\0x"
