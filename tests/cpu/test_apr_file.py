"""The .apr container: every dtype there and back, the same bytes each time, the layout as its table describes it."""

import struct
import zlib

import numpy as np
import pytest

from apr.dtypes import DTYPES
from apr.errors import FormatError, IntegrityError
from apr.formats.apr_file import open_apr, write_apr

SHAPES = [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 1, 3, 1, 2, 1, 1, 4)]


def read(path):
    """Metadata and tensors of a file."""
    with open_apr(path) as opened:
        return opened.metadata, opened.read_all()


def random_array(rng, shape, dtype):
    """An array of random bits, NaNs and denormals among them."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


def same_bits(ours, expected):
    """Whether two dictionaries hold the same arrays, bit for bit."""
    return ours.keys() == expected.keys() and all(
        (ours[k].dtype, ours[k].shape, ours[k].tobytes()) == (expected[k].dtype, expected[k].shape,
                                                              expected[k].tobytes()) for k in ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_apr_round_trip(dtype, tmp_path, rng):
    arrays = {f"t{len(shape)}-{i}": random_array(rng, shape, dtype.numpy) for i, shape in enumerate(SHAPES)}
    metadata = {"name": "é 🙂", "list": [1, 2.5, None, True], "nested": {"b": "", "a": -1}}
    write_apr(tmp_path / "x.apr", arrays, metadata)
    found, tensors = read(tmp_path / "x.apr")
    assert found == metadata
    assert same_bits(tensors, arrays)
    assert all(t.flags.writeable for t in tensors.values()), "memory of its own"


def test_apr_codes_of_the_types_are_the_formats():
    """A code that was wrong in reader and writer alike would pass every round trip."""
    assert {d.name: d.apr_code for d in DTYPES} == {"F32": 0, "F16": 1, "F64": 3, "I32": 4, "I64": 5, "I8": 6, "U8": 7,
                                                    "BF16": 30}


def test_apr_same_input_same_bytes(tmp_path, rng):
    arrays = {name: rng.standard_normal((3, 5)).astype(np.float32) for name in ("b", "a", "c")}
    write_apr(tmp_path / "x.apr", arrays, {"k": 1, "j": 2})
    write_apr(tmp_path / "y.apr", dict(reversed(arrays.items())), {"j": 2, "k": 1})
    assert (tmp_path / "x.apr").read_bytes() == (tmp_path / "y.apr").read_bytes()


def test_apr_takes_strided_arrays(tmp_path, rng):
    whole = rng.standard_normal((6, 8)).astype(np.float32)
    arrays = {"columns": whole[:, ::2], "transposed": whole.T, "reversed": whole[::-1]}
    write_apr(tmp_path / "x.apr", arrays, {})
    assert same_bits(read(tmp_path / "x.apr")[1], arrays)


def test_apr_layout_by_hand(tmp_path):
    """A file put together from the table in the format's description: read as it is meant, and written alike."""
    metadata = b'{"name": "x"}'
    index = (struct.pack("<H1sBBQQQQ", 1, b"a", 0, 2, 2, 3, 0, 24)  # F32 [2, 3]
             + struct.pack("<H2sBBQQ", 2, b"b0", 3, 0, 64, 8)  # F64 []
             + struct.pack("<H1sBBQQQQ", 1, b"\x7f", 7, 2, 0, 9, 128, 0)  # U8 [0, 9]: no bytes, where the next begins
             + struct.pack("<H2sBBQQQ", 2, "é".encode(), 30, 1, 2, 128, 4))  # BF16 [2]
    blocks = (np.arange(6, dtype="<f4").tobytes(), struct.pack("<d", 2.5), b"\x80\x3f\x00\x40")
    data = b"".join(block.ljust(64, b"\0") for block in blocks)
    assert len(metadata) <= 64 < len(index) <= 128
    head = struct.pack("<4sBBHIQIQQ", b"APR\0", 2, 0, 1024, 4, 64, len(metadata), 128, 256)
    crc = zlib.crc32(head + bytes(20))
    body = head + struct.pack("<I", crc) + bytes(20) + metadata.ljust(64, b"\0") + index.ljust(128, b"\0") + data
    whole = body + struct.pack("<I", zlib.crc32(body))
    (tmp_path / "hand.apr").write_bytes(whole)
    found, tensors = read(tmp_path / "hand.apr")
    assert found == {"name": "x"}
    assert list(tensors) == ["a", "b0", "\x7f", "é"]
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (tensors["b0"].shape, tensors["b0"].dtype, float(tensors["b0"])) == ((), np.float64, 2.5)
    assert tensors["é"].astype(np.float32).tolist() == [1.0, 2.0]
    assert tensors["\x7f"].shape == (0, 9)
    write_apr(tmp_path / "written.apr", dict(reversed(tensors.items())), found)
    assert (tmp_path / "written.apr").read_bytes() == whole


