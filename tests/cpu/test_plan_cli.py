"""`apr plan` through the command line: the table, what it is made from, whether it fits, and what to lower."""

import json

import pytest
from fake_driver import A100, H200, T4, found
from models import YAML

from apr.arena import RESERVE
from apr.buffers import plan, table
from apr.cli import plan as command
from apr.cli.main import main
from apr.driver import DriverInfo
from apr.presets import qwen2_0_5b, tiny

NONE = DriverInfo(False, "no NVIDIA driver", "", ())
SHAPE = ["--preset", "qwen2_0_5b", "--batch-size", "8", "--seq-length", "2048"]
SMALL = ["--preset", "tiny", "--seq-length", "8"]


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Which GPUs there are: none, unless a test calls this."""
    def have(*devices):
        monkeypatch.setattr(command, "probe", lambda: found(*devices) if devices else NONE)

    have()
    return have


def test_the_table_without_a_gpu(capsys):
    assert main(["plan", *SHAPE]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:-1] == table(plan(qwen2_0_5b, 8, 2048, "bf16")) and err == ""
    assert out.splitlines()[-1] == "no GPU here to fit; 20.02 GiB are needed"


def test_it_fits_or_not_on_the_gpu_here(gpus, capsys):
    gpus(H200, A100)
    assert main(["plan", *SHAPE]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fits: 20.02 of 150.00 GiB (cuda:0, NVIDIA H200)"
    assert main(["plan", *SHAPE, "--device", "cuda:1"]) == 0
    assert "80.00 GiB (cuda:1, NVIDIA A100)" in capsys.readouterr().out
    gpus(T4)
    assert main(["plan", *SHAPE]) == 11
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("total") and err.count("\n") == 1
    assert "batch 8 of 2048 tokens in bf16: expected 20.02 GiB" in err and "found 15.00 GiB (cuda:0, Tesla T4)" in err
    assert "lower --batch-size to " in err


@pytest.mark.parametrize(("gib", "code"), [(20.03, 0), (20.01, 11), (12, 11), (9.1, 11), (1, 11)])
def test_what_is_advised_fits(capsys, gib, code):
    """The largest batch that fits, or else a length; and the batch above it does not."""
    assert main(["plan", *SHAPE, "--memory-gib", str(gib)]) == code
    err = capsys.readouterr().err
    if code == 0:
        return
    room, words = int(gib * 2**30) - RESERVE, err.split()
    if "--seq-length" in err:
        length = int(words[words.index("--seq-length") + 2])
        assert plan(qwen2_0_5b, 1, length, "bf16").bytes <= room < plan(qwen2_0_5b, 1, 2 * length, "bf16").bytes
    elif "--batch-size" in err:
        batch = int(words[words.index("--batch-size") + 2])
        assert plan(qwen2_0_5b, batch, 2048, "bf16").bytes <= room < plan(qwen2_0_5b, batch + 1, 2048, "bf16").bytes
    else:
        assert "take a smaller model" in err and plan(qwen2_0_5b, 1, 1, "bf16").bytes > room


def test_json(gpus, capsys):
    gpus(T4)
    assert main(["plan", *SHAPE, "--json"]) == 11
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    p = plan(qwen2_0_5b, 8, 2048, "bf16")
    assert [r["buffer"] for r in rows[:-1]] == [b.name for b in p.buffers]
    assert sum(r["bytes"] for r in rows[:-1]) == sum(p.by_role().values()) == sum(rows[-1]["roles"].values())
    assert (rows[-1]["total"], rows[-1]["fits"], rows[-1]["have"]) == (p.bytes, False, 15 << 30)
    gpus()
    assert main(["plan", *SHAPE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["have"] is None


def test_a_config_file_and_flags_over_it(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\ntrain: {batch_size: 4, max_seq_len: 64, precision: fp32}\n")

    def total(*flags) -> int:
        assert main(["plan", "--config", str(path), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["total"]

    assert total() == plan(tiny, 4, 64, "fp32").bytes
    assert total("--batch-size", "2", "--precision", "bf16") == plan(tiny, 2, 64, "bf16").bytes
    path.write_text(YAML)
    assert total() > 0
    assert main(["plan", "--preset", "tiny", "--seq-length", "512", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["total"] == plan(tiny, 16, 512, "bf16").bytes


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 2, "--preset"), (["--preset", "tiny", "--config", "x"], 2, "not allowed with"),
    (["--preset", "tiny", "--seq-length", "513"], 2, "max_position_embeddings (512)"),
    (["--preset", "tiny", "--seq-length", "0"], 2, "max_seq_len"), (["--preset", "tiny", "--batch-size", "0"], 2, "_"),
    ([*SMALL, "--memory-gib", "0"], 2, "--memory-gib"), ([*SMALL, "--memory-gib", "nan"], 2, "found nan"),
    ([*SMALL, "--device", "cpu"], 2, "cuda or cuda:N"), ([*SMALL, "--device", "cuda"], 9, "no NVIDIA driver"),
    (["--preset", "tinny"], 2, "did you mean 'tiny'"), (["--config", "none.yaml"], 3, "none.yaml")], ids=str)
def test_mistakes(capsys, arguments, code, words):
    assert main(["plan", *arguments]) == code
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""
