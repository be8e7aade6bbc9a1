"""The driver through a libcuda made of Python: what is found, what errors mean, what a launch hands over."""

import threading

import pytest
from fake_driver import A100, H200, FakeDriver

from apr import driver
from apr.driver import libcuda
from apr.driver.libcuda import ffi
from apr.errors import DeviceFault, OutOfMemoryError, ShapeError, UnavailableError


def test_structures_are_laid_out_as_in_cuda_h():
    assert (ffi.sizeof("CUlaunchAttribute"), ffi.sizeof("CUlaunchConfig")) == (72, 56)
    assert (ffi.offsetof("CUlaunchAttribute", "value"), ffi.alignof("CUlaunchAttribute")) == (8, 8)
    assert [ffi.offsetof("CUlaunchConfig", f) for f in ("hStream", "attrs", "numAttrs")] == [32, 40, 48]


def test_probe_lists_the_gpus(monkeypatch):
    fake = FakeDriver().use(monkeypatch)
    info = driver.probe()
    assert info == driver.DriverInfo(True, "", "13.0", (H200, A100)) and info.cuda_major == 13
    assert "cuInit" in fake.calls and fake.calls.index("cuInit") < fake.calls.index("cuDeviceGetCount")
    FakeDriver(version=12080, devices=[H200]).use(monkeypatch)
    assert driver.probe().driver_version == "12.8"


