"""A drawn sample of malformed inputs to every command; ``recipes/malformed_inputs.py`` has the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "malformed_inputs.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="every input runs in a forked child")
def test_a_sample_of_malformed_inputs_leaves_one_line_and_nothing_else(tmp_path):
    words = [
        sys.executable,
        str(RECIPE),
        "--count",
        "40",
        "--seed",
        "5",
        "--no-permissions",
        "--out",
        str(tmp_path / "found.jsonl"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "40 inputs" in done.stdout and "faults {}" in done.stdout
