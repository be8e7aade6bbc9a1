"""The fuzzer's kept cases: each must end as is written beside it."""

import signal

import fuzz
import fuzz_corpus
import pytest
from fuzz_forms import FORMS
from test_fuzz_structured import ROWS

EXPECTED = fuzz_corpus.expected()
IDS = [f"{ROWS[name.partition('/')[0]][0]}-{name}" for name in EXPECTED]


@pytest.mark.parametrize("name", EXPECTED, ids=IDS)
def test_corpus(name, tmp_path):
    form = name.partition("/")[0]
    before = signal.signal(signal.SIGALRM, fuzz.late)
    try:
        how, error, _ = fuzz.verdict(form, fuzz_corpus.unpacked(fuzz_corpus.HOME / name), tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert how in fuzz.ENDS[:2], f"{how}: {error}"
    assert EXPECTED[name] in (how, f"exit {error.exit_code}" if how == "refused" else "accepted"), str(error)


def test_the_corpus_is_whole_and_small():
    """Each file is expected, each expected file is there; every format has cases of both kinds."""
    files = {str(p.relative_to(fuzz_corpus.HOME)): p.stat().st_size for p in fuzz_corpus.HOME.glob("*/*")}
    assert files.keys() == EXPECTED.keys()
    assert max(files.values()) < 8_000
    assert sum(files.values()) < 200_000
    for form in FORMS:
        ends = {end for name, end in EXPECTED.items() if name.startswith(f"{form}/")}
        assert "accepted" in ends, form
        assert ends - {"accepted"}, form


def test_a_case_survives_packing(tmp_path):
    """A folder with a link, and a file."""
    for form in ("index", "kernel"):
        files = fuzz.case(form, 7, next(n for n in range(99) if form == "kernel" or str in map(type, fuzz.case(
            form, 7, n).values())))
        path = tmp_path / ("x.zip" if form == "index" else "x")
        path.write_bytes(fuzz_corpus.packed(files))
        assert fuzz_corpus.unpacked(path) == files
