"""What SECURITY.md promises: links, bombs, templates, signals, and devices that are not here."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import CHATML
from fake_driver import T4, TWELVE, FakeDriver, install_cupy
from small_model import write_model

from apr import paths
from apr.cli.main import main
from apr.errors import FormatError, StorageError, UnavailableError
from apr.files import write_atomic
from apr.infer.chat import ChatTemplate
from apr.tools import doctor
from apr.train.checkpoint import latest
from apr.train.log import NAME, RunLog
from apr.train.run import DirectoryLock

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """The cache's folder is not the user's."""
    monkeypatch.delenv("APR_DEVICE", raising=False)
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 10
    for file, test in named:
        assert re.search(rf"def {test}\b" if test else "def test_", (ROOT / file).read_text()), f"{file}::{test}"


@pytest.mark.parametrize("spoil", ["others may write", "another user's", "a link"])
def test_F9_cupys_cache_in_a_folder_where_others_could_replace_it(monkeypatch, tmp_path, spoil):
    monkeypatch.setenv("CUPY_CACHE_DIR", "")
    parent = tmp_path / "cache"
    (tmp_path / "elsewhere" if spoil == "a link" else parent).mkdir(mode=0o700)
    if spoil == "others may write":
        parent.chmod(0o777)
    elif spoil == "a link":
        parent.symlink_to(tmp_path / "elsewhere")
    else:
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    chosen = Path(paths.prepare_cupy_cache())
    assert parent not in chosen.parents and chosen.stat().st_mode & 0o777 == 0o700


def test_F11_doctor_says_that_the_compiler_is_missing(monkeypatch, capsys):
    def missing():
        raise UnavailableError("NVRTC", "libnvrtc.so.12", "none", "pip install nvidia-cuda-nvrtc-cu12")
    monkeypatch.setattr(doctor, "import_cupy", missing)
    FakeDriver().use(monkeypatch)
    assert main(["doctor", "--json"]) == 0
    cannot = {c["what"]: c["why"] for c in json.loads(capsys.readouterr().out)["cannot"]}
    assert "libnvrtc.so.12" in cannot["compile kernels"]


@pytest.mark.parametrize("name", ["lock", NAME, "run.json"])
def test_B10_a_run_directory_is_not_written_through_a_link(tmp_path, name):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious\n")
    run.mkdir()
    (run / name).symlink_to(victim)
    if name == "run.json":
        write_atomic(run / name, b"{}")
        assert not (run / name).is_symlink()
    else:
        with pytest.raises(StorageError, match=name), DirectoryLock(run) if name == "lock" else RunLog(run, [], 0):
            pass
    assert victim.read_text() == "precious\n"


BOMB = """
import re, sys
from collections import Counter
from pathlib import Path
import pyarrow.parquet
from apr.data.text import documents
def peak():  # not that of getrusage, in which the parent's counts
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
print(sum(map(len, documents([Path(sys.argv[1])], "content", Counter()))), peak() - before)
"""


def test_B9_a_parquet_file_takes_no_more_memory_than_a_few_of_its_rows(tmp_path):
    """256 rows of a mebibyte, the same one, in a file of a few hundred bytes."""
    path, text = tmp_path / "bomb.parquet", "a" * 2**20
    pyarrow.parquet.write_table(pyarrow.table({"content": pyarrow.array([text] * 256).dictionary_encode()}), path,
                                compression="zstd")
    assert path.stat().st_size < 2**12
    done = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True)
    characters, kib = map(int, done.stdout.split())
    assert characters == 256 * 2**20 and kib < 128 * 2**10, f"{kib >> 10} MiB"


RENDER = "m: template"
HIDDEN = ["messages['__class__']", "messages | attr('__class__')", "'{x.__class__}'.format_map({'x': messages})",
          "lipsum.__globals__", "joiner.__init__", "raise_exception.__globals__", "strftime_now.__globals__",
          "dict.__code__", "self.__init__", "self._TemplateReference__context", "namespace().__class__",
          "bos_token.__class__", "''.join.__self__", "(messages | map('upper')).gi_frame",
          "messages | map(attribute='__class__') | first", "x.__class__"]
REFUSED = {
    "{{ '{0.__class__.__mro__}'.format(messages) }}": "SecurityError", "{{ cycler.__init__.__globals__ }}":
    "SecurityError", "{{ strftime_now.__globals__['os'] }}": "SecurityError",
    "{{ messages[0].update({'a': 1}) }}": "SecurityError", "{% import 'os' as os %}": "TypeError",
    "{% extends '/etc/passwd' %}": "TypeError", "{% from '/etc/passwd' import x %}": "TypeError",
    "{% debug %}": "TemplateSyntaxError", "{% do messages.append(1) %}": "TemplateSyntaxError",
    "{{ 'a' | center(10**10) }}": "MemoryError", "{{ 'a'.ljust(10**10) }}": "MemoryError",
    "{{ ('a' * 10**9) | length }}": "MemoryError", "{{ messages | tojson(indent=10**9) }}":
    "MemoryError", "{{ messages | batch(10**9, 'x') | list }}": "MemoryError", "{{ 'a' * 5000000 }}": "4194304",
    "{{" + "(" * 50_000 + "1" + ")" * 50_000 + "}}": "RecursionError", "{% if 1 %}" * 15_000: "RecursionError",
    "{{ " + "-" * 100_000 + "1 }}": "RecursionError", "{{ " + "[" * 100_000: "RecursionError",
    "{{ '\\ud800' }}": "UnicodeEncodeError", "{{ strftime_now('\\ud800') }}": "UnicodeEncodeError"}


def test_H6_a_template_sees_no_attribute_that_it_should_not():
    """Each is undefined, which prints as nothing."""
    text = "".join("[{{ " + expression + " }}]" for expression in HIDDEN)
    written = ChatTemplate(text, {"bos_token": "<s>"}, RENDER).render([[{"role": "user", "content": "x"}]])
    assert written == ["[]" * len(HIDDEN)]


@pytest.mark.parametrize("text", REFUSED, ids=lambda t: t[:40])
def test_H6_a_template_that_asks_for_too_much_is_refused(text):
    with pytest.raises(FormatError, match=REFUSED[text]) as caught:
        ChatTemplate(text, {}, RENDER).render([[{"role": "user", "content": "x"}]])
    assert str(caught.value).startswith(RENDER) and len(str(caught.value)) <= 600


def test_H6_one_long_computation_is_stopped_too():
    """A product in C, which no check between two statements could end."""
    begin = time.monotonic()
    with pytest.raises(FormatError, match="ends soon"):
        ChatTemplate("{{ (2**(2**33)) is none }}", {}, RENDER).render([[]])
    assert time.monotonic() - begin < 10


def test_H6_chat_templates_that_are_meant_work():
    assert ChatTemplate(CHATML, {}, RENDER).render([[{"role": "user", "content": "x"}]])[0].endswith("assistant\n")


BLOCKED = """
import os, sys, time
from apr.cli.main import main
real, count = os.rename, 0
def rename(source, target, **options):
    global count
    count += os.path.basename(os.fspath(target)).startswith('step-')
    if count == 3:
        print('saving', flush=True)
        while True:  # a disk that takes for ever; signal.pause() would miss a signal that comes just before it
            time.sleep(0.001)
    return real(source, target, **options)
