"""Contracts: what each op promises, as data, and the edits of the code (mutants) that its tests must notice.

`contracts/<stem>-v1.yaml` is read strictly into the frozen records below. A falsifier names a mutant and the test that
must turn red under it: a tolerance that no mutant breaks proves nothing.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from apr.errors import FormatError, did_you_mean
from apr.files import read_bytes
from apr.strict import read_yaml

# The symbols of docs/glossary.md, and: P all parameters, I and O the inputs and outputs of a matrix.
Symbol = Literal["B", "T", "N", "C", "L", "NH", "NKV", "G", "HS", "QKV", "F", "V", "Vp", "S", "P", "I", "O"]
Number = Annotated[float, msgspec.Meta(gt=0, lt=1)]
RULES = {"relative_l2": "value", "twice_naive": "floor"}  # a tolerance's rule and the one number that it needs
ARGUMENTS = ("inputs", "outputs", "backward")
MAX_SOURCE_BYTES = 2**20


@dataclass(frozen=True)
class Argument:
    """An array or scalar of an op: axes (also G*T, HS/2), storage type, what the op does to it."""

    shape: tuple[str, ...]
    dtype: Literal["floatX", "f32", "i32", "i64", "config"]  # config: what no kernel sees
    role: Literal["read", "set", "add", "update"]


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the truth, and why."""

    rule: Literal["relative_l2", "twice_naive"]
    why: str
    value: Number | None = None
    floor: Number | None = None

    def __post_init__(self) -> None:
        if [name for name in ("value", "floor") if getattr(self, name) is not None] != [RULES[self.rule]]:
            raise ValueError(f"rule '{self.rule}' needs '{RULES[self.rule]}' and no other number")


@dataclass(frozen=True)
class Mutant:
    """One edit: `replace`, which occurs exactly once in `file`, becomes `replacement` (`with` in the YAML)."""

    file: str  # relative to the repository's root, as is the file of a test
    replace: str
    replacement: str

    def __post_init__(self) -> None:
        if self.replace in ("", self.replacement):
            raise ValueError("a mutant must change something")

    def apply(self, source: str) -> str:
        """The edited source. Raises FormatError unless the text to replace occurs exactly once."""
        if (count := source.count(self.replace)) != 1:
            raise FormatError(self.file, f"{self.replace!r} exactly once", f"{count} times", "correct the mutant")
        return source.replace(self.replace, self.replacement)


@dataclass(frozen=True)
class Falsifier:
    """A claim, a mutant that denies it, the pytest id that must then fail; `seed` marks the bugs that began apr."""

    id: Annotated[str, msgspec.Meta(pattern="^[A-Z_]+-[0-9]{3}$")]
    claim: str
    mutant: Mutant
    test: str
    seed: bool = False


@dataclass(frozen=True)
class Contract:
    """One op: every argument, what is baked into its kernel, equations, tolerance, needed inputs and falsifiers."""

    name: str
    version: Literal[1]
    source: str
    axes: dict[Symbol, Literal["var", "const"]]
    inputs: dict[str, Argument]
    outputs: dict[str, Argument]
    baked: tuple[str, ...]
    equations: dict[str, str]
    tolerance: Tolerance
    inputs_must_include: tuple[str, ...]
    falsifiers: tuple[Falsifier, ...]
    backward: dict[str, Argument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [name for section in ARGUMENTS for name in getattr(self, section)]
        if len(set(names)) != len(names):
            raise ValueError(f"argument '{max(names, key=names.count)}' twice")
        for name, argument in (self.inputs | self.outputs | self.backward).items():
            for symbol in re.split(r"[*/]", "*".join(argument.shape)) if argument.shape else ():
                if symbol not in self.axes and not symbol.isdigit():
                    raise ValueError(f"axis '{symbol}' of {name} is not declared; {did_you_mean(symbol, self.axes)}")


NESTED = {"tolerance": Tolerance, "falsifiers": Falsifier, "mutant": Mutant}


def load_contract(path: Path) -> Contract:
    """The contract in a file. Raises FormatError for any departure from the schema, NotFoundError, StorageError."""
    try:
        contract = msgspec.convert(_records(Contract, read_yaml(path), str(path)), Contract, strict=True)
    except msgspec.ValidationError as e:
        raise FormatError(str(path), "a contract", str(e), "correct the file") from None
    if path.stem != f"{contract.name}-v1":
        raise FormatError(f"{path}: name", f"'{path.stem}' without -v1", f"'{contract.name}'", "rename the file")
    return contract


def load_all(folder: Path) -> tuple[Contract, ...]:
    """Every contract of a folder, by name. Raises as load_contract, and FormatError for a falsifier id used twice."""
    contracts = tuple(load_contract(path) for path in sorted(folder.glob("*.yaml")))
    seen: set[str] = set()
    for contract in contracts:
        for falsifier in contract.falsifiers:
            if falsifier.id in seen:
                raise FormatError(f"{folder}: {contract.name}", "each falsifier id once", falsifier.id, "renumber one")
            seen.add(falsifier.id)
    return contracts


def check_repository(contract: Contract, root: Path) -> None:
    """Raise FormatError unless every mutant fits its file and every named test is in the checkout at `root`."""
    for falsifier in contract.falsifiers:
        falsifier.mutant.apply(read_bytes(root / falsifier.mutant.file, MAX_SOURCE_BYTES).decode())
        file, _, function = falsifier.test.partition("::")
        text = read_bytes(root / file, MAX_SOURCE_BYTES).decode()
        if function and f"def {function.partition('[')[0]}(" not in text:
            raise FormatError(f"{contract.name}: {falsifier.id}", f"test {function} in {file}", "none", "name a test")


def _records(kind: type, values: Any, where: str) -> Any:
    """Plain data for msgspec: unknown keys refused (it would drop them), `[axes..., dtype, role]` made a record."""
    if not isinstance(values, dict):
        return values  # msgspec says what it should have been
    known = {"with" if f.name == "replacement" else f.name for f in dataclasses.fields(kind)}
    out = {}
    for key, value in values.items():
        inner = f"{where}: {key}"
        if key not in known:
            raise FormatError(inner, f"a key of {kind.__name__}", "an unknown key", did_you_mean(str(key), known))
        if key in ARGUMENTS and isinstance(value, dict):
            value = {name: _argument(item, f"{inner}.{name}") for name, item in value.items()}
        elif key in NESTED:
            value = ([_records(NESTED[key], v, inner) for v in value] if isinstance(value, list)
                     else _records(NESTED[key], value, inner))
        out["replacement" if key == "with" else key] = value
    return out


def _argument(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, list) or len(item) < 2:
        raise FormatError(where, "[axes..., dtype, role]", repr(item)[:80], "write for example [N, C, floatX, read]")
    return {"shape": item[:-2], "dtype": item[-2], "role": item[-1]}
