"""The kernel cache on disk against the faults of table F: never a wrong kernel or an error, always counted.

F1 to F7, the entries; F8 to F12, the folder, the disk and the driver, are in test_ptx_folder.py.
"""

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from small_kernels import BAKED, SOURCE, SPEC, small_cache, use_fake_compiler, write_kernels

from apr.ptx_store import MAX_BYTES, SUFFIX, Entry, PtxStore, decode, file_name

TESTS = Path(__file__).parents[1]
OTHER_EPS = BAKED | {"EPS": 1e-5}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A new cache over the same folder, with a compiler that needs no NVRTC."""
    use_fake_compiler(monkeypatch)
    return lambda arch="sm_90a": small_cache(tmp_path / "cache", tmp_path / "kernels", arch)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def one_file(make, tmp_path, baked=BAKED) -> tuple[Path, bytes]:
    """The file of an entry, made, and its bytes."""
    path = tmp_path / "cache" / file_name(make().build(SPEC, baked).key)
    return path, path.read_bytes()


def demand_rebuilt(make, path: Path, why: str = "") -> None:
    """What is at `path` is not believed: counted, said once, built again to the right code; then it is sound."""
    cache = make()
    entry = cache.build(SPEC, BAKED)
    assert (cache.counts.hits, cache.counts.compiled, cache.counts.rejected) == (0, 1, 1)
    said = [w for w in cache.counts.warnings if "is not used" in w]
    assert len(said) == 1 and entry.key in said[0] and why in said[0] and said[0].isprintable()
    cache.build(SPEC, BAKED)
    assert cache.counts.warnings.count(said[0]) == 1
    fresh = make()
    assert fresh.build(SPEC, BAKED) == entry and fresh.counts.hits == 1 and path.stat().st_mode & 0o777 == 0o600


def test_a_second_process_finds_what_the_first_made(make, tmp_path):
    path, data = one_file(make, tmp_path)
    cache = make()
    entry = cache.build(SPEC, BAKED)
    assert (cache.counts.hits, cache.counts.compiled, cache.counts.rejected) == (1, 0, 0)
    assert entry.encode() == data and decode(data) == entry and files(tmp_path / "cache") == [path]
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


COLD = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from small_kernels import *
    import apr.ptx_cache
    apr.ptx_cache.compile_text, apr.ptx_cache.toolchain = fake_compile, fake_toolchain
    folder = Path(sys.argv[1])
    os.umask(0)  # nobody but us may write what is made all the same
    cache = small_cache(folder / "new" / "cache", folder / "kernels")
    print(flush=True)
    sys.stdin.readline()  # all start at once
    made = cache.warm([(SPEC, BAKED | {"N": n}) for n in range(20)])
    print(hash(tuple(e.image for e in made)), cache.counts.rejected, len(cache.counts.warnings))
    """)


