"""Which CuPy and CUDA libraries are found, and that CuPy gets the NVRTC and the cache folder meant for it."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from fake_driver import A100, H200, T4, THIRTEEN, TWELVE, found, install_cupy

from apr import driver, paths
from apr.driver import libraries
from apr.errors import UnavailableError

BOTH = {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.1.0"}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """A function that makes these CuPys the installed ones, and these files NVIDIA's; returns their folder."""
    return partial(install_cupy, monkeypatch, tmp_path)


@pytest.mark.parametrize(("cupy", "own"), [("cupy-cuda12x", TWELVE), ("cupy-cuda13x", THIRTEEN)])
def test_each_cupy_has_the_libraries_of_its_own_major(install, cupy, own):
    root = install({cupy: "14.2.0"}, TWELVE + THIRTEEN)
    assert [driver.library_path(kind) for kind in ("nvrtc", "cublasLt")] == [str(root / f) for f in own]
    assert driver.library_path("nvrtc", 12) == str(root / TWELVE[0])
    assert driver.cuda_problems(found(H200, A100), 1) == []
    assert driver.library_path("nvrtc", 11) is None and driver.library_path("cudnn") is None


@pytest.mark.parametrize(("cupy", "files", "info", "ordinal", "says"), [
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, found(H200), 1, "there is no cuda:1: the driver offers 1 GPU"),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, found(T4), 0, "Tesla T4 has compute capability 7.5"),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, found(H200, version="11.8"), 0, "supports CUDA 11.8, and CuPy here is for"),
    ({"cupy-cuda13x": "14.2.0"}, THIRTEEN, found(H200, version="12.8"), 0, "supports CUDA 12.8, and CuPy here is for"),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE[:1], found(H200), 0, "no libcublasLt.so.12: pip install nvidia-cublas-cu12"),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE[1:] + THIRTEEN, found(H200), 0, "no libnvrtc.so.12: pip install nvidia-cuda-"),
    ({"cupy-cuda13x": "14.2.0"}, TWELVE + THIRTEEN[1:], found(H200), 0, "no libnvrtc.so.13: pip install nvidia-cuda-"),
    ({}, TWELVE, found(H200), 0, "CuPy is not installed: pip install 'apr[cuda12]' or 'apr[cuda13]'"),
    (BOTH, TWELVE + THIRTEEN, found(H200), 0, "cupy-cuda12x 14.2.0 and cupy-cuda13x 14.1.0 are both installed"),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, driver.DriverInfo(False, "no driver here", "", ()), 3, "no driver here"),
])
def test_each_thing_that_is_missing_is_named_alone(install, cupy, files, info, ordinal, says):
    install(cupy, files)
    problems = driver.cuda_problems(info, ordinal)
    assert len(problems) == 1 and says in problems[0]


def test_versions_in_a_line(install):
    install({})
    nothing = driver.DriverInfo(False, "x", "", ())
    assert driver.cuda_versions(nothing) == "no driver, no CuPy, NVRTC none, cuBLASLt none"
    install({"cupy-cuda12x": "14.2.0"}, TWELVE)
    assert driver.cuda_versions(found(H200)).startswith("driver 13.0, cupy-cuda12x 14.2.0, NVRTC 1")


def test_the_roots_of_the_nvidia_wheels_are_found_on_the_path(monkeypatch, tmp_path):
    (tmp_path / "nvidia").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert tmp_path / "nvidia" in libraries._wheel_roots()


def test_the_systems_library_is_the_last_resort(monkeypatch):
    monkeypatch.setattr(libraries, "_wheel_roots", list)
    monkeypatch.setitem(libraries.LIBRARIES, ("nvrtc", 12), ("x/libc.so.6", "none"))
    path = driver.library_path("nvrtc", 12)
    assert os.path.isabs(path) and os.path.basename(path).startswith("libc.so.6")
    monkeypatch.setitem(libraries.LIBRARIES, ("nvrtc", 12), ("x/libno-such-of-apr.so.6", "none"))
    assert driver.library_path("nvrtc", 12) is None


def test_loaded_libraries(monkeypatch, tmp_path):
    lines = ["/a/libnvrtc.so.12", "/a/libnvrtc.so.12", "/b/libnvrtc.so.13.5", "/b/libnvrtc-builtins.so.12.9",
             "/b b/libcuda.so.1", "/c/libcublasLt.so.12", "/c/libcublas.so.12", "/d/libcudart.so", "/d/libcudnn.so.9"]
    maps = tmp_path / "maps"
    maps.write_text("".join(f"7f-80 r-xp 0 08:01 9   {p}\n" for p in lines) + "7f-80 rw-p 0 00:00 0\n")
    monkeypatch.setattr(libraries, "Path", lambda _: maps)
    assert driver.loaded_libraries() == {
        "libnvrtc": "/a/libnvrtc.so.12", "libnvrtc#2": "/b/libnvrtc.so.13.5", "libcuda": "/b b/libcuda.so.1",
        "libcublasLt": "/c/libcublasLt.so.12", "libcublas": "/c/libcublas.so.12", "libcudart": "/d/libcudart.so"}