def test_apr_layout_is_aligned_and_padded(tmp_path, rng):
    arrays = {f"t{n}": random_array(rng, (n,), np.dtype(np.uint8)) for n in (0, 1, 63, 64, 65, 200)}
    for length in range(60, 70):  # metadata of every length around one block
        write_apr(tmp_path / "x.apr", arrays, {"k": "x" * length})
        opened, data = open_apr(tmp_path / "x.apr"), (tmp_path / "x.apr").read_bytes()
        opened.close()
        assert len(data) % 64 == 4, "whole blocks, and the checksum"
        assert all(e.start % 64 == 0 for e in opened.entries.values())
        meta_size, index_at, data_at = *struct.unpack_from("<IQ", data, 20), *struct.unpack_from("<Q", data, 32)
        assert index_at == 64 + -(-meta_size // 64) * 64
        assert not any(data[64 + meta_size:index_at])
        assert data_at % 64 == 0
        assert list(opened.entries) == sorted(arrays, key=str.encode)


def test_apr_says_what_a_file_of_another_version_is(tmp_path):
    (tmp_path / "x.apr").write_bytes(b"APRN" + bytes(200))
    with pytest.raises(FormatError, match="version 1"):
        open_apr(tmp_path / "x.apr")


def test_apr_vocabulary_sets_its_flag(tmp_path):
    for metadata, flag in (({}, 0), ({"tokenizer.json": "{}"}, 512), ({"tokenizer.vocabulary": []}, 512)):
        write_apr(tmp_path / "x.apr", {}, metadata)
        opened = open_apr(tmp_path / "x.apr")
        opened.close()
        assert opened.flags == 1024 | flag


@pytest.mark.parametrize(("name", "dtype"), [("", "f4"), ("x" * 257, "f4"), ("a\0b", "f4"), ("c", "c8"), ("u", "u4"),
                                             ("b", "?"), ("s", ">f4")])
def test_apr_writer_refuses_what_the_format_lacks(name, dtype, tmp_path):
    with pytest.raises(FormatError):
        write_apr(tmp_path / "x.apr", {name: np.zeros(2, dtype)}, {})
    assert not list(tmp_path.iterdir())


def test_apr_every_bit_is_covered(tmp_path):
    """One bit flipped in any byte of a file is noticed: by a check of the structure, or else by a checksum."""
    write_apr(tmp_path / "x.apr", {"a": np.arange(5, dtype=np.float32), "b": np.zeros(3, np.int8)}, {"k": [1, 2]})
    whole, unnoticed = (tmp_path / "x.apr").read_bytes(), []
    for at in range(len(whole)):
        (tmp_path / "y.apr").write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1:])
        try:
            read(tmp_path / "y.apr")
            unnoticed.append(at)
        except (FormatError, IntegrityError):
            pass
    assert not unnoticed


def test_apr_file_cut_while_open(tmp_path):
    write_apr(tmp_path / "x.apr", {"a": np.zeros(5000, np.float32)}, {})
    opened = open_apr(tmp_path / "x.apr")
    (tmp_path / "x.apr").write_bytes(b"short")
    try:
        with pytest.raises(FormatError, match=r"tensor 'a'.*was cut"):
            opened.read("a")
    finally:
        opened.close()
