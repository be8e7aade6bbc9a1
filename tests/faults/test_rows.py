"""The catalogue of faults: every row has a test or a reason, and docs/faults.md is what the records say."""

import re

import pytest
import rows
from fault_rows import ROOT, catalogue, rows_of

KINDS = ({"fault", "how", "want"}, {"fault", "how", "want", "tests"}, {"fault", "how", "want", "no"})
TESTS = "\n".join(f"{p.relative_to(ROOT).as_posix()}::{name}" for kind in ("cpu", "faults", "gpu")
                  for p in sorted((ROOT / "tests" / kind).glob("test_*.py"))
                  for name in re.findall(r"^def (test_\w+)", p.read_text(encoding="utf-8"), re.M))


def test_rows_say_what_is_injected_and_what_must_come_of_it():
    for name, row in catalogue().items():
        assert set(row) in KINDS and all(row[k] for k in row if "no" not in row or k in ("fault", "no")), name
    counts = {"A": 14, "B": 17, "C": 10, "D": 7, "E": 10, "F": 12, "G": 9, "H": 6}
    assert list(catalogue()) == [f"{part}{n + 1}" for part, count in counts.items() for n in range(count)]


def test_tests_that_are_named_are_there():
    for row in catalogue().values():
        for test in row.get("tests", ()):
            assert test in TESTS, f"{test} is no test's id"


def test_ids_in_names_are_rows():
    used = {row for test in TESTS.splitlines() for row in re.findall(r"::test_([A-H]\d{1,2})_", test)}
    assert used and used <= catalogue().keys()


@pytest.mark.parametrize(("test", "found"), [
    ("tests/cpu/test_a.py::test_A2_kill[4]", ["A2"]), ("tests/faults/test_m.py::test_x[B4-apr]", ["B4"]),
    ("tests/gpu/test_f.py::test_x[G5]", ["G5"]), ("tests/cpu/test_s.py::test_x[F8_E4M3]", []),
    ("tests/cpu/test_a.py::test_A99_x", []), ("tests/cpu/test_a.py::test_apr[1-B4]", []),
    ("tests/cpu/test_run.py::test_resuming_refuses_other_flags", ["A9", "C10"])])
def test_a_test_is_of_the_rows_that_its_id_says(test, found):
    assert rows_of(test) == found


def test_outcomes_are_what_was_recorded():
    cpu = {"date": "2026-01-02", "rows": {"A1": {"passed": 3, "failed": 0, "skipped": 0},
                                          "A2": {"passed": 3, "failed": 1, "skipped": 1}}}
    gpu = {"device": "a GPU", "date": "2026-01-03", "rows": {"A1": 2}}
    assert rows.outcome("A1", {}, cpu, gpu) == "3 passed (2026-01-02); 2 passed on a GPU (2026-01-03)"
    assert rows.outcome("A2", {}, cpu, gpu) == "3 passed, 2 FAILED (2026-01-02)"
    assert rows.outcome("A3", {}, cpu, gpu) == "no run is recorded"
    assert rows.outcome("D7", {"no": "no ranks"}, cpu, gpu) == "not automated: no ranks"


def test_the_table_is_of_these_records_and_no_row_fails_in_it():
    """Rows that only a GPU can have may wait for its next run."""
    text = rows.TABLE.read_text(encoding="utf-8")
    assert text == rows.table(), "python tests/faults/rows.py table"
    assert "FAILED" not in text and " 0 fail," in text
    waiting = [line.split(" | ")[0] for line in text.splitlines() if line.endswith(f"| {rows.UNRECORDED} |")]
    assert set(waiting) <= {"| D6", "| G3", "| G4", "| G8"}
