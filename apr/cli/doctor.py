"""`apr doctor`: what this machine has of what apr needs, for people or as JSON."""

import argparse
import json
from collections.abc import Iterator

from apr.driver import probe
from apr.errors import UnavailableError, one_line
from apr.tools.doctor import Report, examine, wanted_extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--require", choices=["cuda"], help="exit with 9 unless a GPU can be used")
    parser.add_argument("--extra", action="store_true",
                        help="print only the extra that this machine wants: cuda12, cuda13, or nvrtc without a GPU")


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises UnavailableError after it: for two CuPys at once, and for what --require names."""
    if args.extra:
        print(wanted_extra(probe()))
        return 0
    report = examine()
    if args.json:
        print(json.dumps(report))
    else:
        print(*map(one_line, _lines(report)), sep="\n", flush=True)
    if len(report["cupy"]) > 1:
        raise UnavailableError("CuPy", "one CuPy distribution", " and ".join(report["cupy"]),
                               f"pip uninstall {' '.join(report['cupy'])}, then pip install one: each overwrites the "
                               "other's files")
    if args.require == "cuda" and not report["cuda"]["usable"]:
        raise UnavailableError("--require cuda", "a GPU that can be used",
                               f"{'; '.join(report['cuda']['problems'])} [{report['cuda']['versions']}]",
                               "install what is missing, or work on the CPU")
    return 0


def _row(name: str, text: str) -> str:
    return f"{name:14} {text}"


def _lines(report: Report) -> Iterator[str]:
    yield _row("python", report["python"])
    yield _row("apr", report["apr"] + ("" if report["packages"] else ", not installed as a package: nothing to check"))
    for p in (*report["packages"], *report["optional"]):
        yield _row("package", f"{p['name']} {p['version'] or 'missing'}, wants {p['wants'] or 'any'}"
                              + ("" if p["ok"] else "  <- NOT MET"))
    yield _row("cupy", ", ".join(f"{name} {version}" for name, version in report["cupy"].items()) or "none")
    driver = report["driver"]
    version = f"supports CUDA {driver['driver_version']}" if driver["driver_version"] else ""
    yield _row("driver", "; ".join(filter(None, (version, driver["problem"]))))
    for d in driver["devices"]:
        major, minor = d["capability"]
        yield _row(f"cuda:{d['ordinal']}", f"{d['name']}, compute capability {major}.{minor}, {d['sm_count']} SMs, "
                   f"{d['memory_bytes'] / 2**30:.1f} GiB, {d['shared_bytes']} bytes of shared memory per block")
    for lib in report["libraries"]:
        state = "loaded" if lib["loaded"] else "would be loaded"
        yield _row(lib["name"], f"{lib['version'] or 'of no known version'}, {state}: {lib['path']}" if lib["path"]
                   else "none")
    yield from _compiler_lines(report)
    for name, value in report["environment"].items():
        yield _row("environment", f"{name}={value}")
    cache = report["cache"]
    yield _row("cache", f"{cache['path'] or 'none'}, " + (
        cache["problem"] or f"{'there' if cache['exists'] else 'not made yet'}, mode {cache['mode']}, "
                            f"owner {cache['owner']}, {cache['free_bytes'] / 2**30:.1f} GiB free"))
    yield from (f"you can: {what}" for what in report["can"])
    yield from (f"you cannot: {item['what']}, because {item['why']}" for item in report["cannot"])


def _compiler_lines(report: Report) -> Iterator[str]:
    compiler = report["compiler"]
    if compiler["problem"]:
        yield _row("compiler", compiler["problem"])
        return
    yield _row("compiler", f"NVRTC {compiler['nvrtc']} for {' '.join(compiler['archs'])}")
    for c in compiler["compiled"]:
        yield _row("compiled", f"{c['arch']}: " + (c["problem"] or f"{c['bytes']} bytes in {c['ms']} ms"))