SEEN = """
import ctypes, json, os, sys
load, order = ctypes.CDLL, []
def record(name, mode=ctypes.DEFAULT_MODE, **more):
    order.append((str(name), mode == ctypes.RTLD_GLOBAL, 'cupy' in sys.modules, os.environ.get('CUPY_CACHE_DIR', '')))
    return load(name, mode, **more)
ctypes.CDLL = record
from apr import driver
assert 'cupy' not in sys.modules
cupy = driver.import_cupy()
assert driver.import_cupy() is cupy is sys.modules['cupy']
print(json.dumps([order, cupy.cuda.nvrtc.getVersion(), driver.loaded_libraries(), driver.library_path('nvrtc')]))
"""


@pytest.mark.parametrize("home", ["/proc", ""])
def test_cupy_gets_its_nvrtc_and_a_cache_folder_before_it_is_imported(tmp_path, home):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CUPY", "APR", "XDG"))}
    env |= {"HOME": home or str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, timeout=120, env=env,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
    order, version, loaded, path = json.loads(done.stdout)
    before = [seen for seen in order if seen[0] == path and not seen[2]]
    assert before and before[-1][1], "libnvrtc was not loaded for all before CuPy"
    assert before[-1][3].startswith(str(tmp_path)), "CUPY_CACHE_DIR was not set before CuPy was imported"
    assert loaded["libnvrtc"] == os.path.realpath(path) and "libnvrtc#2" not in loaded
    assert version[0] == libraries.cupy_major() and (version[0] != 12 or version == [12, 9])
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == ([] if home else [".cache", ".cache/apr", ".cache/apr/cupy"])


@pytest.mark.parametrize(("cupy", "files", "words"), [
    ({}, TWELVE, ["pip install 'apr[cuda12]'", "apr[cuda13]"]),
    (BOTH, TWELVE, ["cupy-cuda12x 14.2.0 and cupy-cuda13x 14.1.0", "pip uninstall cupy-cuda12x cupy-cuda13x"]),
    ({"cupy-cuda12x": "14.2.0"}, THIRTEEN, ["libnvrtc.so.12", "pip install nvidia-cuda-nvrtc-cu12"]),
    ({"cupy-cuda12x": "14.2.0"}, TWELVE, ["OSError", "libnvrtc.so.12", "force-reinstall"]),  # an empty file
])
def test_cupy_is_refused_unless_it_is_one_and_has_its_nvrtc(install, monkeypatch, tmp_path, cupy, files, words):
    install(cupy, files)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        driver.import_cupy.__wrapped__()
    assert [w for w in words if w not in str(caught.value)] == []


def test_an_nvrtc_of_another_major_is_refused(monkeypatch, tmp_path):
    other = 25 - libraries.cupy_major()
    nvrtc = SimpleNamespace(getVersion=lambda: (other, 5))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc)))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match=f"version {libraries.cupy_major()} for cupy.*found version {other}.5"):
        driver.import_cupy.__wrapped__()


def test_the_cache_folder(monkeypatch, tmp_path):
    for name in ("APR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(paths.cache_dir()) == "/somewhere/.cache/apr"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert str(paths.cache_dir()) == "/somewhere/.cache/apr"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(paths.cache_dir()) == "/xdg/apr"
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path))
    assert paths.cache_dir() == tmp_path
    for name in ("APR_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)

    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(paths.Path, "home", no_home)
    assert paths.cache_dir() is None


@pytest.mark.parametrize("spoil", ["mode", "link", "file", "nothing"])
def test_cupys_cache_is_ours_alone(monkeypatch, tmp_path, spoil):
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "apr"))
    monkeypatch.setenv("CUPY_CACHE_DIR", "")
    folder = tmp_path / "apr" / "cupy"
    folder.parent.mkdir()
    if spoil == "mode":
        folder.mkdir()
        folder.chmod(0o777)
    elif spoil == "link":
        folder.symlink_to(tmp_path)
    elif spoil == "file":
        folder.touch()
    chosen = paths.prepare_cupy_cache()
    assert (chosen == str(folder)) == (spoil == "nothing") and chosen == os.environ["CUPY_CACHE_DIR"]
    assert os.stat(chosen).st_mode & 0o777 == 0o700
    assert paths.prepare_cupy_cache() == chosen
