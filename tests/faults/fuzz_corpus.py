"""The fuzzer's corpus: corpus/FORMAT/NAME, a small file each (a folder as a zip); expected.json says how each must end.

`python tests/faults/fuzz_corpus.py` chooses it anew: of the cases refused for the same reason the smallest, and so on.
"""

import io
import json
import re
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz_forms import FORMS
from fuzz_rules import INVALID

HOME = Path(__file__).parent / "corpus"
EXPECTED = HOME / "expected.json"
LINK = 0o120777 << 16  # a zip's attributes of a symbolic link


def packed(files):
    """A case as the bytes of one file."""
    if isinstance(files, bytes):
        return files
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)  # of 1980, so that the same case is the same bytes
            info.external_attr = 0o644 << 16 if isinstance(content, bytes) else LINK
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def unpacked(path):
    """The case in a file of the corpus."""
    if path.suffix != ".zip":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return {i.filename: archive.read(i).decode() if i.external_attr == LINK else archive.read(i)
                for i in archive.infolist()}


def expected():
    """How each file of the corpus must end: accepted, or refused with an exit code (refused: with any)."""
    return json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}


def add(form, name, files, how):
    """Write a case and its expectation."""
    data = packed(files)
    path = HOME / form / (name + (".zip" if isinstance(files, dict) else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    EXPECTED.write_text(json.dumps({**expected(), f"{form}/{path.name}": how}, indent=1, sort_keys=True) + "\n")


def keep(form, files, name):
    """Add a case that ended badly, with what should have become of it by the oracle."""
    try:
        valid = FORMS[form].meaning and FORMS[form].meaning(files) is not None
    except INVALID:
        valid = False
    add(form, name, files, "accepted" if valid else "refused")


def reason(error):
    """A short name for why something was refused: the key, and what it was not, without the numbers of the case."""
    key = re.search(r": ([a-z_]+)$", error.where)
    words = re.findall(r"\b[a-z_]\w*", re.sub(r"'[^']*'", "", error.expected.lower()))
    return "-".join([*(key.groups() if key else ()), *(["not"] if words else []), *words[:6]])[:56] or "refused"


def main(cases=1500, most=10, size=5000) -> int:
    """Choose: the smallest accepted case, and the smallest of each of the commonest reasons."""
    import fuzz  # which imports this

    signal.signal(signal.SIGALRM, fuzz.late)
    for form in FORMS:
        best, often = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for number in range(cases):
                files = fuzz.case(form, 1, number)
                how, error, _ = fuzz.verdict(form, files, Path(folder))
                if how not in fuzz.ENDS[:2]:
                    continue
                name, code = how, how
                if error is not None:
                    name, code = reason(error), f"exit {error.exit_code}"
                often[name] = often.get(name, 0) + 1
                if name not in best or len(packed(files)) < len(packed(best[name][0])):
                    best[name] = files, code
        small = {name: found for name, found in best.items() if len(packed(found[0])) <= size}
        chosen = sorted(small, key=lambda name: (name != "accepted", -often[name]))[:most]
        for name in chosen:
            add(form, name, *small[name])
        print(f"{form}: {len(chosen)} of {len(best)} reasons")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
