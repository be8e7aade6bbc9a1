"""Device without a GPU, over a CuPy that only remembers: what is refused, pinned memory; and the arena's views."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from fake_driver import A100, H200, T4, found

from apr import arena as arena_module
from apr import driver
from apr.arena import Arena
from apr.buffers import plan
from apr.device import Device
from apr.errors import OutOfMemoryError, ShapeError, UnavailableError
from apr.presets import tiny


class FakeCupy:
    """As much of CuPy as a Device asks for; `pinned` None: there is no memory to pin."""

    __version__ = "14"

    def __init__(self):
        errors = {name: type(name, (Exception,), {}) for name in ("CUDARuntimeError", "CUDADriverError",
                                                                  "OutOfMemoryError")}
        self.used, self.limit = [], 1 << 20
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(setDevice=self.used.append, CUDARuntimeError=errors["CUDARuntimeError"]),
            driver=SimpleNamespace(CUDADriverError=errors["CUDADriverError"]),
            memory=SimpleNamespace(OutOfMemoryError=errors["OutOfMemoryError"]),
            Stream=lambda non_blocking: SimpleNamespace(ptr=99, non_blocking=non_blocking),
            alloc_pinned_memory=self.pin, UnownedMemory=lambda ptr, size, owner, device: SimpleNamespace(
                ptr=ptr, size=size, owner=owner, device=device),
            MemoryPointer=lambda memory, offset: SimpleNamespace(memory=memory, ptr=memory.ptr + offset))

    def pin(self, size):
        if size > self.limit:
            raise self.cuda.memory.OutOfMemoryError("no more")
        memory = type("Pinned", (ctypes.c_char * size,), {})()
        memory.ptr = ctypes.addressof(memory)
        return memory

    def ndarray(self, shape, dtype, pointer):
        return SimpleNamespace(shape=shape, dtype=dtype, data=pointer)


@pytest.fixture
def cupy(monkeypatch):
    """Two GPUs that can be used, and the CuPy that is imported for them."""
    fake = FakeCupy()
    monkeypatch.setattr(driver, "probe", lambda: found(H200, A100))
    monkeypatch.setattr(driver, "cuda_problems", lambda info, ordinal=0: [])
    monkeypatch.setattr(driver, "import_cupy", lambda: fake)
    return fake


def test_a_device_is_the_gpu_that_was_asked_for(cupy, tmp_path):
    dev = Device(1, tmp_path / "kernels")
    assert (dev.ordinal, dev.name, dev.capability, dev.cache.arch) == (1, "NVIDIA A100", (8, 0), "sm_80")
    assert cupy.used == [1] and dev.stream.non_blocking


@pytest.mark.parametrize(("gpus", "ordinal", "words"), [
    ((), 0, "there is no cuda:0"), ((H200,), 1, "there is no cuda:1: the driver offers 1 GPU"),
    ((T4,), 0, "Tesla T4 has compute capability 7.5, and 8.0 is needed")], ids=["none", "beyond", "old"])
def test_what_cannot_be_used_is_refused_as_doctor_says_it(monkeypatch, gpus, ordinal, words):
    info = found(*gpus)
    monkeypatch.setattr(driver, "probe", lambda: info)
    monkeypatch.setattr(driver, "import_cupy", lambda: pytest.fail("CuPy was imported"))
    with pytest.raises(UnavailableError, match=words) as caught:
        Device(ordinal)
    assert caught.value.exit_code == 9 and "GATE-GPUTRAIN-002" in str(caught.value)
    assert [p for p in driver.cuda_problems(info, ordinal) if p not in str(caught.value)] == []


def test_mapped_memory_is_one_memory_seen_twice(cupy, tmp_path):
    dev = Device(1, tmp_path / "kernels")
    host, array = dev.mapped((3, 2), "i32")
    assert host.shape == array.shape == (3, 2) and host.dtype == array.dtype == np.int32
    assert host.ctypes.data == array.data.ptr and array.data.memory.size == 24 and array.data.memory.device == 1
    host[2, 1] = -3  # it may be written
    assert ctypes.c_int32.from_address(array.data.ptr + 20).value == -3
    owner = array.data.memory.owner  # and lives as long as the array does
    assert owner.ptr == array.data.ptr
    assert dev.mapped((0,), "f64")[0].shape == (0,)
    with pytest.raises(OutOfMemoryError, match=r"8\.0 MiB of pinned host memory"):
        dev.mapped((1 << 20,), "f64")


class FakeDevice:
    """Device memory that is NumPy's."""

    ordinal = 0
    fast: frozenset[str] = frozenset()

    def free_bytes(self):
        return 1 << 40, 1 << 40

    def empty(self, shape, dtype):
        return np.ones(shape, {"u8": np.uint8, "bf16": np.uint16, "i32": np.int32, "f64": np.float64,
                               "f32": np.float32}[dtype])

    def fill(self, array, byte):
        array.view(np.uint8)[...] = byte


