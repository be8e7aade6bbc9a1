"""The kernel cache's folder, disk, compiler and driver against faults F8 to F12: nothing of it stops a run.

The users who are not this one are made where the tests run as root. The driver is made of Python.
"""

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest
from small_kernels import BAKED, SPEC, small_cache, use_fake_compiler, write_kernels

from apr import paths, ptx_cache, ptx_store
from apr.errors import KernelCompileError, UnavailableError
from apr.kernel import KernelSpec
from apr.ptx_store import Entry, PtxStore, file_name

OTHER = KernelSpec("small.cu", "other", SPEC.baked, ("rstd:f32*",))
OTHER_EPS = BAKED | {"EPS": 1e-5}
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A new cache over the same folder, with a compiler that needs no NVRTC."""
    use_fake_compiler(monkeypatch)
    return lambda arch="sm_90a", warn=None: small_cache(tmp_path / "cache", tmp_path / "kernels", arch, warn)


def test_F8_no_home_folder(monkeypatch):
    monkeypatch.setattr(paths, "environment", dict)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    said = []
    store = PtxStore(paths.cache_dir(), said.append, lambda: said.append("counted"))
    assert said[0] == "counted" and "no home folder" in said[1] and "None" not in said[1] and len(said) == 2
    assert store.write(Entry("k", {}, b"x")) and store.read("k") == Entry("k", {}, b"x")
    path = store.path
    del store
    assert not path.exists()


def test_F8_no_folder_at_all(make, tmp_path, monkeypatch):
    """Neither the cache's place nor /tmp: kernels are compiled, used and forgotten."""
    (tmp_path / "cache").write_text("a file is in the way")

    def none(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", none)
    cache = make()
    assert cache.store.path is None and cache.build(SPEC, BAKED).image == cache.build(SPEC, BAKED).image
    assert (cache.counts.compiled, cache.counts.rejected, len(cache.counts.warnings)) == (2, 1, 1)
    assert list(cache.store.entries()) == [] and cache.store.clear() == (0, 0) and not cache.store.discard("k")


def test_F8_a_folder_that_vanishes_under_a_run(make, tmp_path):
    cache = make()
    (tmp_path / "cache").rmdir()
    assert cache.build(SPEC, BAKED).image and len(cache.counts.warnings) == 1 and cache.counts.rejected == 0


def test_F8_a_key_longer_than_file_names_may_be(tmp_path):
    store = PtxStore(tmp_path / "c", pytest.fail, pytest.fail)
    long = [Entry("x" * 300 + f"-{i:064x}", {}, bytes([i])) for i in (1, 2)]
    assert all(store.write(e) for e in long)
    assert [store.read(e.key) for e in long] == long == [e for _, e in store.entries()]


class Failing:
    """A file whose write fails."""

    def __init__(self, f, fail) -> None:
        self.f, self.write = f, fail

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.f.close()


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_F8_a_disk_that_fails_costs_a_line_and_leaves_nothing(make, tmp_path, monkeypatch, call, code):
    cache, reached, real = make(), [], getattr(os, call)

    def fail(*arguments, **options):
        reached.append(call)
        raise OSError(code, os.strerror(code))

    def sometimes(first, second=None, *rest, **options):
        if call == "open" and not second & os.O_CREAT:
            return real(first, second, *rest, **options)
        if call == "fdopen":
            f = real(first, second, *rest, **options)
            return Failing(f, fail) if second == "wb" else f
        return fail()

    monkeypatch.setattr(os, call, sometimes)
    for baked in (BAKED, OTHER_EPS, BAKED):
        assert cache.build(SPEC, baked).image
    monkeypatch.setattr(os, call, real)
    assert len(cache.counts.warnings) == 1 and "cannot be written" in cache.counts.warnings[0]
    assert (cache.counts.compiled, cache.counts.rejected, len(reached)) == (3, 0, 3)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_F8_a_disk_that_cannot_be_read(make, monkeypatch, code):
    make().build(SPEC, BAKED)

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as m:
        m.setattr(ptx_store, "_distrust", fail)
        cache = make()
    assert cache.store.path is None and cache.counts.rejected == 1 and cache.build(SPEC, BAKED).image
    cache = make()
    with monkeypatch.context() as m:
        m.setattr(ptx_store, "_distrust", fail)
        assert cache.store.read(make.__name__) is None  # no such file: a miss, not a fault
        assert cache.counts.rejected == 0
        assert cache.build(SPEC, BAKED).image
    assert (cache.counts.compiled, cache.counts.rejected) == (1, 1)


def refused(cache, folder: Path, why: str) -> bool:
    """Whether the folder is not used, that is counted and said, and a private one that ends with the process is."""
    assert cache.build(SPEC, BAKED).image and cache.counts.compiled == 1
    info = os.stat(cache.store.path)
    assert stat.S_IMODE(info.st_mode) == 0o700 and info.st_uid == os.geteuid()
    assert cache.counts.rejected == 1 and len(cache.counts.warnings) == 1
    assert why in cache.counts.warnings[0] and str(folder) in cache.counts.warnings[0]
    return cache.store.path != folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777, 0o720, 0o702], ids=oct)
