"""The contracts of a checkout, held against its code: files, mutants, tests, functions and their parameters."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from apr.contract import Contract, Falsifier, read_folder
from apr.errors import AprError, FormatError, MeasureError, NotFoundError, UnavailableError, did_you_mean
from apr.files import read_bytes
from apr.tools.pytest_runs import collect, named

MAX_SOURCE_BYTES = 2**20
COLLECT_SECONDS = 300.0


def checkout(root: Path) -> Path:
    """`root`, absolute. Raises UnavailableError if it is no checkout: an installed package has no tests."""
    if not all((root / name).is_dir() for name in ("apr", "contracts", "tests")):
        raise UnavailableError(str(root), "a checkout, with apr/, contracts/ and tests/", "none",
                               "run it in a clone of the repository, or name one with --root")
    return root.resolve()


def signature(root: Path, symbol: str) -> str:
    """The parameters of a function, method, or class (its `__init__`'s, or its fields), as `(a, *, b=1)`.

    Read from the source, of which nothing is imported. Raises FormatError where there is no such thing.
    """
    parts = symbol.split(".")
    for n in range(len(parts) - 1, 0, -1):
        for file in (root.joinpath(*parts[:n]).with_suffix(".py"), root.joinpath(*parts[:n], "__init__.py")):
            if file.is_file():
                try:
                    return _signature(symbol, ast.parse(read_bytes(file, MAX_SOURCE_BYTES)).body, parts[n:])
                except (SyntaxError, ValueError) as e:
                    raise FormatError(symbol, f"Python in {file}", str(e), "correct it") from None
    raise FormatError(symbol, "a function of apr", "no such module", "correct the name")


def same_signature(a: str, b: str) -> bool:
    """Whether two parameter lists say the same: names, order, `*`, `/` and defaults, quotes and spaces apart."""
    def parsed(text: str) -> str:
        return ast.dump(ast.parse(f"def f{text}: pass"))

    try:
        return parsed(a) == parsed(b)
    except (SyntaxError, ValueError):
        return False


def validate(root: Path) -> tuple[list[Contract], list[AprError]]:
    """The contracts of a checkout and everything that is wrong with them.

    Raises UnavailableError where there is no checkout.
    """
    contracts, faults = read_folder(checkout(root) / "contracts")
    for contract in contracts:
        faults += fits(root, contract)
    return contracts, faults + list(_missing_tests(root, contracts))


def fits(root: Path, contract: Contract) -> list[AprError]:
    """What of a contract does not fit the sources: mutants that do not apply, and other symbols and parameters."""
    faults = list[AprError]()
    for symbol, said in contract.symbols.items():
        try:
            if not same_signature(said, found := signature(root, symbol)):
                faults.append(FormatError(f"{contract.name}: {symbol}", said, found, "correct the one that is wrong"))
        except AprError as e:
            faults.append(type(e)(f"{contract.name}: {e.where}", e.expected, e.found, e.fix))
    for falsifier in contract.falsifiers:
        if falsifier.mutant is not None:
            try:
                source = read_bytes(root / falsifier.mutant.file, MAX_SOURCE_BYTES)
                falsifier.mutant.apply(source.decode("utf-8", "replace"))
            except AprError as e:
                faults.append(type(e)(f"{contract.name}: {falsifier.id}: {e.where}", e.expected, e.found, e.fix))
    return faults


def _missing_tests(root: Path, contracts: Iterable[Contract]) -> Iterator[AprError]:
    """Faults of named tests: no such file, no such function, no such parameters (pytest collects, once per suite)."""
    wanted: dict[str, list[tuple[str, Falsifier]]] = {}
    for contract in contracts:
        for falsifier in (f for f in contract.falsifiers if f.test is not None):
            file = str(falsifier.test).partition("::")[0]
            if (root / file).is_file():
                wanted.setdefault(file, []).append((contract.name, falsifier))
            else:
                yield NotFoundError(f"{contract.name}: {falsifier.id}: test", file, "no such file", "name a test")
    for suite in sorted({"/".join(file.split("/")[:2]) for file in wanted}):
        files = [file for file in sorted(wanted) if file.startswith(suite)]
        found, problem = collect(root, files, {}, COLLECT_SECONDS)
        if problem:
            yield MeasureError(f"the tests in {suite}", "tests that pytest can collect", problem, "correct them")
        for name, falsifier in (item for file in files for item in wanted[file]):
            test = str(falsifier.test)
            if not any(named(test, full) for full in found):
                file, _, function = test.partition("::")
                known = {full.partition("::")[2] for full in found if full.startswith(f"{file}::")}
                if "[" not in function:
                    known = {k.partition("[")[0] for k in known}
                yield FormatError(f"{name}: {falsifier.id}: test", f"{function} in {file}", "no such test",
                                  did_you_mean(function, known))


def _signature(symbol: str, body: list[ast.stmt], names: list[str]) -> str:
    for node in reversed(body):  # the last definition is the one that counts
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == names[0]:
            if isinstance(node, ast.ClassDef):
                return _of_class(symbol, node, names[1:])
            if len(names) == 1:
                return _parameters(node.args)
    raise FormatError(symbol, f"a function or class '{names[0]}'", "none of that name", "correct the name")


def _of_class(symbol: str, node: ast.ClassDef, names: list[str]) -> str:
    if names or any(isinstance(child, ast.FunctionDef) and child.name == "__init__" for child in node.body):
        return _signature(symbol, node.body, names or ["__init__"])
    fields = [f"{n.target.id}={ast.unparse(n.value)}" if n.value else n.target.id for n in node.body
              if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return f"({', '.join(fields)})"


def _parameters(arguments: ast.arguments) -> str:
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    for argument in filter(None, every):
        argument.annotation = None
    return f"({ast.unparse(arguments)})"
