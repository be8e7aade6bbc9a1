"""Every malformed file through the function that reads its kind: an AprError of the right exit code, nothing else."""

from collections import Counter

import pytest
from hostile import READ, all_cases, attempt, good, grouped

from apr.strict import parse_yaml

GROUPS = grouped(all_cases())
COUNT: Counter = Counter()


@pytest.mark.parametrize("row_and_kind", GROUPS, ids="-".join)
def test_malformed_is_refused(row_and_kind):
    ends = [(case.what, attempt(case)) for case in GROUPS[row_and_kind]]
    COUNT["tried"] += len(ends)
    COUNT["refused"] += sum(not said for _, said in ends)
    COUNT["crashed"] += sum(said.startswith("crashed") for _, said in ends)
    wrong = [f"{what}: {said}" for what, said in ends if said]
    assert not wrong, f"{len(wrong)} of {len(ends)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("kind", READ)
def test_good_is_read(kind, tmp_path):
    """What the malformed files were before they were spoilt."""
    READ[kind](good()[kind](tmp_path))


def test_yaml_scalars():
    """H2: `1e-4` is a number here and a text in PyYAML; `no`, `010`, `0x1F`, `1:30`, `1_000` and dates are texts."""
    expected = {"1e-4": 1e-4, "-1.5e3": -1500.0, "10": 10, "true": True, "null": None, "'5'": "5"}
    texts = ("no", "yes", "010", "0x1F", "0o17", "1:30", "1_000", "2026-01-01", ".inf", ".nan", "1.5.2", "=", "<<")
    for scalar, value in {**expected, **{t: t for t in texts}}.items():
        found = parse_yaml(f"key: {scalar}".encode(), "text")["key"]
        assert (type(found), found) == (type(value), value), scalar


def test_summary(capsys):
    """The count of the cases above; `python tests/faults/report.py` shows it by row and kind."""
    with capsys.disabled():
        print(f"\nmalformed files: {COUNT['tried']} tried, {COUNT['refused']} refused, {COUNT['crashed']} crashed")
    assert COUNT["refused"] == COUNT["tried"]
