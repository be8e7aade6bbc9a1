"""safetensors: every dtype there and back, and what the `safetensors` package writes and reads."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from apr.dtypes import DTYPES
from apr.errors import FormatError
from apr.formats.safetensors import open_safetensors, write_safetensors

SHAPES = [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 1, 3)]
PACKAGE = [d for d in DTYPES if d.name != "BF16"]  # its NumPy side writes BF16 but does not read it


def read(path):
    """Metadata and tensors of a file."""
    with open_safetensors(path) as opened:
        return opened.metadata, opened.read_all()


def random_arrays(rng, dtype):
    """Arrays of random bits, NaNs and denormals among them."""
    return {f"t{i}": np.frombuffer(rng.bytes(int(np.prod(s)) * dtype.itemsize), dtype).reshape(s) for i,
            s in enumerate(SHAPES)}


def described(arrays):
    """What makes two arrays the same, bit for bit."""
    return {k: (a.dtype, a.shape, a.tobytes()) for k, a in arrays.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_safetensors_round_trip(dtype, tmp_path, rng):
    arrays = random_arrays(rng, dtype.numpy)
    write_safetensors(tmp_path / "x", arrays, {"format": "pt", "é": "🙂"})
    metadata, tensors = read(tmp_path / "x")
    assert metadata == {"format": "pt", "é": "🙂"}
    assert list(tensors) == list(arrays), "in the order given"
    assert described(tensors) == described(arrays)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_package_reads_what_we_write(dtype, tmp_path, rng):
    arrays = random_arrays(rng, dtype.numpy)
    write_safetensors(tmp_path / "x", arrays, {"k": "v"})
    found = dict(safetensors.deserialize((tmp_path / "x").read_bytes()))
    assert {k: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for k, t in found.items()} == {
        k: (dtype.name, a.shape, a.tobytes()) for k, a in arrays.items()}
    if dtype in PACKAGE:
        assert described(safetensors.numpy.load_file(tmp_path / "x")) == described(arrays)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_we_read_what_the_package_writes(dtype, tmp_path, rng):
    arrays = random_arrays(rng, dtype.numpy)
    safetensors.numpy.save_file(arrays, tmp_path / "x", {"k": "v"})
    metadata, tensors = read(tmp_path / "x")
    assert metadata == {"k": "v"}
    assert described(tensors) == described(arrays)


def test_safetensors_same_input_same_bytes(tmp_path, rng):
    arrays = random_arrays(rng, np.dtype(np.float32))
    for name in "xy":
        write_safetensors(tmp_path / name, arrays, {"k": "v"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_safetensors_data_is_aligned(tmp_path, rng):
    for length in range(70):  # headers of every length around one block
        write_safetensors(tmp_path / "x", {"n" * (length + 1): np.float32([1, 2])}, {})
        data = (tmp_path / "x").read_bytes()
        size = int.from_bytes(data[:8], "little")
        assert (8 + size) % 64 == 0
        assert json.loads(data[8:8 + size])["n" * (length + 1)]["data_offsets"] == [0, 8]
        assert data[8 + size:] == np.float32([1, 2]).tobytes()


def test_safetensors_without_tensors(tmp_path):
    write_safetensors(tmp_path / "x", {}, {})
    assert read(tmp_path / "x") == ({}, {})
    assert safetensors.deserialize((tmp_path / "x").read_bytes()) == []


@pytest.mark.parametrize(("name", "dtype"), [("", "f4"), ("__metadata__", "f4"), ("x" * 257, "f4"), ("a\0b", "f4"),
                                             ("c", "c8"), ("s", ">f4")])
def test_safetensors_writer_refuses_what_a_reader_would(name, dtype, tmp_path):
    with pytest.raises(FormatError):
        write_safetensors(tmp_path / "x", {name: np.zeros(2, dtype)}, {})
    assert not list(tmp_path.iterdir())


def test_safetensors_file_cut_while_open(tmp_path):
    write_safetensors(tmp_path / "x", {"a": np.zeros(5000, np.float32)}, {})
    opened = open_safetensors(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"short")
    try:
        with pytest.raises(FormatError, match=r"tensor 'a'.*was cut"):
            opened.read("a")
    finally:
        opened.close()
