"""Loading what the cache holds: an image that the driver refuses is built again once, and CuPy's memory of paths.

The driver is made of Python.
"""

import gc
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_kernels import BAKED, SPEC, small_cache, use_fake_compiler

from apr import driver, ptx_cache
from apr.errors import DeviceFault, KernelError, OutOfMemoryError
from apr.kernel import KernelSpec
from apr.ptx_store import Entry, decode, file_name

OTHER = KernelSpec("small.cu", "other", SPEC.baked, ("rstd:f32*",))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A new cache over the same folder, with a compiler that needs no NVRTC."""
    use_fake_compiler(monkeypatch)
    return lambda arch="sm_90a": small_cache(tmp_path / "cache", tmp_path / "kernels", arch)


class Refused(Exception):
    """What CuPy raises when the driver refuses; `status` is the driver's code."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"CUDA error {status}")


@pytest.fixture
def loads(monkeypatch):
    """A driver made of Python: images loaded, in order; `code` is its answer to what fake_compile did not make."""
    state = SimpleNamespace(images=[], code=200, always=0, sound=None)

    def raw_module(self, image):
        state.images.append(image)
        if state.always or image in (b"garbage", b"no such entry"):
            if image == b"no such entry":
                return SimpleNamespace(get_function=lambda name: (_ for _ in ()).throw(Refused(500)))
            raise Refused(state.always or state.code)
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=hash(name))))

    monkeypatch.setattr(ptx_cache.PtxCache, "_raw_module", raw_module)
    monkeypatch.setattr(driver, "load_log", lambda image: "the driver's log")
    monkeypatch.setattr(driver.libcuda, "error_name", lambda code, library=None: f"E{code}")
    return state


@pytest.mark.parametrize("image", [b"garbage", b"no such entry"], ids=str)
def test_F3_a_sound_entry_of_garbage_is_thrown_away_and_built_again_once(make, tmp_path, loads, image):
    entry = make().build(SPEC, BAKED)
    path = tmp_path / "cache" / file_name(entry.key)
    path.write_bytes(Entry(entry.key, entry.meta, image).encode())
    cache = make()
    assert cache.get(SPEC, BAKED).key == f"small of {entry.key}" and loads.images == [image, entry.image]
    assert (cache.counts.hits, cache.counts.compiled, cache.counts.rejected) == (1, 1, 1)
    assert "does not load" in cache.counts.warnings[0] and decode(path.read_bytes()).image == entry.image
    assert cache.get(SPEC, BAKED) is cache.get(SPEC, BAKED) and cache.get(OTHER, BAKED).key.startswith("other of")
    assert len(loads.images) == 2 and make().get(SPEC, BAKED)


def test_F3_what_was_compiled_here_and_does_not_load_is_an_error(make, loads, monkeypatch):
    loads.always = 209
    with pytest.raises(KernelError, match="CUDA error 209; the driver's log"):
        make().get(SPEC, BAKED)
    assert len(loads.images) == 1


@pytest.mark.parametrize(("code", "kind"), [(700, DeviceFault), (719, DeviceFault), (2, OutOfMemoryError)])
def test_a_broken_device_is_not_blamed_on_the_entry(make, tmp_path, loads, code, kind):
    make().build(SPEC, BAKED)
    loads.always, cache = code, make()
    with pytest.raises(kind):
        cache.get(SPEC, BAKED)
    assert (cache.counts.compiled, cache.counts.rejected) == (0, 0) and len(list((tmp_path / "cache").iterdir())) == 1


def test_threads_that_ask_at_once_get_one_kernel(make, loads, monkeypatch):
    compile_text = ptx_cache.compile_text

    def slow(*arguments):
        time.sleep(0.05)
        return compile_text(*arguments)

    monkeypatch.setattr(ptx_cache, "compile_text", slow)
    cache = make()
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: cache.get(SPEC, BAKED), range(8)))
    assert len(loads.images) == 1 and cache.counts.compiled == 1
    assert len({k.key for k in kernels}) == 1 and len({id(k.module) for k in kernels}) == 1


def test_F12_caches_of_two_devices_share_no_loaded_module(make, loads):
    """Each Device has its own PtxCache; two of one architecture share the folder alone."""
    caches = make(), make(), make("sm_80")
    kernels = [cache.get(SPEC, BAKED) for cache in caches]
    assert len({id(k.module) for k in kernels}) == 3 and len(loads.images) == 3
    assert loads.images[0] == loads.images[1] != loads.images[2]
    assert [c.counts.compiled for c in caches] == [1, 0, 1]


def test_images_are_loaded_from_files_named_by_their_contents(make, monkeypatch):
    """And where /tmp is full, from memory."""
    class Module:
        def __init__(self, path):
            self.path = Path(path)
            self.content = self.path.read_bytes()

        def compile(self):
            pass

    monkeypatch.setattr(driver, "import_cupy", lambda: SimpleNamespace(RawModule=Module))
    cache = make()
    one, two, again = (cache._raw_module(image) for image in (b"one", b"two", b"one"))
    assert [m.content for m in (one, two, again)] == [b"one", b"two", b"one"]
    assert one.path == again.path != two.path and stat.S_IMODE(one.path.parent.stat().st_mode) == 0o700
    one.path.unlink()
    two.path.unlink()
    one.path.parent.rmdir()
    three = cache._raw_module(b"three")
    assert three.content == b"three" and three.path.is_relative_to("/dev/shm")
    folder = three.path.parent
    del cache
    gc.collect()
    assert not folder.exists()
