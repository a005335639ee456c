"""``regrow prune`` in several processes: the files are those of a single one, byte for byte."""

import json

import torch

from distributed.processes import finish, free_port, start

WORDS = ("--method", "flap", "--keep", "0.7", "--source", "news", "--source", "code", "--tokens", "160")
WORDS += ("--eval-tokens", "96")
"""Five calibration windows and three for evaluation: ranks get unequal shares."""
FILES = ("ledger.json", "model.safetensors", "shapes.json", "axes.json", "probe.st", "metrics.jsonl")
TWICE = """
import os, sys
from regrow.cli import run_command
from regrow.streaming import requirements
port, *words = sys.argv[1:]
codes = [run_command([*words, "--out", "whole"])]
os.environ["MASTER_PORT"] = port  # other processes meet here, as far as torch knows
requirements.WHOLE_COPIES = 1e9 if os.environ["RANK"] == "0" else 0  # rank 0 decides that blocks are read one by one
sys.exit(max(*codes, run_command([*words, "--memory", "64GiB", "--out", "streamed"])))
"""


def test_two_processes_write_the_files_of_one(regrow, tiny_language_model, tmp_path):
    words = ("prune", str(tiny_language_model), *WORDS, "--seq-len", "32")
    two = start("-c", TWICE, str(free_port()), *words, cwd=tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two: the probe says how many it was made with
    assert regrow(*words, "--out", "one")[0] == 0
    torch.set_num_threads(threads)
    (said, errors, code), (silence, complaints, other) = finish(two)
    assert (code, other) == (0, 0), errors + complaints
    assert not silence and not complaints
    for out in ("whole", "streamed"):
        assert f"the result is in {out}" in said
        both = tmp_path / "one", tmp_path / out
        assert {path.name for path in both[0].iterdir()} == {path.name for path in both[1].iterdir()}
        for name in FILES[: -1 if out == "streamed" else None]:
            assert both[0].joinpath(name).read_bytes() == both[1].joinpath(name).read_bytes(), (out, name)
        logs = [[json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()] for one in both]
        # The check of a streamed run counts blocks, and says nothing else about quality.
        assert [row for row in logs[0] if row["what"] != "verify"] == [
            row for row in logs[1] if row["what"] != "verify"
        ]
        settings = [json.loads((one / "run.json").read_text())["settings"] for one in both]
        assert settings[0] == settings[1]
