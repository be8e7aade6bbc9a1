"""`apr doctor`: its report on machines of every kind, and what it answers to a script."""

import ast
import json
import re
from pathlib import Path

import pytest
from fake_driver import A100, H200, TWELVE, FakeDriver, found, install_cupy

from apr.cli.main import main
from apr.driver import DriverInfo, libcuda
from apr.tools import doctor

NONE = DriverInfo(False, "no NVIDIA driver", "", ())
TOO_OLD = DriverInfo(False, "cuInit: old", "13.0", ())


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No driver, and a cache folder that is not made yet."""
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")
    monkeypatch.setattr(libcuda, "open_library", missing)
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "cache"))


def report(capsys, *arguments):
    """(exit code, the report, stderr) of the command."""
    code = main(["doctor", "--json", *arguments])
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    return code, json.loads(said.out), said.err


def test_a_machine_without_a_gpu_can_train_and_compile(bare, capsys):
    code, found_, err = report(capsys)
    assert (code, err) == (0, "")
    assert {"python", "apr", "packages", "optional", "cupy", "driver", "libraries", "compiler", "environment", "cache",
            "cuda", "can", "cannot"} == found_.keys()
    assert all(p["ok"] for p in found_["packages"])
    base = re.search(r"BASE = \[(.*?)\]", (Path(__file__).parents[2] / "setup.py").read_text(), re.S)[1]
    assert {p["name"] for p in found_["packages"]} == set(re.findall(r'"([\w-]+)', base))
    assert not found_["cuda"]["usable"] and not found_["driver"]["present"]
    assert [(c["arch"], c["problem"]) for c in found_["compiler"]["compiled"]] == [("sm_80", ""), ("sm_90a", "")]
    assert all(c["bytes"] > 1000 and c["ms"] > 0 for c in found_["compiler"]["compiled"])
    nvrtc = next(lib for lib in found_["libraries"] if lib["name"] == "libnvrtc")
    assert nvrtc["loaded"] and nvrtc["version"].startswith(found_["compiler"]["nvrtc"] + ".")
    assert found_["can"][0] == "train, tokenize and inspect on the CPU" and "sm_90a" in found_["can"][1]
    assert [c["what"] for c in found_["cannot"]] == ["use cuda:0"] and "libcuda.so.1" in found_["cannot"][0]["why"]


def test_the_report_for_people_ends_with_what_can_be_done(bare, capsys, monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1\x1b[2J")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("python ") and "\x1b" not in out
    assert any(line.startswith("environment    CUPY_TF32=1\\x1b") for line in lines)
    last = [line.partition(":")[0] for line in lines[-3:]]
    assert last == ["you can", "you can", "you cannot"] and ", because " in lines[-1]
    for name in ("numpy", "cffi", "libnvrtc", "compiled       sm_90a: ", "cache"):
        assert name in out


def test_a_machine_with_gpus(bare, capsys, monkeypatch, tmp_path):
    install_cupy(monkeypatch, tmp_path, {"cupy-cuda12x": "14.2.0"}, TWELVE)
    FakeDriver().use(monkeypatch)
    code, found_, _ = report(capsys, "--require", "cuda")
    assert code == 0 and found_["cuda"]["usable"] and found_["driver"]["driver_version"] == "13.0"
    assert [d["name"] for d in found_["driver"]["devices"]] == [H200.name, A100.name]
    assert {"use cuda:0 (NVIDIA H200)", "use cuda:1 (NVIDIA A100)"} <= set(found_["can"])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cuda:0         NVIDIA H200, compute capability 9.0, 132 SMs, 150.0 GiB, 232448 bytes" in out


def test_require_cuda(bare, capsys):
    code, found_, err = report(capsys, "--require", "cuda")
    assert code == 9 and not found_["cuda"]["usable"]
    assert err.startswith("apr: --require cuda: ") and "libcuda.so.1" in err and err.count("\n") == 1
    assert main(["doctor", "--require", "rocm"]) == 2


def test_two_cupys_are_refused(bare, capsys, monkeypatch, tmp_path):
    install_cupy(monkeypatch, tmp_path, {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}, TWELVE)
    FakeDriver().use(monkeypatch)
    monkeypatch.setattr(doctor, "import_cupy", doctor.import_cupy.__wrapped__)
    code, found_, err = report(capsys)
    assert code == 9 and "pip uninstall cupy-cuda12x cupy-cuda13x" in err
    assert not found_["cuda"]["usable"] and "both installed" in found_["compiler"]["problem"]
    assert [c["what"] for c in found_["cannot"]] == ["compile kernels", "use cuda:0 (NVIDIA H200)",
                                                     "use cuda:1 (NVIDIA A100)"]


@pytest.mark.parametrize(("info", "cupy", "extra"), [
    (NONE, [], "nvrtc"), (TOO_OLD, [], "nvrtc"), (found(H200, version="11.8"), [], "nvrtc"),
    (found(H200, version="12.0"), [], "cuda12"), (found(H200, version="13.0"), [], "cuda13"),
    (found(H200, version="14.2"), [], "cuda13"), (found(H200, version="13.0"), ["cupy-cuda12x"], "cuda12"),
    (NONE, ["cupy-cuda12x"], "nvrtc"), (NONE, ["cupy-cuda13x"], "cuda13"),
    (found(H200, version="12.9"), ["cupy-cuda13x"], "cuda13")])
def test_the_extra_that_a_machine_wants(monkeypatch, tmp_path, info, cupy, extra):
    install_cupy(monkeypatch, tmp_path, dict.fromkeys(cupy, "14.2.0"))
    assert doctor.wanted_extra(info) == extra


def test_extra_prints_nothing_else(bare, capsys, monkeypatch, tmp_path):
    install_cupy(monkeypatch, tmp_path, {})
    assert main(["doctor", "--extra"]) == 0
    assert capsys.readouterr() == ("nvrtc\n", "")


@pytest.mark.parametrize(("version", "wants", "holds"), [
    ("2.0", ">=2.0", True), ("2.0.0", ">=2", True), ("1.26.4", ">=2.0", False), ("", ">=2.0", False), ("", "", False),
    ("12.9.86", "<13,>=12.9", True), ("13.0", "<13,>=12.9", False), ("12.8", "<13,>=12.9", False),
    ("3.1.10", ">=3.1.6", True), ("3.1.6rc1", ">=3.1.6", True), ("0.5", ">=0.17", False), ("1", "", True)])
def test_lower_bounds(version, wants, holds):
    assert doctor._holds(version, wants) is holds


def test_a_package_that_is_too_old_is_a_thing_that_cannot_be_done(bare, capsys, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy>=99", 'pyarrow>=1; extra == "x"'])
    code, found_, _ = report(capsys)
    assert code == 0 and [(p["name"], p["ok"]) for p in found_["packages"]] == [("numpy", False)]
    assert "wants >=99" in found_["cannot"][0]["why"] and "train" in found_["cannot"][0]["what"]
    assert main(["doctor"]) == 0 and "NOT MET" in capsys.readouterr().out


def test_an_optional_package_out_of_bounds_is_named(bare, capsys, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [
        'pyarrow>=999; extra == "parquet"', 'numpy<1,>=0.5; extra == "a"', 'pytest>=999; extra == "test"',
        'not-there>=1; extra == "b"', 'pyyaml>=1; extra == "c"'])
    code, found_, _ = report(capsys)
    assert code == 0 and {p["name"]: p["ok"] for p in found_["optional"]} == {"numpy": False, "pyarrow": False,
                                                                             "pyyaml": True}
    assert {c["why"] for c in found_["cannot"] if c["what"].startswith("rely on")} == {"apr wants >=999",
                                                                                       "apr wants <1,>=0.5"}


def test_every_dependency_has_a_lower_bound():
    tree = ast.parse((Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8"))
    values = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}
    groups = [ast.literal_eval(values["BASE"]), *ast.literal_eval(values["EXTRAS"]).values()]
    lines = [line for group in groups for line in group]
    assert len(lines) > 30 and [line for line in lines if not re.fullmatch(r"[\w-]+>=[\d.]+(,<\d+)?", line)] == []


def test_a_header_that_does_not_compile(bare, capsys, monkeypatch, tmp_path):
    (tmp_path / "common.cuh").write_text("#error no good\n")
    monkeypatch.setattr(doctor, "kernels_dir", lambda: tmp_path)
    code, found_, _ = report(capsys)
    assert code == 0 and all("no good" in c["problem"] and c["bytes"] == 0 for c in found_["compiler"]["compiled"])
    assert found_["cannot"][0]["what"] == "compile kernels"


@pytest.mark.parametrize(("spoil", "problem"), [
    ("fresh", ""), ("there", ""), ("open", "you alone"), ("file", "not a folder"), ("link", "you alone"),
    ("proc", "cannot be written")])
def test_the_cache_folder(bare, capsys, monkeypatch, tmp_path, spoil, problem):
    folder = tmp_path / "cache"
    if spoil == "proc":
        monkeypatch.setenv("APR_CACHE_DIR", "/proc/apr")
    elif spoil in ("there", "open"):
        folder.mkdir(mode=0o700)
        folder.chmod(0o777 if spoil == "open" else 0o700)
    elif spoil == "file":
        folder.touch()
    elif spoil == "link":
        folder.symlink_to(tmp_path)
    state = doctor._cache()
    assert (problem in state["problem"]) if problem else state["problem"] == ""
    assert state["exists"] == (spoil not in ("fresh", "proc"))
    assert state["writable"] == (spoil not in ("file", "proc"))
    assert spoil not in ("fresh", "there") or state["free_bytes"] > 0
    assert folder.exists() == (spoil not in ("fresh", "proc"))  # looking makes nothing
