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
CALLS_REFUSED = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
                 "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load",
                 "yaml.unsafe_load_all", "torch.load"}
MODULES_REFUSED = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


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


def forbidden_faults(root: Path) -> list[str]:
    """Every way to run code or a shell from data (fault H1)."""
    faults = []
    for name, tree in modules(root).items():
        faults += [f"{name}: {t}" for t, _ in imports(tree, set()) if t.split(".")[0] in MODULES_REFUSED]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if dotted(node.func) in CALLS_REFUSED:
                    faults.append(f"{name}: {dotted(node.func)}")
                faults += [f"{name}: {k.arg}" for k in node.keywords
                           if k.arg in ("allow_pickle", "shell") and ast.unparse(k.value) != "False"]
            elif isinstance(node, ast.ImportFrom):
                origins = [f"{node.module}.{a.name}" for a in node.names]
                faults += [f"{name}: {origin}" for origin in origins if origin in CALLS_REFUSED]
            elif dotted(node) in ("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"):
                faults.append(f"{name}: {dotted(node)}")
    return faults


@pytest.mark.parametrize("check", [layering_faults, environment_faults, forbidden_faults], ids=lambda c: c.__name__)
def test_apr_has_no(check):
    assert check(ROOT) == []


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
    "np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=flag)", "run('ls', shell=True)", "os.system('ls')",
    "from os import system", "torch.load(x)"])
def test_forbidden_calls_are_seen(tmp_path, text):
    assert len(forbidden_faults(plant(tmp_path, {"config.py": text + "\n"}))) == 1


@pytest.mark.parametrize("text", [
    "x = model.eval()", "re.compile('x')", "json.load(f)", "np.load(x, allow_pickle=False)", "run(x, shell=False)"])
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
