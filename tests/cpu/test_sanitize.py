"""What tests/gpu/sanitize.py reads in the output of compute-sanitizer: a finding, none, or no run at all."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu" / "sanitize.py"
spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)
RACES = """
========= Error: Race reported between Write access at attention_backward_dkv+0x78f0
=========     and Read access at attention_backward_dkv+0x2470 [128 hazards]
========= Error: Race reported between Read access at nvjet_sm90_tst_64x8_64x16_1x1_h_bz_splitK_NNT+0xaf0
=========     and Write access at nvjet_sm90_tst_64x8_64x16_1x1_h_bz_splitK_NNT+0x2eb0 [520 hazards]
done
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


@pytest.mark.parametrize(("code", "output", "found"), [
    (0, "done\n========= ERROR SUMMARY: 0 errors\n", 0),
    (0, "done\n========= ERROR SUMMARY: 1 error\n", 1),
    (0, RACES, 1),  # cuBLASLt's does not count
    (0, RACES.replace("attention_backward_dkv+0x7", "nvjet_sm90_x+0x7"), 0),
    (0, "done\n", None),  # the tool did not run
    (0, "========= ERROR SUMMARY: 0 errors\n", None),  # the work was not done
    (-9, "done\n========= ERROR SUMMARY: 0 errors\n", None),
])
def test_findings(code, output, found):
    assert sanitize.findings(code, output) == found
