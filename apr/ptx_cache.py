"""The kernel cache: sources compiled once, kept on disk, and never served for anything but what they were made from.

One dictionary of baked values makes both the #define lines and the key, so nothing can reach the compiler without
reaching the key. Our headers are expanded into the text, CUDA's are not used, so the text is all that is compiled.

    key    rmsnorm-BLOCK=128-C=896-EPS=f358637bd-FLOATX=bf16-sm_90a-<SHA-256>
    SHA-256 over schema, readable part, expanded source, options, NVRTC's version and library, CuPy's version

CuPy's own cache of sources is not used: its key leaves out headers, its hash is not bound to the key, and it flushes
denormals whatever it is told (docs/numerics.md). What is loaded is a RawModule of the verified bytes.
"""

import hashlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apr import driver, paths
from apr.errors import KernelCacheFrozen, KernelCompileError, KernelError, KernelParamError
from apr.kernel import Baked, Kernel, KernelSpec, spell
from apr.ptx_store import Entry, PtxStore

SCHEMA = 1
# Every option that changes code is here and in the key. No fast math: the truth is NumPy's.
OPTIONS = ("--std=c++17", "--ftz=false", "--fmad=true", "--prec-div=true", "--prec-sqrt=true", "--ptxas-options=-v")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.M)
FOREIGN = re.compile(r"^[ \t]*#[ \t]*include[ \t]+<([^>]+)>", re.M)
BAKED_NAME = re.compile(r"\bK_([A-Z0-9_]+)\b")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
USAGE = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                   r"(\d+) bytes spill loads.*?Used (\d+) registers(?:, used \d+ barriers)?(?:, (\d+) bytes smem)?",
                   re.S)


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture that a device's code is compiled for: sm_90a on Hopper, where wgmma needs the a."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


@dataclass
class Counts:
    """What the cache did: entries found on disk, compiled, rejected (damaged or foreign); warnings printed."""

    hits: int = 0
    compiled: int = 0
    rejected: int = 0
    warnings: list[str] = field(default_factory=list)


def expand(name: str, folder: Path, seen: tuple[str, ...] = ()) -> str:
    """The source with every #include "…" replaced by that file's text, once each.

    Raises KernelCompileError for a header that is missing or outside the folder, and for #include <…>: nothing that the
    key does not see may reach the compiler.
    """
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise KernelCompileError(f"kernels/{name}", "a file of the kernels folder", "nothing there", "correct the name")
    text = path.read_text(encoding="utf-8")
    if foreign := FOREIGN.search(text):
        raise KernelCompileError(f"kernels/{name}", "only our own headers, which the key covers",
                                 f"#include <{foreign[1]}>", "write what is needed into common.cuh")
    done = [*seen, name]

    def insert(match: re.Match[str]) -> str:
        if match[1] in done:
            return ""
        done.append(match[1])
        return expand(match[1], folder, tuple(done))

    return INCLUDE.sub(insert, text)


def audit(name: str, text: str, baked: Iterable[str]) -> None:
    """Demand that the K_ names of an expanded source are exactly the declared ones. Raises KernelParamError."""
    used, declared = set(BAKED_NAME.findall(COMMENT.sub("", text))), set(baked)
    if used != declared:
        raise KernelParamError(f"kernels/{name}", "exactly the declared K_ names",
                               f"undeclared {sorted(used - declared)}, unused {sorted(declared - used)}",
                               "declare in the spec what the source uses, and no more")


