"""The kernel cache: sources compiled once, kept on disk, and never served for anything but what they were made from.

One dictionary of baked values makes both the #define lines and the key, so nothing can reach the compiler without
reaching the key. Our headers are expanded into the text, CUDA's are not used, so the text is all that is compiled.

    key    rmsnorm-BLOCK=128-C=896-EPS=f358637bd-FLOATX=bf16-sm_90a-<SHA-256>
    SHA-256 over schema, readable part, expanded source, arch, options, NVRTC's build, CuPy's version

CuPy's own cache of sources is not used: its key leaves out headers, its hash is not bound to the key, and it flushes
denormals whatever it is told (docs/numerics.md). What is loaded is a RawModule of the verified bytes.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apr import driver, paths
from apr.errors import AprError, KernelCacheFrozen, KernelCompileError, KernelError, KernelParamError, UnavailableError
from apr.files import PrivateFolder
from apr.kernel import Baked, Kernel, KernelSpec, spell
from apr.ptx_store import Entry, PtxStore

SCHEMA = 1
# Every option that changes code is here and in the key. No fast math: the truth is NumPy's.
OPTIONS = ("--std=c++17", "--ftz=false", "--fmad=true", "--prec-div=true", "--prec-sqrt=true", "--ptxas-options=-v")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.M)
SPLICE = re.compile(r"\\[ \t]*\n")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
BAKED_NAME = re.compile(r"\bK_(\w+)")
# What would bring in bytes that the key does not see, or a value of its own for a baked name.
UNSEEN = re.compile(r"^[ \t]*(?:#|%:)[ \t]*(?:include|import|embed)[^\n]*|__has_include\w*|__DATE__|__TIME__"
                    r"|__TIMESTAMP__|^[ \t]*(?:#|%:)[ \t]*(?:define|undef)[ \t]+K_\w+", re.M)
PROLOGUE = re.compile(r"\A(#define K_[^\n]*\n)*")
BUILD = re.compile(r"Compiler Build ID: (\S+).*? V([\d.]+)", re.S)
USAGE = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                   r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?", re.S)


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


def expand(name: str, folder: Path, done: set[str] | None = None) -> str:
    """The source with every #include "…" replaced by that file's text, once each.

    Raises KernelCompileError for a header that is missing or outside the folder.
    """
    path, done = folder / name, done if done is not None else set()
    if Path(name).name != name or not path.is_file():
        raise KernelCompileError(f"kernels/{name}", "a file of the kernels folder", "nothing there", "correct the name")
    done.add(name)

    def insert(match: re.Match[str]) -> str:
        return "" if match[1] in done else expand(match[1], folder, done)

    return INCLUDE.sub(insert, path.read_text(encoding="utf-8"))


def baked_names(name: str, text: str) -> frozenset[str]:
    """The K_ names that an expanded source uses, without their K_.

    Raises KernelCompileError for a source that would see more than the key does: #include <…>, an #include that
    `expand` could not read, the date; or that defines a baked name itself.
    """
    code = COMMENT.sub(" ", SPLICE.sub("", text))
    if found := UNSEEN.search(code):
        raise KernelCompileError(f"kernels/{name}", "our own headers and the baked values alone, which the key covers",
                                 found[0].strip(), 'write what is needed into common.cuh, and bake what varies')
    return frozenset(BAKED_NAME.findall(code))


def audit(name: str, used: frozenset[str], baked: Iterable[str]) -> None:
    """Demand that the K_ names of a source are exactly the declared ones. Raises KernelParamError."""
    declared = set(baked)
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
    compiler: str  # NVRTC's version and build
    cupy: str

    @property
    def key(self) -> str:
        """The label and the SHA-256 of everything."""
        parts = json.dumps([SCHEMA, self.label, self.text, self.arch, self.options, self.compiler, self.cupy])
        return f"{self.label}-{hashlib.sha256(parts.encode()).hexdigest()}"

    def manifest(self) -> dict[str, Any]:
        """What the key was made of, with the source, less the baked values that the label has, as its hash: two of
        these explain why two keys differ.
        """
        source = PROLOGUE.sub("", self.text)
        return {"schema": SCHEMA, "label": self.label, "arch": self.arch, "options": list(self.options),
                "compiler": self.compiler, "cupy": self.cupy,
                "source_sha256": hashlib.sha256(source.encode()).hexdigest()}


def compile_text(text: str, where: str, arch: str, options: tuple[str, ...]) -> tuple[bytes, dict[str, Any]]:
    """The cubin (arch sm_…) or PTX (compute_…) of a source, and per entry registers, stack, spills, shared bytes.

    Needs NVRTC, but neither GPU nor driver. Raises KernelCompileError with the compiler's first message and its line;
    a warning is an error too. Raises UnavailableError for an architecture that this NVRTC is too old, or new, for.
    """
    nvrtc = driver.import_cupy().cuda.nvrtc
    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    failed, image = "", b""
    try:
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={arch}", *options))
            image = nvrtc.getCUBIN(program) if arch.startswith("sm_") else nvrtc.getPTX(program)
        except nvrtc.NVRTCError as e:
            failed = str(e)
        log = nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    if "invalid value for --gpu-architecture" in log:
        raise UnavailableError("NVRTC " + ".".join(map(str, nvrtc.getVersion())), f"a compiler that knows {arch}",
                               "one that does not", "install the CUDA extra that fits this GPU; see 'apr doctor'")
    complaint = re.search(r"kernel\.cu\((\d+)\): (?:error|warning)[^\n]*", log)
    if failed or complaint or "warning" in log.lower() or not image:
        lines = ["", *text.split("\n")]
        line = lines[int(complaint[1])].strip() if complaint and int(complaint[1]) < len(lines) else ""
        found = f"{complaint[0]} at '{line}'" if complaint else log.strip()[-400:] or failed or "no code"
        raise KernelCompileError(where, f"a source that compiles for {arch} without a warning", found,
                                 "correct the source, or install an NVRTC that knows this architecture")
    usage = {m[1]: {"stack": int(m[2]), "spill_stores": int(m[3]), "spill_loads": int(m[4]), "registers": int(m[5]),
                    "shared": int(m[6] or 0)} for m in USAGE.finditer(log)}
    return image, usage


def toolchain() -> tuple[str, str]:
    """What compiles: NVRTC's version and build, as it says of itself in what it compiles, and CuPy's version."""
    cupy = driver.import_cupy()
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram("", "nothing.cu", (), ())
    try:
        nvrtc.compileProgram(program, ())
        build = BUILD.search(bytes(nvrtc.getPTX(program)).decode())
    finally:
        nvrtc.destroyProgram(program)
    version = ".".join(map(str, nvrtc.getVersion()))
    return f"NVRTC {build[2]} {build[1]}" if build else f"NVRTC {version}", str(cupy.__version__)


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
        self.loading = threading.RLock()  # one thread at a time loads what `get` has not got
        self.texts: dict[str, tuple[str, frozenset[str]]] = {}  # by source: expanded, and the K_ names in it
        self.entries: dict[str, Entry] = {}  # by label, read or compiled once
        self.modules: dict[str, Any] = {}  # by label
        self.made: dict[str, Kernel] = {}  # by source, entry and baked values as they were given
        self.fresh: set[str] = set()  # keys that were compiled here
        self.toolchain: tuple[str, str] | None = None
        self.images: PrivateFolder | None = None

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
            self.texts[spec.source] = text, baked_names(spec.source, text)
        text, used = self.texts[spec.source]
        audit(spec.source, used, spec.baked)
        if self.toolchain is None:
            self.toolchain = toolchain()
        defines = "".join(f"#define K_{name} {spell(name, baked[name])[1]}\n" for name in sorted(baked))
        return Recipe(readable(spec.source, baked, self.arch), defines + text, self.arch, OPTIONS, *self.toolchain)

    def build(self, spec: KernelSpec, baked: Baked) -> Entry:
        """The compiled module of a spec: from disk if it is there and sound, else compiled and put there.

        Raises KernelCacheFrozen for a compile after freeze().
        """
        recipe = self.recipe(spec, baked)
        entry = self.store.read(recipe.key)
        if entry is not None and any(entry.meta.get(name) != value for name, value in recipe.manifest().items()):
            self.store.refuse(recipe.key, "it says that it was made of something else")
            entry = None
        if entry is not None:
            with self.lock:
                self.counts.hits += 1
            return entry
        if self.frozen:
            raise KernelCacheFrozen(recipe.key, "a kernel of the warm-up", "a new one",
                                    "add its variant to the registry")
        return self._compile(recipe)

    def _compile(self, recipe: Recipe) -> Entry:
        start = time.perf_counter()
        image, usage = compile_text(recipe.text, recipe.key, recipe.arch, recipe.options)
        meta = {**recipe.manifest(), "entries": usage, "milliseconds": round(1000 * (time.perf_counter() - start), 1)}
        entry = Entry(recipe.key, meta, image)
        with self.lock:
            self.counts.compiled += 1
            self.fresh.add(recipe.key)
        self.store.write(entry)
        return entry

    def warm(self, variants: Iterable[tuple[KernelSpec, Baked]], threads: int = 8) -> list[Entry]:
        """Make sure that every variant is compiled, several at a time; a frozen cache thaws. Raises the first error."""
        self.frozen = False
        todo = {self.recipe(s, b).label: (s, b) for s, b in variants}  # refuses wrong names before any thread starts
        with ThreadPoolExecutor(threads) as pool:
            jobs = {label: pool.submit(self.build, s, b) for label, (s, b) in todo.items() if label not in self.entries}
        for label, job in jobs.items():
            self.entries[label] = job.result()
        return [self.entries[label] for label in todo]

    def get(self, spec: KernelSpec, baked: Baked) -> Kernel:
        """The loaded kernel. Raises KernelParamError, KernelCompileError, KernelCacheFrozen, KernelError."""
        name = f"{spec.source} {spec.entry} {baked!r}"  # tells 1 from 1.0 and True, as the key does, and takes 2 us
        kernel = self.made.get(name)
        if kernel is None or kernel.spec != spec:
            with self.loading:
                kernel = self.made[name] = self._load(spec, baked)
        return kernel

    def freeze(self) -> None:
        """From here on a kernel that is not compiled yet is an error: a step must not compile."""
        self.frozen = True

    def _load(self, spec: KernelSpec, baked: Baked) -> Kernel:
        """The kernel, loaded. An image that the driver refuses is thrown away and built again, once."""
        recipe = self.recipe(spec, baked)
        if recipe.label not in self.entries:
            if self.frozen:
                raise KernelCacheFrozen(recipe.key, "a kernel of the warm-up", "a new one",
                                        "add its variant to the registry")
            self.entries[recipe.label] = self.build(spec, baked)
        problem = self._open(recipe, spec.entry)
        if problem and recipe.key not in self.fresh:
            self.store.discard(recipe.key)
            self.store.refuse(recipe.key, f"it does not load: {problem}")
            self.entries[recipe.label] = self._compile(recipe)
            problem = self._open(recipe, spec.entry)
        if problem:
            log = driver.load_log(self.entries[recipe.label].image)
            raise KernelError(f"{spec.entry} of {recipe.key}", "a kernel that the driver loads", f"{problem}; {log}",
                              "correct the spec's entry or the source, or update the driver")
        module = self.modules[recipe.label]
        return Kernel(spec, str(baked["FLOATX"]), module.get_function(spec.entry).kernel.ptr,
                      f"{spec.entry} of {recipe.key}", module)

    def _open(self, recipe: Recipe, entry: str) -> str:
        """Load the label's module, unless it is loaded, and look for an entry; what went wrong, or ''.

        Raises what is no fault of the image: DeviceFault, OutOfMemoryError.
        """
        try:
            if recipe.label not in self.modules:
                self.modules[recipe.label] = self._raw_module(self.entries[recipe.label].image)
            self.modules[recipe.label].get_function(entry).kernel.ptr  # noqa: B018
        except (OSError, AprError):
            raise
        except Exception as e:
            self.modules.pop(recipe.label, None)
            code = int(getattr(e, "status", 0))
            if driver.is_sticky(code) or code == driver.OUT_OF_MEMORY:
                driver.check(code, f"loading {recipe.key}")
            return str(e)
        return ""

    def _raw_module(self, image: bytes) -> Any:
        """A RawModule of exactly these bytes.

        CuPy remembers modules by path, so a path that were used twice would serve the first one's code: the path is the
        hash of the bytes, in a folder of this process alone.
        """
        name = f"{hashlib.sha256(image).hexdigest()}.cubin"
        try:
            path = self._images(None) / name
            path.write_bytes(image)
        except OSError:  # /tmp is full, or was cleaned under a long run
            self.images = None
            path = self._images("/dev/shm") / name
            path.write_bytes(image)
        module = driver.import_cupy().RawModule(path=str(path))
        module.compile()
        return module

    def _images(self, parent: str | None) -> Path:
        if self.images is None:
            self.images = PrivateFolder(prefix="apr-kernels-", dir=parent)
        return Path(self.images.name)
