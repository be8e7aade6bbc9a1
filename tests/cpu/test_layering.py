"""Who may import whom: the floors of the house, deferred imports, the environment's one reader, and forbidden calls."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {name: floor for floor, names in enumerate((
    "errors paths dtypes taps strict files rng", "config presets hf_config params buffers contract",
    "reference formats data", "driver kernel ptx_store ptx_cache device gemm_table gemm arena", "ops",
    "registry block model decode",
    "train infer", "tools", "cli __main__",
)) for name in names.split()}
# The only edges between single modules of one floor. driver imports floors 0 and 1 only: the rest stands on it.
EDGES = {("strict", "files"), ("strict", "errors"), ("files", "errors"), ("paths", "errors"),
         ("presets", "config"), ("params", "config"), ("hf_config", "config"), ("buffers", "config"),
         ("buffers", "params"), ("kernel", "driver"), ("ptx_cache", "driver"), ("ptx_cache", "kernel"),
         ("ptx_cache", "ptx_store"), ("device", "driver"), ("device", "ptx_cache"), ("device", "kernel"),
         ("gemm", "driver"), ("gemm", "device"), ("gemm", "gemm_table"), ("arena", "driver"), ("arena", "device"),
         ("model", "block"), ("decode", "block"), ("decode", "model"),
         ("__main__", "cli")}
# The truth is judged against, so few may use it: the NumPy trainer, the NumPy engine, and the tools that compare.
REFERENCE_USERS = ("apr.train.trainer", "apr.infer.cpu_engine", "apr.reference.", "apr.tools.")
API = ("apr.tools.load", True)  # what `apr` itself may import, when asked for `apr.load`
NEVER_AT_IMPORT = ("cupy", "torch", "transformers")
CALLS_REFUSED = {"eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen", "subprocess.getoutput",
                 "subprocess.getstatusoutput", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all",
                 "yaml.unsafe_load", "yaml.unsafe_load_all", "torch.load", "tempfile.mktemp",
                 "ssl._create_unverified_context"}
NAMES_REFUSED = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "ssl.CERT_NONE"}
MODULES_REFUSED = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
ONLY = {"allow_pickle": "False", "shell": "False", "verify": "True"}  # the only value of an argument of this name
GUARDED = ("apr", "benchmarks", "tests", "setup.py")
EXCEPTIONS = {"tests/hostile_tensors.py: pickle": "makes the pickles that must be refused",
              "tests/cpu/test_benchmarks.py: eval": "works out the formulas of our own kernels, token by token"}


def optional_packages() -> set[str]:
    """The import names of the extras in setup.py, those of the tests apart."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assigned = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}
    extras = ast.literal_eval(assigned["EXTRAS"])
    names = {re.match(r"[\w-]+", line)[0] for key, lines in extras.items() if key != "test" for line in lines}
    return {re.sub(r"^cupy_.*", "cupy", re.sub(r"^nvidia_.*", "nvidia", n.replace("-", "_"))) for n in names}


OPTIONAL = optional_packages()


