"""--device: what is chosen, what is refused, and what is said, with and without a GPU that can be used."""

import time

import pytest
from fake_driver import A100, H200, T4, THIRTEEN, TWELVE, FakeDriver, found, install_cupy

from apr.cli.main import main
from apr.driver import DriverInfo
from apr.errors import ConfigError, UnavailableError
from apr.tools.device import Choice, choose_device

NONE = DriverInfo(False, "no NVIDIA driver: libcuda.so.1 is not here", "", ())


@pytest.fixture
def twelve(monkeypatch, tmp_path):
    """CuPy for CUDA 12 with all its libraries."""
    monkeypatch.delenv("APR_DEVICE", raising=False)
    install_cupy(monkeypatch, tmp_path, {"cupy-cuda12x": "14.2.0"}, TWELVE)


def never():
    raise AssertionError("the driver was asked")


@pytest.mark.parametrize(("asked", "ordinal", "name"), [("cuda", 0, ""), ("cuda:0", 0, ""), ("cuda:1", 1, ""),
                                                        ("auto", 0, "NVIDIA H200"), (None, 0, "NVIDIA H200")])
def test_a_gpu_that_can_be_used_is_chosen(twelve, capsys, asked, ordinal, name):
    choice = choose_device(asked, lambda: found(H200, A100))
    assert choice == Choice("cuda", ordinal, "bf16") and choice.text == f"cuda:{ordinal}"
    said = capsys.readouterr()
    assert said.out == "" and said.err == (f"device: cuda:0 ({name}, driver 13.0)\n" if name else "")


def test_the_cpu_is_chosen_without_a_look_at_the_driver(capsys):
    assert choose_device("cpu", never) == Choice("cpu", 0, "fp32") and choose_device("cpu", never).text == "cpu"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("info", "reason"), [
    (NONE, "no NVIDIA driver: libcuda.so.1 is not here"), (found(T4), "Tesla T4 has compute capability 7.5"),
    (found(H200, version="11.4"), "the driver supports CUDA 11.4")])
def test_auto_says_why_it_takes_the_cpu(twelve, capsys, info, reason):
    assert choose_device("auto", lambda: info) == Choice("cpu", 0, "fp32")
    said = capsys.readouterr().err
    assert said.startswith(f"device: cpu (reason: {reason}") and said.endswith(")\n") and said.count("\n") == 1


def test_apr_device_is_the_default(twelve, monkeypatch):
    monkeypatch.setenv("APR_DEVICE", "cuda:1")
    assert choose_device(None, lambda: found(H200, A100)).text == "cuda:1"
    assert choose_device("cpu", never).text == "cpu"
    monkeypatch.setenv("APR_DEVICE", "gpu")
    with pytest.raises(ConfigError):
        choose_device(None, never)


@pytest.mark.parametrize("word", ["cuda:16", "cuda:01", "CUDA", "gpu", "", "cuda:", "cpu:0", "auto:0", "cuda:0\n"])
def test_words_outside_the_grammar(word):
    with pytest.raises(ConfigError):
        choose_device(word, never)


@pytest.mark.parametrize(("cupy", "files", "info", "asked", "words"), [
    ({"cupy-cuda12x": "14.2.0"}, [], NONE, "cuda",
     ["no NVIDIA driver", "no libnvrtc.so.12", "no libcublasLt.so.12", "[no driver, cupy-cuda12x 14.2.0, NVRTC none"]),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, found(H200), "cuda:1", ["there is no cuda:1", "1 GPU", "driver 13.0"]),
    ({"cupy-cuda13x": "14.1.0"}, THIRTEEN, found(H200, version="12.4"), "cuda", ["driver 12.4", "cupy-cuda13x 14.1.0"]),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, found(T4), "cuda", ["capability 7.5", "8.0"]),
    ({"cupy-cuda12x": "1", "cupy-cuda13x": "2"}, TWELVE, found(H200), "cuda", ["cupy-cuda12x 1 and cupy-cuda13x 2"]),
    ({}, TWELVE, found(H200), "cuda", ["CuPy is not installed", "apr[cuda12]", "no CuPy"]),
])
def test_a_gpu_that_cannot_be_used_is_refused_with_all_that_is_missing(
        monkeypatch, tmp_path, capsys, cupy, files, info, asked, words):
    install_cupy(monkeypatch, tmp_path, cupy, files)
    with pytest.raises(UnavailableError, match="GATE-GPUTRAIN-002") as caught:
        choose_device(asked, lambda: info)
    assert [w for w in words if w not in str(caught.value)] == []
    assert not str(caught.value).endswith("…") and capsys.readouterr().err == ""
    assert choose_device("auto" if asked == "cuda" else "cpu", lambda: info).kind == "cpu"


@pytest.mark.parametrize(("fake", "visible", "words"), [
    (FakeDriver(fails={"cuInit": 100}), "", ["CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES=''"]),
    (FakeDriver(fails={"cuInit": 34}, names=False), None, ["CUDA_ERROR_STUB_LIBRARY"]),
    (FakeDriver(version=11040), None, ["the driver supports CUDA 11.4", "driver 11.4"]),
    (FakeDriver(devices=[T4]), None, ["capability 7.5"]),
    (FakeDriver(devices=[]), None, ["no GPU to offer"])])
def test_the_command_refuses_before_anything_is_made(twelve, monkeypatch, tmp_path, capsys, fake, visible, words):
    fake.use(monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    start = time.perf_counter()
    assert main(["pretrain", "--demo", "--run-dir", str(tmp_path / "run"), "--device", "cuda"]) == 9
    assert time.perf_counter() - start < 2 and not (tmp_path / "run").exists()
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("apr: GATE-GPUTRAIN-002") and said.err.count("\n") == 1
    assert [w for w in words if w not in said.err] == []