@pytest.mark.parametrize(("fake", "words"), [
    (FakeDriver(fails={"cuInit": 100}), ["cuInit", "CUDA_ERROR_NO_DEVICE (text of 100)"]),
    (FakeDriver(fails={"cuInit": 34}, names=False), ["CUDA_ERROR_STUB_LIBRARY", "LD_LIBRARY_PATH"]),
    (FakeDriver(fails={"cuInit": 35}, names=False), ["cudaErrorInsufficientDriver", "update the NVIDIA driver"]),
    (FakeDriver(fails={"cuInit": 803}), ["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "reboot"]),
    (FakeDriver(fails={"cuInit": 12345}), ["CUDA error 12345"]),
    (FakeDriver(fails={"cuDeviceGetCount": 1}), ["cuDeviceGetCount", "CUDA_ERROR_INVALID_VALUE"]),
    (FakeDriver(fails={"cuDeviceGetName": 700}), ["cuDeviceGetName of GPU 0", "CUDA_ERROR_ILLEGAL_ADDRESS"]),
    (FakeDriver(fails={"cuDeviceGetAttribute": 1}), ["cuDeviceGetAttribute of GPU 0"]),
    (FakeDriver(devices=[]), ["no GPU to offer"]),
    (object(), ["not a working CUDA driver", "cuDriverGetVersion"]),
], ids=lambda x: "-".join(x.fails) or "empty" if isinstance(x, FakeDriver) else None)
def test_probe_says_why_there_is_no_gpu(monkeypatch, fake, words):
    monkeypatch.setattr(libcuda, "open_library", lambda name: fake)
    info = driver.probe()
    assert not info.present and info.devices == () and info.problem.isprintable()
    assert [w for w in words if w not in info.problem] == []
    assert info.driver_version == ("13.0" if isinstance(fake, FakeDriver) else "")


def test_probe_says_that_the_gpus_are_hidden(monkeypatch):
    FakeDriver(fails={"cuInit": 100}).use(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in driver.probe().problem
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES=" not in driver.probe().problem


def test_probe_without_a_library_and_with_a_file_that_is_none(tmp_path):
    (tmp_path / "libcuda.so.1").write_bytes(b"not a library\n")
    for name in ("libcuda-of-apr-tests.so.1", str(tmp_path / "libcuda.so.1")):
        info = driver.probe(name)
        assert not info.present and info.problem.startswith("no NVIDIA driver: ") and info.driver_version == ""


def test_a_version_that_the_driver_does_not_tell(monkeypatch):
    FakeDriver(fails={"cuDriverGetVersion": 34, "cuInit": 34}, names=False).use(monkeypatch)
    info = driver.probe()
    assert info.driver_version == "" and info.cuda_major == 0


@pytest.mark.parametrize(("code", "kind"), [
    (2, OutOfMemoryError), (34, UnavailableError), (35, UnavailableError), (100, UnavailableError),
    (700, DeviceFault), (1, DeviceFault), (999, DeviceFault)])
def test_codes_become_errors(monkeypatch, code, kind):
    FakeDriver().use(monkeypatch)
    driver.check(0, "nothing")
    with pytest.raises(kind) as caught:
        driver.check(code, "cuSomething")
    assert type(caught.value) is kind and "cuSomething" in str(caught.value) and f"code {code}" in str(caught.value)


def test_sticky_errors_end_the_process_and_others_do_not():
    assert DeviceFault.exit_code == 10
    assert all(map(driver.is_sticky, (700, 719, 715, 716, 214, 999)))
    assert not any(map(driver.is_sticky, (0, 1, 2, 209, 400, 701)))


def test_function_attributes_and_shared_memory(monkeypatch):
    fake = FakeDriver().use(monkeypatch)
    assert driver.function_attributes(0) == driver.FunctionAttributes(40, 16, 512, 1024, 90)
    driver.set_dynamic_shared(1 << 40, 200_000)
    assert fake.keep["set"] == (1 << 40, 8, 200_000)
    fake.fails = {"cuFuncGetAttribute": 700, "cuFuncSetAttribute": 1}
    for call in (lambda: driver.function_attributes(5), lambda: driver.set_dynamic_shared(5, 999_999)):
        with pytest.raises(DeviceFault):
            call()


def test_the_log_of_a_module_that_does_not_load(monkeypatch):
    fake = FakeDriver(fails={"cuModuleLoadDataEx": 209}, log="ptxas fatal: no").use(monkeypatch)
    assert driver.load_log(b".version 8") == "CUDA_ERROR_NO_BINARY_FOR_GPU (text of 209): ptxas fatal: no"
    assert fake.keep["image"] == b".version 8" and "cuModuleUnload" not in fake.calls
    fake.fails, fake.log = {}, ""
    assert driver.load_log(b"x") == "CUDA_SUCCESS" and "cuModuleUnload" in fake.calls


def launched(fake, values, **options):
    """What the driver was given by a launch of these values."""
    fake.keep["sizes"] = [len(v) for v in values]
    code = driver.launch(1 << 41, (3, 2, 1), (128, 1, 1), 64, 1 << 40, values, **options)
    return code, fake.launched[-1]


def test_a_launch_hands_over_what_it_was_given(monkeypatch):
    fake = FakeDriver().use(monkeypatch)
    values = [b"abcdefgh", b"1234", bytes(range(128)), b"5678", b"xyzxyzxy"]
    code, seen = launched(fake, values, cluster=(2, 1, 1), programmatic=True)
    assert code == 0 and seen["values"] == values
    assert (seen["grid"], seen["block"], seen["shared"]) == ((3, 2, 1), (128, 1, 1), 64)
    assert (seen["stream"], seen["function"]) == (1 << 40, 1 << 41)
    assert seen["attributes"] == {4: (2, 1, 1), 6: 1}
    assert [a % n for a, n in zip(seen["addresses"], (8, 8, 128, 8, 8), strict=False)] == [0] * 5


def test_launches_leave_nothing_to_the_next(monkeypatch):
    fake = FakeDriver(fails={"cuLaunchKernelEx": 719}).use(monkeypatch)
    for values in ([b"1" * 4, b"2" * 8], [], [b"3" * 4, b"4" * 8], [b"5" * 8, b"6" * 4]):
        code, seen = launched(fake, values, cluster=(2, 2, 1))
        assert code == 719 and seen["values"] == values and seen["attributes"] == {4: (2, 2, 1)}
    assert launched(fake, [b"1" * 4], programmatic=True)[1]["attributes"] == {6: 1}
    assert launched(fake, [b"1" * 4])[1]["attributes"] == {}


def test_threads_do_not_share_their_arguments(monkeypatch):
    fake = FakeDriver().use(monkeypatch)
    addresses = []

    def one():
        addresses.append(launched(fake, [b"1" * 8])[1]["addresses"][0])
    one()
    other = threading.Thread(target=one)
    other.start()
    other.join()
    assert len(set(addresses)) == 2


def test_a_tensor_map(monkeypatch):
    fake = FakeDriver().use(monkeypatch)
    made = driver.tensor_map(1 << 30, "bf16", (64, 4096, 3), (128, 1 << 20), (64, 128, 1), 128)
    assert made == bytes(range(128))
    assert fake.keep["map"] == (9, 3, 1 << 30, [64, 4096, 3], [128, 1 << 20], [64, 128, 1], [1, 1, 1], 0, 3, 3, 0)
    driver.tensor_map(16, "f32", (1024,), (), (256,))
    assert fake.keep["map"] == (7, 1, 16, [1024], [], [256], [1], 0, 0, 3, 0)
    fake.fails = {"cuTensorMapEncodeTiled": 1}
    with pytest.raises(DeviceFault, match="cuTensorMapEncodeTiled of f32"):
        driver.tensor_map(16, "f32", (1024,), (), (256,))


GOOD = {"address": 256, "dtype": "bf16", "dims": (64, 128), "strides_bytes": (128,), "box": (64, 64), "swizzle": 128}


@pytest.mark.parametrize(("change", "rule"), [
    ({"address": 264}, "multiple of 16"), ({"address": 0}, "multiple of 16"), ({"dtype": "f16"}, "bf16 or f32"),
    ({"strides_bytes": (120,)}, "multiples of 16 bytes"), ({"strides_bytes": (0,)}, "multiples of 16 bytes"),
    ({"strides_bytes": (1 << 40,)}, "below 2^40"), ({"strides_bytes": ()}, "1 strides"),
    ({"box": (64, 257)}, "1 to 256"), ({"box": (64, 0)}, "1 to 256"), ({"box": (64,)}, "a box of 2"),
    ({"box": (128, 64)}, "at most the swizzle, 128 bytes"), ({"box": (12, 64)}, "inner axis is a multiple of 16"),
    ({"swizzle": 64}, "at most the swizzle, 64 bytes"), ({"swizzle": 16}, "0, 32, 64 or 128"),
    ({"dims": (0, 128)}, "1 to 2^32"), ({"dims": ((1 << 32) + 1, 1)}, "1 to 2^32"),
    ({"dims": (), "strides_bytes": (), "box": ()}, "1 to 5 axes"),
    ({"dims": (8,) * 6, "strides_bytes": (16,) * 5, "box": (8,) * 6}, "1 to 5 axes")])
def test_each_rule_of_tensor_maps_has_its_name(monkeypatch, change, rule):
    fake = FakeDriver().use(monkeypatch)
    driver.tensor_map(**GOOD)
    fake.calls.clear()
    with pytest.raises(ShapeError) as caught:
        driver.tensor_map(**(GOOD | change))
    assert rule in str(caught.value) and fake.calls == []