def processes_cold_on_one_cache(tmp_path, count, meanwhile=lambda: None):
    """So many processes that start at once with 20 kernels, `meanwhile` again and again until all have ended."""
    write_kernels(tmp_path / "kernels")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))), "PYTHONHASHSEED": "0"}
    running = [subprocess.Popen([sys.executable, "-c", COLD, str(tmp_path)], env=env, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    while any(process.poll() is None for process in running):
        meanwhile()
    ends = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0] * count and [e for _, e in ends] == [""] * count
    assert len({out for out, _ in ends}) == 1 and ends[0][0].split()[1:] == ["0", "0"]
    found = files(tmp_path / "new" / "cache")
    assert all(p.name.endswith(SUFFIX) and isinstance(decode(p.read_bytes()), Entry) for p in found)
    return len(found)


def test_F1_sixteen_processes_cold_on_one_cache(tmp_path):
    assert processes_cold_on_one_cache(tmp_path, 16, lambda: time.sleep(0.01)) == 20


@pytest.mark.parametrize("count", [4, pytest.param(64, marks=pytest.mark.long)])
def test_F1_processes_cold_on_one_cache_that_another_empties(tmp_path, count):
    said, removed = [], [0, 0]
    store = PtxStore(tmp_path / "new" / "cache", said.append, lambda: None)

    def empty():
        removed[0] += len([store.discard(e.key) for _, e in store.entries() if isinstance(e, Entry)])
        removed[1] += store.sweep(60)
    assert processes_cold_on_one_cache(tmp_path, count, empty) <= 20 and removed[0] > 20 and not said


def test_F1_threads_of_one_process(make):
    cache, entries = make(), []
    threads = [threading.Thread(target=lambda: entries.append(cache.build(SPEC, BAKED))) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({e.image for e in entries}) == 1 and len(entries) == 16 and cache.counts.rejected == 0


def test_F2_a_writer_that_is_killed_leaves_only_what_clear_and_sweep_remove(make, tmp_path):
    one_file(make, tmp_path)
    child = os.fork()
    if child == 0:  # dies between the last byte and the publishing
        os.replace = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        make().build(SPEC, OTHER_EPS)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    cache = make()
    (leftover,) = cache.store.leftovers()
    assert len(cache.store.files()) == 1 and cache.store.sweep(3600) == 0  # it may be someone's who is at work
    cache.build(SPEC, OTHER_EPS)
    assert (cache.counts.compiled, cache.counts.rejected, cache.counts.warnings) == (1, 0, [])
    os.utime(tmp_path / "cache" / leftover, (1, 1))
    assert cache.store.sweep(3600) == 1 and cache.store.leftovers() == [] and len(cache.store.files()) == 2
    (tmp_path / "cache" / ".1-2.tmp").touch()
    assert cache.store.clear() == (2, 1) and files(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", [
    lambda d: b"", lambda d: d[:8], lambda d: d[:47], lambda d: d[:len(d) // 2], lambda d: d[:-1], lambda d: d[:-33],
    lambda d: d[-32:], lambda d: d + b"\0", lambda d: bytes(len(d)), lambda d: b"X" + d[1:], lambda d: d[1:],
    lambda d: b"\x7fELF" + d], ids=lambda f: "")
def test_F3_truncated_empty_and_foreign_files(make, tmp_path, damage):
    path, data = one_file(make, tmp_path)
    path.write_bytes(damage(data))
    demand_rebuilt(make, path)


def test_F3_every_truncation_and_every_flipped_bit_is_seen(make, tmp_path):
    _, data = one_file(make, tmp_path)
    assert isinstance(decode(data), Entry)
    for end in range(len(data)):
        assert isinstance(decode(data[:end]), str), end
    for at in range(len(data)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[at] ^= bit
            assert isinstance(decode(bytes(changed)), str), at


@pytest.mark.parametrize(("key", "meta", "image"), [
    (5, {}, b"x"), ("k", [], b"x"), ("k", "text", b"x"), ("k", {}, b""), (None, {}, b"x")], ids=str)
def test_F3_a_header_of_the_wrong_kind_with_a_right_checksum(key, meta, image):
    assert isinstance(decode(Entry("k", {}, b"x").encode()), Entry)
    assert "damaged" in decode(Entry(key, meta, image).encode())


@pytest.mark.parametrize("kind", ["directory", "full directory", "FIFO", "link", "dangling link", "socket", "huge",
                                  "writable"])
def test_F3_what_is_no_private_regular_file_is_not_read(make, tmp_path, kind):
    path, data = one_file(make, tmp_path)
    path.unlink()
    if "directory" in kind:
        path.mkdir()
        if kind == "full directory":
            (path / "x").mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif "link" in kind:
        if kind == "link":
            (tmp_path / "real").write_bytes(data)
        path.symlink_to(tmp_path / "real")
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # the path is too long for a socket's name
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(f"/proc/self/fd/{here}/s")
        os.close(here)
        (path.parent / "s").rename(path)
    elif kind == "huge":
        with path.open("wb") as f:
            f.truncate(MAX_BYTES + 1)
        path.chmod(0o600)
    else:
        path.write_bytes(data)
        path.chmod(0o660)
    if "directory" not in kind:
        demand_rebuilt(make, path)
        return
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):  # it cannot be replaced, so each process compiles
        cache = make()
        assert cache.build(SPEC, BAKED).image == decode(data).image
        assert (cache.counts.compiled, cache.counts.rejected) == (1, 1) and len(cache.counts.warnings) == 2
        assert [str(e) for _, e in cache.store.entries()] == ["it is no regular file"]
        del cache
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before and files(path.parent) == [path]


def test_F4_two_valid_entries_swapped_are_both_rejected(make, tmp_path):
    a, _ = one_file(make, tmp_path)
    b, _ = one_file(make, tmp_path, OTHER_EPS)
    images = [make().build(SPEC, baked).image for baked in (BAKED, OTHER_EPS)]
    assert images[0] != images[1]
    a.rename(tmp_path / "aside")
    b.rename(a)
    (tmp_path / "aside").rename(b)
    cache = make()
    assert [problem.split()[0] for _, problem in cache.store.entries()] == ["it", "it"]
    assert [cache.build(SPEC, baked).image for baked in (BAKED, OTHER_EPS)] == images
    assert (cache.counts.rejected, cache.counts.compiled) == (2, 2)
    assert all("it holds small-EPS=" in w for w in cache.counts.warnings)
    assert make().build(SPEC, BAKED).image == images[0]


@pytest.mark.parametrize("field", ["label", "source_sha256", "arch", "compiler"])
def test_F4_an_entry_that_says_it_was_made_of_something_else(make, tmp_path, field):
    path, data = one_file(make, tmp_path)
    entry = decode(data)
    for meta in (entry.meta | {field: "other"}, {k: v for k, v in entry.meta.items() if k != field}):
        path.write_bytes(Entry(entry.key, meta, entry.image).encode())
        demand_rebuilt(make, path, "made of something else")


def test_F5_an_edited_header_or_source_is_compiled_whatever_the_dates_say(make, tmp_path):
    first = make().build(SPEC, BAKED)
    for name, old, new in (("common.cuh", "short", "int  "), ("small.cu", "+=", "-=")):
        path = tmp_path / "kernels" / name
        path.write_text(path.read_text().replace(old, new))  # the same size
        os.utime(path, (1, 1))  # and older than the entry
        cache = make()
        assert cache.build(SPEC, BAKED).image != first.image and cache.counts.compiled == 1
    write_kernels(tmp_path / "kernels", SOURCE)
    cache = make()
    assert cache.build(SPEC, BAKED) == first and cache.counts.hits == 1


def test_F6_models_in_turn_get_their_own_constants(make):
    cache = make()
    images = [cache.build(SPEC, baked).image for baked in (BAKED, OTHER_EPS, BAKED, OTHER_EPS)]
    assert images[:2] == images[2:] and images[0] != images[1]
    assert (cache.counts.compiled, cache.counts.hits) == (2, 2)


def test_F7_architectures_share_a_folder_and_nothing_else(make, tmp_path):
    images = {arch: make(arch).build(SPEC, BAKED).image for arch in ("sm_80", "sm_90", "sm_90a")}
    assert len(set(images.values())) == 3 and len(files(tmp_path / "cache")) == 3
    ninety, eighty = (file_name(make(arch).build(SPEC, BAKED).key) for arch in ("sm_90a", "sm_80"))
    shutil.copy(tmp_path / "cache" / eighty, tmp_path / "cache" / ninety)
    cache = make()
    assert cache.build(SPEC, BAKED).image == images["sm_90a"] and cache.counts.rejected == 1