os.rename = rename
sys.exit(main(sys.argv[1:]))
"""


def test_E2_a_second_signal_ends_a_run_at_once_and_what_was_complete_stays(folder, tmp_path):
    """The run stands still while it saves its third checkpoint, which it will therefore never finish."""
    child = subprocess.Popen([sys.executable, "-c", BLOCKED, "pretrain", "--config", str(folder / "run.yaml"),
                              "--dataset", str(folder / "texts"), "--device", "cpu", "--run-dir",
                              str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert child.stdout.readline() == b"saving\n"
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) in (-signal.SIGINT, -signal.SIGTERM)
    finally:
        child.kill()
        child.communicate()
    found = latest(tmp_path / "run" / "ckpt", pytest.fail)
    assert found.state["step"] == 8 and "epoch-000.apr" in os.listdir(tmp_path / "run" / "ckpt")


@pytest.fixture
def twelve(monkeypatch, tmp_path):
    install_cupy(monkeypatch, tmp_path, {"cupy-cuda12x": "14.2.0"}, TWELVE)


ASKED = {"run": ["a"], "qa": [], "parity": [], "trace": ["--payload", "--prompt", "a"], "bisect": []}


@pytest.mark.parametrize("name", ASKED)
def test_G1_cuda_that_is_not_here_is_never_the_cpu(twelve, monkeypatch, model, capsys, name):
    FakeDriver(fails={"cuInit": 100}).use(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([name, str(model), *ASKED[name], "--device", "cuda"]) == 9
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("apr: GATE-GPUTRAIN-002") and said.err.count("\n") == 1


def test_G1_auto_says_what_it_took_and_records_it(twelve, monkeypatch, model, capsys):
    FakeDriver(fails={"cuInit": 100}).use(monkeypatch)
    assert main(["run", str(model), "a", "--max-tokens", "1", "--json", "--device", "auto"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["device"] == "cpu" and said.err.startswith("device: cpu (reason: ")


@pytest.mark.parametrize(("fake", "words"), [
    (FakeDriver(version=11040), ["the driver supports CUDA 11.4", "cupy-cuda12x 14.2.0", "driver 11.4"]),
    (FakeDriver(devices=[T4]), ["capability 7.5", "8.0"]),
    (FakeDriver(fails={"cuInit": 34}, names=False), ["CUDA_ERROR_STUB_LIBRARY"])], ids=["old", "sm_75", "stub"])
def test_G2_a_driver_or_gpu_that_is_too_old_is_named_with_what_is_wanted(twelve, monkeypatch, model, capsys, fake,
                                                                         words):
    fake.use(monkeypatch)
    assert main(["run", str(model), "a", "--device", "cuda"]) == 9
    said = capsys.readouterr().err
    assert [w for w in words if w not in said] == []
