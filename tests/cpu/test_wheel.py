"""The built wheel holds kernels and contracts, and every way of installing apr finds them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from apr.formats.safetensors import write_safetensors

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "contracts")
WHERE = """
import json, apr, apr.paths
print(json.dumps([apr.__file__, apr.__version__, str(apr.paths.kernels_dir()), str(apr.paths.contracts_dir())]))
"""


@dataclass(frozen=True)
class Places:
    """A copy of the sources, and the folder in which the wheel made from it is installed."""

    source: Path
    installed: Path


def python(cwd: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """This Python in another folder, with the safe path (-P), seeing `path` before anything installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "PIP_", "APR_"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-P", *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    """The files under a folder by name; what Python and setuptools put there themselves is left out."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")}


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Places:
    """The wheel, built and installed once; from a copy, since a build leaves its litter where it runs."""
    missing = [name for name in ("pip", "setuptools", "wheel") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"a wheel cannot be built without {', '.join(missing)}")
    top = tmp_path_factory.mktemp("wheel")
    source, wheels, installed = top / "source", top / "wheels", top / "installed"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("apr", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = python(source, *pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(wheels), ".")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("apr-*.whl")
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(installed)]
    done = python(top, *pip, "install", *options, str(wheel))
    assert done.returncode == 0, done.stdout + done.stderr
    return Places(source, installed)


def found_from(cwd: Path, path: Path | None) -> tuple[Path, str, Path, Path]:
    """(apr.__file__, version, kernels folder, contracts folder) as another process sees them."""
    run = python(cwd, "-c", WHERE, path=path)
    assert run.returncode == 0, run.stdout + run.stderr
    file, version, kernels, contracts = json.loads(run.stdout)
    return Path(file), version, Path(kernels), Path(contracts)


def test_wheel_holds_all_of_apr_and_the_two_folders(places, tmp_path):
    file, version, kernels, contracts = found_from(tmp_path, places.installed)
    assert file == places.installed / "apr" / "__init__.py"
    assert (kernels, contracts) == tuple(places.installed / "apr" / name for name in FOLDERS)
    for name in FOLDERS:
        expected = contents(places.source / name)
        assert expected and contents(places.installed / "apr" / name) == expected
    package = contents(places.installed / "apr")
    assert {n: b for n, b in package.items() if not n.startswith(FOLDERS)} == contents(places.source / "apr")
    assert "py.typed" in package
    assert {p.name for p in places.installed.iterdir()} - {"bin"} == {"apr", f"apr-{version}.dist-info"}


def test_command_runs_from_the_wheel(places, tmp_path):
    said = python(tmp_path, "-m", "apr", "--version", path=places.installed)
    assert (said.returncode, said.stdout) == (0, f"apr {found_from(tmp_path, places.installed)[1]}\n"), said.stderr
    write_safetensors(tmp_path / "a.safetensors", {"w": np.ones((2, 3), np.float32)}, {"k": "v"})
    said = python(tmp_path, "-m", "apr", "inspect", "a.safetensors", "--json", path=places.installed)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["tensors"] == [{"name": "w", "dtype": "F32", "shape": [2, 3], "bytes": 24}]


def test_a_checkout_on_the_path_finds_its_folders(places, tmp_path):
    file, _, kernels, contracts = found_from(tmp_path, places.source)
    assert file == places.source / "apr" / "__init__.py"
    assert (kernels, contracts) == tuple(places.source / name for name in FOLDERS)


def test_an_editable_install_finds_the_folders_of_its_checkout(tmp_path):
    known = python(tmp_path, "-c", "from importlib.metadata import distribution as d\n"
                                   "print(d('apr').read_text('direct_url.json') or '')")
    if known.returncode != 0 or not known.stdout.strip():
        pytest.skip("apr is not installed from a folder in this environment")
    origin = json.loads(known.stdout)
    if not origin.get("dir_info", {}).get("editable"):
        pytest.skip("apr is not an editable install in this environment")
    file, _, kernels, contracts = found_from(tmp_path, None)
    root = file.parents[1]
    assert root.as_uri() == origin["url"].rstrip("/")
    assert (kernels, contracts) == (root / "kernels", root / "contracts")


def test_wheel_says_what_it_needs(places):
    (metadata,) = places.installed.glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert "numpy>=2.0" in needs and "Requires-Python: >=3.11" in lines
    assert not [need for need in needs if need.startswith(("torch", "transformers"))]
    assert all("extra ==" in need for need in needs if need.startswith(("cupy", "nvidia", "pyarrow", "pytest")))
    (entry,) = places.installed.glob("*.dist-info/entry_points.txt")
    assert "apr = apr.cli.main:main" in entry.read_text(encoding="utf-8")
