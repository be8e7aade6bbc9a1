"""What a finished run shows: the loss curve and the display of events."""

import io
import json

from apr.cli.progress import Display
from apr.cli.showcase import HEIGHT, WIDTH, print_curve


def test_the_curve_falls_as_the_losses_do(tmp_path):
    steps = [{"event": "step", "train_loss": 8.0 - i / 100} for i in range(500)]
    events = [{"event": "eval", "val_loss": 8.0}, *steps, {"event": "eval", "val_loss": 3.0}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    out = io.StringIO()
    print_curve(tmp_path, out)
    text = out.getvalue()
    lines = [line.split("┤")[1] for line in text.splitlines() if "┤" in line]
    assert len(lines) == HEIGHT and "8.00" in text and "3.01" in text and "8.000 → 3.000" in text
    middles = [sum(i for i, c in enumerate(line) if c != "⠀") / sum(c != "⠀" for c in line) for line in lines]
    assert middles == sorted(middles) and middles[0] < WIDTH / 8 and middles[-1] > WIDTH * 7 / 8


def test_no_control_characters_without_a_terminal():
    stream = io.StringIO()
    with Display(stream) as display:
        display({"event": "start", "device": "cpu", "synthetic": True, "max_steps": 2, "tokens_per_step": 4})
        display({"event": "step", "step": 0, "train_loss": 1.5, "lr": 1e-3, "tokens_per_sec": 10.0})
        display({"event": "eval", "epoch": -1, "step": 0, "val_loss": 2.0})
        display.warn("[bold]a file name[/bold] \x1b[31mred")
    text = stream.getvalue()
    assert "made-up" in text and "val_loss 2.0000" in text and "[bold]a file name[/bold]" in text