def modules(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of every module of root/apr by dotted name."""
    out = {}
    for path in sorted((root / "apr").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return out


def imports(tree: ast.AST, known: set[str], deferred: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, inside a function) of every import; those of apr in full, a relative one starts with a dot."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base, deferred
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield "importlib", True
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(node, known, deferred or inside)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute, else ''."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def edge_fault(source: str, target: str, known: set[str]) -> str | None:
    """Why `source` must not import `target`, both modules of apr; None if it may."""
    if target == "apr":
        return None  # for its version
    if target not in known:
        return "which does not exist"
    above, below = source.split(".")[1], target.split(".")[1]
    if below == "reference" and not f"{source}.".startswith(REFERENCE_USERS):
        return "which judges the code and is not part of it"
    if above == below:
        return "another op" if above == "ops" and source != "apr.ops" else None
    if FLOORS[below] >= FLOORS[above] and (above, below) not in EDGES:
        return f"floor {FLOORS[above]} to floor {FLOORS[below]}"
    return None


def layering_faults(root: Path) -> list[str]:
    """Every breach of the floors, one line each."""
    trees = modules(root)
    homeless = [n for n in trees if n != "apr" and n.split(".")[1] not in FLOORS]
    faults = [f"{name} is on no floor" for name in homeless]
    for name in trees.keys() - homeless:
        for target, deferred in imports(trees[name], set(trees)):
            top, of_apr = target.split(".")[0], re.match(r"apr(\.|$)", target)
            if target.startswith("."):
                faults.append(f"{name}: relative import {target}")
            elif name == "apr" and (target, deferred) == API:
                continue
            elif name == "apr" and of_apr:
                faults.append(f"apr/__init__ imports {target}")
            elif of_apr and (why := edge_fault(name, target, set(trees))):
                faults.append(f"{name} imports {target}: {why}")
            if deferred and not name.startswith("apr.cli") and top not in OPTIONAL:
                faults.append(f"{name}: deferred import of {target}")
            if not deferred and top in NEVER_AT_IMPORT:
                faults.append(f"{name}: {target} at import time")
    return sorted(faults)


def environment_faults(root: Path) -> list[str]:
    """Every reader of the process environment but apr/paths.py."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    return [f"{name} line {node.lineno}" for name, tree in modules(root).items() for node in ast.walk(tree)
            if name != "apr.paths" and (
                (isinstance(node, ast.Attribute) and node.attr in names)
                or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}))]


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Every way in a module to run code or a shell from data, to race for a name, or to trust any server (fault H1)."""
    called = {a.asname: a.name for node in ast.walk(tree) if isinstance(node, ast.Import)
              for a in node.names if a.asname}
    yield from (target for target, _ in imports(tree, set()) if target.split(".")[0] in MODULES_REFUSED)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, _, rest = dotted(node.func).partition(".")
            name = f"{called.get(head, head)}.{rest}".rstrip(".")
            if name in CALLS_REFUSED:
                yield name
            if name in ("np.load", "numpy.load") and len(node.args) > 2:
                yield "allow_pickle"
            yield from (k.arg for k in node.keywords if k.arg in ONLY and ast.unparse(k.value) != ONLY[k.arg])
        elif isinstance(node, ast.ImportFrom):
            yield from {f"{node.module}.{a.name}" for a in node.names} & (CALLS_REFUSED | NAMES_REFUSED)
        elif isinstance(node, ast.Assign) and ast.unparse(node).endswith(".check_hostname = False"):
            yield "check_hostname"
        elif dotted(node) in NAMES_REFUSED:
            yield dotted(node)


def forbidden_faults(root: Path) -> list[str]:
    """What is unsafe in the product, its benchmarks, its tests and its setup."""
    files = [path for top in GUARDED for path in ([root / top] if top.endswith(".py") else (root / top).rglob("*.py"))]
    return [f"{path.relative_to(root).as_posix()}: {what}" for path in sorted(files) if path.exists()
            for what in unsafe(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("check", [layering_faults, environment_faults], ids=lambda c: c.__name__)
def test_apr_has_no(check):
    assert check(ROOT) == []


def test_H1_nothing_runs_what_it_reads():
    """But for the exceptions, each of which is there; one that is not must go."""
    assert sorted(set(forbidden_faults(ROOT))) == sorted(EXCEPTIONS)


def plant(root: Path, files: dict[str, str]) -> Path:
    """A tree of modules named like apr's."""
    for name, text in files.items():
        path = root / "apr" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


CLEAN = {"__init__.py": "", "errors.py": "import os\n", "config.py": "from apr import errors\n",
         "reference/__init__.py": "", "reference/op.py": "from apr.config import X\nimport numpy\n",
         "train/trainer.py": "from apr.reference import op\n", "data/text.py": "def f():\n    import pyarrow\n",
         "cli/main.py": "import importlib\ndef f():\n    importlib.import_module('x')\n"}