def test_views_of_the_arena_are_parts_of_its_buffers_and_made_once(monkeypatch):
    arena = Arena(FakeDevice(), plan(tiny, 2, 8, "bf16"))
    rows = arena.rows("norm", (5, tiny.C))
    assert rows.shape == (5, tiny.C) and np.shares_memory(rows, arena["norm"])
    assert rows.ctypes.data == arena["norm"].ctypes.data and arena.rows("norm", (5, tiny.C)) is rows
    layers = [arena.layer("qkv", i, (3, tiny.QKV)) for i in range(tiny.L + 1)]
    assert layers[0].ctypes.data == arena["qkv"][0].ctypes.data != layers[1].ctypes.data
    assert layers[1].ctypes.data == arena["qkv"][1].ctypes.data and layers[1].shape == (3, tiny.QKV)
    assert layers[tiny.L].ctypes.data == layers[0].ctypes.data  # where fewer are kept, in turn
    assert arena.layer("qkv", 0, (2, tiny.QKV)).shape == (2, tiny.QKV)  # another length is another view
    part = arena.part("params", 7, (2, 3))
    part[...] = 9
    assert (arena["params"][7:13] == 9).all() and arena["params"][13] == 0 == arena["params"][6]


def test_no_more_views_are_remembered_than_that(monkeypatch):
    monkeypatch.setattr(arena_module, "VIEWS", 3)
    arena = Arena(FakeDevice(), plan(tiny, 2, 8, "bf16"))
    for n in range(1, 9):
        assert arena.rows("norm", (n, tiny.C)).shape == (n, tiny.C) and len(arena.views) <= 3


def test_what_is_not_written_before_it_is_read_starts_as_zeros():
    arena = Arena(FakeDevice(), plan(tiny, 2, 8, "bf16"))
    for name in ("master", "params", "grads", "m", "v", "ids", "stats"):
        assert not arena[name].any(), name
    assert arena["norm"].any()


def test_what_lies_in_logits_buf_is_refused_while_it_holds_logits():
    arena = Arena(FakeDevice(), plan(tiny, 2, 8, "bf16"))
    act, logits = arena.rows("act", (16, tiny.F)), arena.rows("logits_buf", (16, tiny.Vp))
    norm = arena.rows("norm", (16, tiny.C))
    assert np.shares_memory(act, logits) and np.shares_memory(norm, logits) and not np.shares_memory(act, norm)
    for phase in ("logits", "dlogits"):
        arena.enter(phase)
        assert arena.rows("dnorm", (16, tiny.C)) is not None
        for name in ("act", "dact", "norm"):
            with pytest.raises(ShapeError, match=f"{name}: expected to be asked for while logits_buf is free"):
                arena.rows(name, (16, 4))
    arena.enter("free")
    assert arena.rows("act", (16, tiny.F)) is act