def readable(source: str, baked: Baked, arch: str) -> str:
    """The part of a key that people read: stem, baked values sorted by name, architecture."""
    values = [f"{name}={spell(name, baked[name])[0]}" for name in sorted(baked)]
    return "-".join([Path(source).stem, *values, arch])


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a module: what is hashed and what is compiled are the same record."""

    label: str
    text: str
    arch: str
    options: tuple[str, ...]
    compiler: str  # NVRTC's version and library
    cupy: str

    @property
    def key(self) -> str:
        """The label and the SHA-256 of everything."""
        parts = json.dumps([SCHEMA, self.label, self.text, self.arch, self.options, self.compiler, self.cupy])
        return f"{self.label}-{hashlib.sha256(parts.encode()).hexdigest()}"

    def manifest(self) -> dict[str, Any]:
        """What the key was made of, with the source as its hash: two of these explain why two keys differ."""
        return {"schema": SCHEMA, "label": self.label, "arch": self.arch, "options": list(self.options),
                "compiler": self.compiler, "cupy": self.cupy,
                "source_sha256": hashlib.sha256(self.text.encode()).hexdigest()}


def compile_text(text: str, where: str, arch: str, options: tuple[str, ...]) -> tuple[bytes, dict[str, Any]]:
    """The cubin (arch sm_…) or PTX (compute_…) of a source, and per entry registers, stack, spills, shared bytes.

    Needs NVRTC, but neither GPU nor driver. Raises KernelCompileError with the compiler's first message and its line;
    a warning is an error too.
    """
    nvrtc = driver.import_cupy().cuda.nvrtc
    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    failed = None
    try:
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={arch}", *options))
        except nvrtc.NVRTCError as e:
            failed = str(e)
        log = nvrtc.getProgramLog(program)
        complaint = re.search(r"kernel\.cu\((\d+)\): (?:error|warning)[^\n]*", log)
        if failed or complaint or "warning" in log.lower():
            line = text.splitlines()[int(complaint[1]) - 1].strip() if complaint else ""
            raise KernelCompileError(where, f"a source that compiles for {arch} without a warning",
                                     (complaint[0] if complaint else log[-400:] or failed or "") + f" at '{line}'",
                                     "correct the source, or install an NVRTC that knows this architecture")
        image = nvrtc.getCUBIN(program) if arch.startswith("sm_") else nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    usage = {m[1]: {"stack": int(m[2]), "spill_stores": int(m[3]), "spill_loads": int(m[4]), "registers": int(m[5]),
                    "shared": int(m[6] or 0)} for m in USAGE.finditer(log)}
    return image, usage


class PtxCache:
    """Kernels by spec and baked values, for one architecture; in memory, then on disk, then by compiling.

    `folder` None means the user's cache folder (APR_CACHE_DIR). Without a GPU everything but `get` works.
    """

    def __init__(self, arch: str, folder: Path | None = None, kernels: Path | None = None,
                 warn: Callable[[str], None] | None = None) -> None:
        self.arch, self.kernels = arch, kernels or paths.kernels_dir()
        self.counts, self.frozen, self.lock = Counts(), False, threading.Lock()
        self.warn_to = warn
        self.store = PtxStore(folder if folder is not None else paths.cache_dir(), self.warn, self._rejected)
        self.texts: dict[str, str] = {}
        self.modules: dict[str, tuple[str, Any]] = {}  # by label: (key, module)
        self.made: dict[tuple[str, str], Kernel] = {}  # by (label, entry)
        self.toolchain: tuple[str, str] | None = None
        self.images: tempfile.TemporaryDirectory[str] | None = None

    def warn(self, text: str) -> None:
        """Say something once."""
        with self.lock:
            if text in self.counts.warnings:
                return
            self.counts.warnings.append(text)
        if self.warn_to is not None:
            self.warn_to(text)

    def _rejected(self) -> None:
        with self.lock:
            self.counts.rejected += 1

    def recipe(self, spec: KernelSpec, baked: Baked) -> Recipe:
        """What would be compiled. Raises KernelParamError for names that differ from the spec's or the source's."""
        spec.check_baked(baked)
        if spec.source not in self.texts:
            text = expand(spec.source, self.kernels)
            audit(spec.source, text, spec.baked)
            self.texts[spec.source] = text
        if self.toolchain is None:
            cupy = driver.import_cupy()
            major, minor = cupy.cuda.nvrtc.getVersion()
            library = Path(driver.loaded_libraries().get("libnvrtc", "unknown"))
            size = library.stat().st_size if library.is_file() else 0
            self.toolchain = f"NVRTC {major}.{minor}, {size} bytes", cupy.__version__
        defines = "".join(f"#define K_{name} {spell(name, baked[name])[1]}\n" for name in sorted(baked))
        return Recipe(readable(spec.source, baked, self.arch), defines + self.texts[spec.source], self.arch, OPTIONS,
                      *self.toolchain)

    def build(self, spec: KernelSpec, baked: Baked) -> Entry:
        """The compiled module of a spec: from disk if it is there and sound, else compiled and put there.

        Raises KernelCacheFrozen for a compile after freeze().
        """
        recipe = self.recipe(spec, baked)
        entry = self.store.read(recipe.key)
        if entry is not None:
            with self.lock:
                self.counts.hits += 1
            return entry
        if self.frozen:
            raise KernelCacheFrozen(recipe.key, "a kernel of the warm-up", "a new one",
                                    "add its variant to the registry")
        start = time.perf_counter()
        image, usage = compile_text(recipe.text, recipe.key, recipe.arch, recipe.options)
        meta = {**recipe.manifest(), "entries": usage, "milliseconds": round(1000 * (time.perf_counter() - start), 1)}
        entry = Entry(recipe.key, meta, image)
        with self.lock:
            self.counts.compiled += 1
        self.store.write(entry)
        return entry

    def warm(self, variants: Iterable[tuple[KernelSpec, Baked]], threads: int = 8) -> None:
        """Make sure that every variant is compiled, several at a time; a frozen cache thaws. Raises the first error."""
        self.frozen = False
        todo = {readable(s.source, b, self.arch): (s, b) for s, b in variants}
        for spec, baked in todo.values():
            self.recipe(spec, baked)  # refuses wrong names before any thread starts
        with ThreadPoolExecutor(threads) as pool:
            for entry in [pool.submit(self.build, s, b) for s, b in todo.values()]:
                self.memory(entry.result())

    def memory(self, entry: Entry) -> None:
        """Keep an entry for `get`, so that it is read from disk once."""
        self.modules.setdefault(entry.meta["label"], (entry.key, entry))

    def get(self, spec: KernelSpec, baked: Baked) -> Kernel:
        """The loaded kernel. Raises KernelParamError, KernelCompileError, KernelCacheFrozen, KernelError."""
        label = readable(spec.source, baked, self.arch)
        kernel = self.made.get((label, spec.entry))
        if kernel is None or kernel.spec != spec:
            kernel = self.made[label, spec.entry] = self._load(spec, baked, label)
        return kernel

    def freeze(self) -> None:
        """From here on a kernel that is not compiled yet is an error: a step must not compile."""
        self.frozen = True

    def _load(self, spec: KernelSpec, baked: Baked, label: str) -> Kernel:
        spec.check_baked(baked)
        if label not in self.modules:
            if self.frozen:
                raise KernelCacheFrozen(label, "a kernel of the warm-up", "a new one",
                                        "add its variant to the registry")
            self.memory(self.build(spec, baked))
        key, module = self.modules[label]
        if isinstance(module, Entry):
            module = self._module(module, spec, baked)
            self.modules[label] = key, module
        try:
            function = module.get_function(spec.entry).kernel.ptr
        except Exception as e:
            raise KernelError(key, f"an entry named {spec.entry}", str(e), "correct the spec or the source") from None
        return Kernel(spec, str(baked["FLOATX"]), function, f"{spec.entry} of {key}", module)

    def _module(self, entry: Entry, spec: KernelSpec, baked: Baked) -> Any:
        """The loaded module. An image that the driver refuses is thrown away and built again, once."""
        try:
            return self._raw_module(entry.image)
        except Exception:
            self.store.discard(entry.key)
            self._rejected()
            self.warn(f"kernel cache: {entry.key} does not load and is built again")
        recipe = self.recipe(spec, baked)
        image, _ = compile_text(recipe.text, recipe.key, recipe.arch, recipe.options)
        try:
            module = self._raw_module(image)
        except Exception as e:
            raise KernelError(entry.key, "a module that the driver loads", f"{e}: {driver.load_log(image)}",
                              "update the driver, or install the CUDA extra that fits it") from None
        self.store.write(Entry(entry.key, entry.meta, image))
        return module

    def _raw_module(self, image: bytes) -> Any:
        """A RawModule of exactly these bytes.

        CuPy remembers modules by path, so a path that were used twice would serve the first one's code: the path is the
        hash of the bytes, in a folder of this process alone.
        """
        if self.images is None:
            self.images = tempfile.TemporaryDirectory(prefix="apr-kernels-")
        path = Path(self.images.name) / f"{hashlib.sha256(image).hexdigest()}.cubin"
        path.write_bytes(image)
        module = driver.import_cupy().RawModule(path=str(path))
        module.compile()
        return module
