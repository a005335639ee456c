"""``regrow learn`` in several processes: the losses, plans and scores of a single one, whichever rank is killed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distributed import learning
from distributed.processes import finish, free_port, start
from regrow.distributed import SINGLE
from regrow.training.shared_rows import _RankRandomness

WORDS = ("learn", "permuted:digits:2", "--method", "sparsegrow", "--train", "150", "--test", "60", "--epochs", "2")
GROWTH = ("--set", "grow=always", "--set", "width=0.5", "--set", "multiple=1", "--set", "cap=3", "--batch-size", "32")
KILLED = """
import os, signal, sys
from regrow.cli import run_command
from regrow.training import fit
port, *words = sys.argv[1:]
if run_command([*words, "--out", "two"]):
    sys.exit(1)
os.environ["MASTER_PORT"] = port
epochs, broadcast = [], fit.broadcast_tensors

def kill(*given):
    epochs.append(0)
    if len(epochs) == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    broadcast(*given)

fit.broadcast_tensors = kill
sys.exit(run_command([*words, "--out", "killed"]))
"""


def test_two_ranks_have_losses_plans_and_scores_of_one():
    """The processes also compare batch statistics, gradients and random draws of shared rows."""
    ((said, errors, code), (_, complaints, other)) = finish(start(learning.__file__))
    assert (code, other) == (0, 0), errors + complaints
    two = json.loads(said)
    for method in learning.METHODS:
        one = json.loads(json.dumps(learning.train(method, SINGLE)))
        assert one["losses"] == pytest.approx(two[method]["losses"], rel=1e-10), method
        assert one["sums"] == pytest.approx(two[method]["sums"], rel=1e-10), method
        assert (one["rows"], one["plans"]) == (two[method]["rows"], two[method]["plans"]), method
    assert one["plans"]


def test_a_killed_rank_ends_both_and_the_resumed_run_is_that_of_undisturbed_ones(regrow, tmp_path):
    killed = finish(start("-c", KILLED, str(free_port()), *WORDS, *GROWTH, cwd=tmp_path))
    assert [code for _, _, code in killed] == [4, -9]
    assert "rank 0 of 2 lost the connection to another rank, which has ended" in " ".join(killed[0][1].split())
    assert not (tmp_path / "killed").exists() or not (tmp_path / "killed" / "model.safetensors").exists()
    assert regrow(*WORDS, *GROWTH, "--out", "one")[0] == 0
    resumed = finish(start("-m", "regrow", *WORDS, *GROWTH, "--out", "killed", cwd=tmp_path))
    assert [code for _, _, code in resumed] == [0, 0], resumed
    for name in ("ledger.json", "model.safetensors", "shapes.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert (tmp_path / "one" / "ledger.json").read_bytes() == (tmp_path / "two" / "ledger.json").read_bytes()
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in one)
    rows = [json.loads((tmp_path / out / "metrics.jsonl").read_text().splitlines()[-1]) for out in ("one", "two")]
    assert rows[0] == rows[1] and rows[0]["what"] == "matrix"


def test_a_rank_draws_from_the_generator_of_its_own_gpu(monkeypatch):
    gpus = [torch.Generator().manual_seed(3) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)

    def states():
        return [one.get_state().tolist() for one in (torch.default_generator, *gpus)]

    torch.manual_seed(5)
    before, drawn, after = states(), [], []
    for rank in (0, 1):
        torch.manual_seed(5)
        _RankRandomness(rank, torch.device("cuda:1")).restore()
        assert states() == before
        random = _RankRandomness(rank, torch.device("cuda:1"))
        drawn.append(torch.rand((), generator=gpus[1]))
        random.restore()
        after.append(states())
    assert drawn[0] != drawn[1]
    assert after[0] == after[1]
    assert after[0][0] != before[0], "the next pass would draw the same"
    assert after[0][1:] == before[1:]
