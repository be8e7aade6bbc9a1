"""Contracts: what each part promises, as data, and the edits of the code (mutants) that its tests must notice.

`contracts/<name>-v1.yaml` is read strictly into the frozen records below. A falsifier names a test, and mostly a mutant
under which that test must turn red: a tolerance that no mutant breaks proves nothing. Nothing in a file says whether a
contract holds: that is computed from runs (apr/tools/receipts.py).
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from apr.errors import AprError, FormatError, did_you_mean
from apr.strict import read_yaml

# The symbols of docs/glossary.md, and: P all parameters, I and O the inputs and outputs of a matrix.
Symbol = Literal["B", "T", "N", "C", "L", "NH", "NKV", "G", "HS", "QKV", "F", "V", "Vp", "S", "P", "I", "O"]
Number = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
# Of the checkout, and of nothing outside it: a mutant is written to its file.
FilePath = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
TestId = Annotated[str, msgspec.Meta(pattern=r"^tests(/\w+)+\.py::\w+(\[.+\])?$")]
FalsifierId = Annotated[str, msgspec.Meta(pattern="^[A-Z][A-Z0-9_]*(-[A-Z0-9_]+)*-[0-9]{3}$")]
Dotted = Annotated[str, msgspec.Meta(pattern=r"^apr(\.\w+){2,}$")]
RULES = {"relative_l2": "value", "twice_naive": "floor"}  # a tolerance's rule and the one number that it needs
ARGUMENTS = ("inputs", "outputs", "backward")


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

    file: FilePath  # relative to the repository's root, as is the file of a test
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
    """A claim and what could show it false.

    With `test` and `mutant`, the pytest id must fail under the mutant; with `equivalent`, which says why, it cannot.
    With `test` alone, it must pass. Or the claim `rests_on` falsifiers of other contracts. `seed` marks the bugs that
    began apr.
    """

    id: FalsifierId
    claim: Text
    test: TestId | None = None
    mutant: Mutant | None = None
    equivalent: Text | None = None
    rests_on: tuple[FalsifierId, ...] = ()
    seed: bool = False

    def __post_init__(self) -> None:
        if (self.test is None) != bool(self.rests_on):
            raise ValueError(f"{self.id} needs either 'test' or 'rests_on'")
        if self.mutant is not None and self.test is None:
            raise ValueError(f"{self.id} has a mutant, which needs a test")
        if self.equivalent is not None and self.mutant is None:
            raise ValueError(f"{self.id} is called equivalent and has no mutant")

    @property
    def suite(self) -> Literal["cpu", "gpu", ""]:
        """Where its test runs; '' if it rests on others."""
        if self.test is None:
            return ""
        return "gpu" if self.test.startswith("tests/gpu/") else "cpu"


@dataclass(frozen=True)
class Document:
    """A contract of the Rust system's documents: the version that was taken over, and what of it was wrong."""

    version: Text
    corrected: tuple[Text, ...]  # yardsticks that were changed, and why


@dataclass(frozen=True, kw_only=True)
class Contract:
    """One part: the functions it is about with their parameters, what they promise, and what would show it false."""

    name: str
    version: Literal[1]
    source: Text
    symbols: Annotated[dict[Dotted, Text], msgspec.Meta(min_length=1)]
    equations: dict[str, str]
    falsifiers: Annotated[tuple[Falsifier, ...], msgspec.Meta(min_length=1)]
    document: Document | None = None


@dataclass(frozen=True, kw_only=True)
class OpContract(Contract):
    """One op: besides, every argument, what is baked into its kernel, tolerance and needed inputs."""

    axes: dict[Symbol, Literal["var", "const"]]
    inputs: dict[str, Argument]
    outputs: dict[str, Argument]
    baked: tuple[str, ...]
    tolerance: Tolerance
    inputs_must_include: tuple[str, ...]
    backward: dict[str, Argument] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [name for section in ARGUMENTS for name in getattr(self, section)]
        if len(set(names)) != len(names):
            raise ValueError(f"argument '{max(names, key=names.count)}' twice")
        for name, argument in (self.inputs | self.outputs | self.backward).items():
            for symbol in re.split(r"[*/]", "*".join(argument.shape)) if argument.shape else ():
                if symbol not in self.axes and not symbol.isdigit():
                    raise ValueError(f"axis '{symbol}' of {name} is not declared; {did_you_mean(symbol, self.axes)}")


OF_AN_OP = {f.name for f in dataclasses.fields(OpContract)} - {f.name for f in dataclasses.fields(Contract)}
NESTED = {"tolerance": Tolerance, "falsifiers": Falsifier, "mutant": Mutant, "document": Document}


def load_contract(path: Path) -> Contract:
    """The contract in a file: an OpContract if it has any key of one.

    Raises FormatError for any departure from the schema, NotFoundError, StorageError.
    """
    values = read_yaml(path)
    kind = OpContract if isinstance(values, dict) and OF_AN_OP & values.keys() else Contract
    try:
        contract = msgspec.convert(_records(kind, values, str(path)), kind, strict=True)
    except msgspec.ValidationError as e:
        raise FormatError(str(path), "a contract", str(e), "correct the file") from None
    if path.stem != f"{contract.name}-v1":
        raise FormatError(f"{path}: name", f"'{path.stem}' without -v1", f"'{contract.name}'", "rename the file")
    return contract


def read_folder(folder: Path) -> tuple[list[Contract], list[AprError]]:
    """The contracts of a folder, by name, and the faults: a file that is none, an id twice, a broken `rests_on`."""
    contracts, faults = list[Contract](), list[AprError]()
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix != ".yaml":
                raise FormatError(str(path), "contracts and nothing else in their folder", "another file", "move it")
            contracts.append(load_contract(path))
        except AprError as e:
            faults.append(e)
    known: dict[str, tuple[str, Falsifier]] = {}
    every = [(contract, falsifier) for contract in contracts for falsifier in contract.falsifiers]
    for contract, falsifier in every:
        where = f"{contract.name}: {falsifier.id}"
        if falsifier.id in known:
            faults.append(FormatError(where, "each falsifier id once", f"it in {known[falsifier.id][0]} too",
                                      "renumber one"))
        known.setdefault(falsifier.id, (contract.name, falsifier))
    for contract, falsifier in every:
        faults += _rest_faults(contract, falsifier, known)
    return contracts, faults


def load_all(folder: Path) -> tuple[Contract, ...]:
    """Every contract of a folder, by name. Raises the first fault of read_folder."""
    contracts, faults = read_folder(folder)
    if faults:
        raise faults[0]
    return tuple(contracts)


def _rest_faults(contract: Contract, falsifier: Falsifier, known: dict[str, tuple[str, Falsifier]]) -> list[AprError]:
    """A falsifier may rest on what is run, in other contracts: not on itself, a chain, or what proves nothing."""
    faults = list[AprError]()
    for name in falsifier.rests_on:
        where = f"{contract.name}: {falsifier.id}: rests_on"
        if falsifier.rests_on.count(name) > 1:
            faults.append(FormatError(where, "each falsifier once", f"{name} twice", "drop one"))
        if name not in known:
            faults.append(FormatError(where, "a falsifier's id", f"'{name}'", did_you_mean(name, known)))
        elif known[name][1].rests_on or known[name][1].equivalent:
            faults.append(FormatError(where, "a falsifier that is run and can fail",
                                      f"{name}, which {'rests on others' if known[name][1].rests_on else 'cannot'}",
                                      "name what proves it"))
        elif known[name][0] == contract.name:
            faults.append(FormatError(where, "a falsifier of another contract", f"{name}, of this one", "drop it"))
    return faults


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