def test_F9_a_folder_that_others_may_write(make, tmp_path, mode):
    """What an attacker planted there is not even read."""
    entry = make().build(SPEC, BAKED)
    planted = Entry(entry.key, entry.meta, b"planted")
    (tmp_path / "cache" / file_name(entry.key)).write_bytes(planted.encode())
    assert make().build(SPEC, BAKED) == planted  # the folder is what is trusted, not the file
    (tmp_path / "cache").chmod(mode)
    cache = make()
    assert refused(cache, tmp_path / "cache", "others may write in it")
    assert cache.build(SPEC, BAKED).image == entry.image


def test_F9_a_folder_that_is_a_link(make, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert refused(make(), tmp_path / "cache", "it is a link") and list((tmp_path / "elsewhere").iterdir()) == []


def test_F9_a_folder_whose_owner_is_not_the_one_who_runs(make, tmp_path, monkeypatch):
    make().build(SPEC, BAKED)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    cache = make()
    assert cache.store.path is None and f"it belongs to user {user}" in cache.counts.warnings[0]
    assert cache.build(SPEC, BAKED).image and cache.counts.compiled == 1


@ROOT_ONLY
def test_F9_a_folder_of_another_user(make, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 65534, 65534)
    assert refused(make(), tmp_path / "cache", "it belongs to user 65534")


@ROOT_ONLY
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666], ids=oct)
def test_F9_an_entry_of_another_user_in_our_folder(make, tmp_path, mode):
    path = tmp_path / "cache" / file_name(make().build(SPEC, BAKED).key)
    os.chown(path, 65534, 65534)
    path.chmod(mode)
    cache = make()
    cache.build(SPEC, BAKED)
    assert (cache.counts.compiled, cache.counts.rejected) == (1, 1) and "user 65534" in cache.counts.warnings[0]
    assert path.stat().st_uid == os.geteuid()


@ROOT_ONLY
def test_F10_as_a_user_who_may_neither_read_the_entry_nor_write_the_folder(make, tmp_path):
    make().build(SPEC, BAKED)
    os.chown(tmp_path / "cache", 65534, 65534)
    (tmp_path / "cache").chmod(0o500)  # the entry in it is root's, mode 0600
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            cache = make()
            good = cache.store.path == tmp_path / "cache" and bool(cache.build(SPEC, BAKED).image)
            counts = cache.counts
            good &= (counts.compiled, counts.rejected, len(counts.warnings)) == (1, 1, 2)
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_F11_a_compile_error_or_no_compiler_is_not_masked_and_stores_nothing(make, tmp_path, monkeypatch):
    good = make().build(SPEC, BAKED)
    write_kernels(tmp_path / "kernels", "syntax error K_EPS K_N K_FLOATX\n")
    with pytest.raises(KernelCompileError, match="small-EPS=f358637bd"):
        make().build(SPEC, BAKED)
    write_kernels(tmp_path / "kernels")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [file_name(good.key)]

    def none():
        raise UnavailableError("NVRTC", "libnvrtc.so.12", "none", "install it")

    monkeypatch.setattr(ptx_cache, "toolchain", none)
    with pytest.raises(UnavailableError, match="NVRTC"):
        make().build(SPEC, BAKED)


def test_warnings_go_to_the_callback_once_and_by_threads_too(make, tmp_path):
    path = tmp_path / "cache" / file_name(make().build(SPEC, BAKED).key)
    path.write_bytes(b"")
    said = []
    cache = make(warn=said.append)
    cache.warm([(SPEC, BAKED), (OTHER, BAKED)])
    cache.warn(said[0])
    assert len(said) == 1 and cache.counts.warnings == said and cache.counts.rejected == 1