@pytest.mark.parametrize(("planted", "fault"), [
    ({"errors.py": "import apr.config\n"}, "apr.errors imports apr.config: floor 0 to floor 1"),
    ({"errors.py": "def f():\n    from apr import config\n"}, "apr.errors imports apr.config: floor 0 to floor 1"),
    ({"data/text.py": "from apr.formats.a import b\n", "formats/a.py": ""},
     "apr.data.text imports apr.formats.a: floor 2 to floor 2"),
    ({"errors.py": "from apr.dtypes import X\n", "dtypes.py": ""}, "apr.errors imports apr.dtypes: floor 0 to floor 0"),
    ({"config.py": "from . import errors\n"}, "apr.config: relative import ."),
    ({"config.py": "def f():\n    import json\n"}, "apr.config: deferred import of json"),
    ({"config.py": "from importlib import import_module\nimport_module('apr.cli')\n"},
     "apr.config: deferred import of importlib"),
    ({"config.py": "if True:\n    import cupy.cuda\n"}, "apr.config: cupy.cuda at import time"),
    ({"config.py": "import apr.errrors\n"}, "apr.config imports apr.errrors: which does not exist"),
    ({"newcomer.py": ""}, "apr.newcomer is on no floor"),
    ({"__init__.py": "from apr.errors import X\n"}, "apr/__init__ imports apr.errors"),
    ({"__init__.py": "from apr.tools import load\n", "tools/load.py": ""}, "apr/__init__ imports apr.tools.load"),
    ({"__init__.py": "def f():\n    from apr.tools import bench\n", "tools/bench.py": "", "tools/__init__.py": ""},
     "apr/__init__ imports apr.tools.bench"),
    ({"train/run.py": "from apr.reference.op import x\n"},
     "apr.train.run imports apr.reference.op: which judges the code and is not part of it"),
    ({"ops/a.py": "import apr.ops.b\n", "ops/b.py": ""}, "apr.ops.a imports apr.ops.b: another op"),
])
def test_a_planted_breach_is_named(tmp_path, planted, fault):
    assert layering_faults(plant(tmp_path, CLEAN)) == []
    assert fault in layering_faults(plant(tmp_path, planted))


def test_three_breaches_are_named_at_once(tmp_path):
    three = {"errors.py": "import apr.config\n", "config.py": "from .errors import X\n", "newcomer.py": ""}
    assert len(layering_faults(plant(tmp_path, CLEAN | three))) == 3


@pytest.mark.parametrize(("text", "found"), [
    ("import os\nx = os.environ['A']\n", 1), ("import os\ndef f():\n    return os.getenv('A')\n", 1),
    ("from os import environ as e\n", 1), ("from os import path\n", 0),
])
def test_environment_readers_are_seen(tmp_path, text, found):
    assert len(environment_faults(plant(tmp_path, {"config.py": text, "paths.py": "import os\nos.environ\n"}))) == found


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "def f():\n    import marshal", "eval('1')", "exec('x = 1')",
    "yaml.load(x, L)", "yaml.full_load(x)", "yaml.unsafe_load(x)", "yaml.load_all(x)", "f(Loader=yaml.UnsafeLoader)",
    "np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=flag)", "numpy.load(x, None, True)",
    "run('ls', shell=True)", "os.system('ls')", "from os import system", "torch.load(x)",
    "torch.load(x, weights_only=True)", "import yaml as y\ny.load(x, L)", "import numpy as n\nn.load(x, None, True)",
    "tempfile.mktemp()", "from tempfile import mktemp", "ssl._create_unverified_context()", "c.check_hostname = False",
    "c.verify_mode = ssl.CERT_NONE", "get(url, verify=False)"])
@pytest.mark.parametrize("place", ["apr/config.py", "benchmarks/bench.py", "tests/cpu/test_x.py", "setup.py"])
def test_H1_unsafe_calls_are_seen(tmp_path, text, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(text + "\n", encoding="utf-8")
    found = forbidden_faults(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{place}: ")


@pytest.mark.parametrize("text", [
    "x = model.eval()", "re.compile('x')", "json.load(f)", "np.load(x, allow_pickle=False)", "np.load(x, 'r')",
    "run(x, shell=False)", "factory.mktemp('x')", "get(url, verify=True)", "c.check_hostname = True"])
def test_innocent_calls_are_not(tmp_path, text):
    assert forbidden_faults(plant(tmp_path, {"config.py": text + "\n"})) == []


BLOCKED = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocker())
for name in {names!r}:
    importlib.import_module(name)
print('all imported', *(m for m in {blocked!r} if m in sys.modules))
"""


def test_every_module_imports_without_the_optional_packages():
    """`import apr` first, then every module, with CuPy, PyTorch, transformers and the extras out of reach."""
    names = sorted(modules(ROOT), key=lambda n: (n != "apr", n))
    assert {"apr.errors", "apr.config", "apr.reference.model", "apr.formats.apr_file", "apr.data.stream"} <= set(names)
    code = BLOCKED.format(blocked=sorted({*NEVER_AT_IMPORT, *OPTIONAL}), names=names)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                         check=False)
    assert (run.stdout, run.stderr) == ("all imported\n", "")


def test_the_optional_packages_are_those_of_setup_py():
    assert {"cupy", "pyarrow", "huggingface_hub", "matplotlib", "tensorboardX"} <= OPTIONAL
    assert not OPTIONAL & {"numpy", "pytest", "tokenizers"}
