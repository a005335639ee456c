"""Training by several ranks: the loss curve of a single process."""

import json

import pytest

from distributed.processes import finish, start

DISTIL = """
import copy, json, sys
from pathlib import Path
import torch
from torch import nn
from regrow import trace
from regrow.distributed import SINGLE, read_ranks
from regrow.distributed.parallel import Parallel
from regrow.methods.recovery import RecoveryTask, distil
from regrow.core.plan import Plan
from regrow.core.sources import Batch, Source

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Killed(Exception):
    pass

def train(ranks, folder, end=99):
    def progress(done, total, what):
        if done > end:
            raise Killed
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(20, 8), *(Block() for _ in range(3)), nn.Linear(8, 20))
    dense[4].weight = dense[0].weight  # tied, as in language models
    ids = torch.randint(20, (19, 2, 6))
    batches = [Batch((one,), labels=one.roll(-1, 1)) for one in ids]
    axes = trace(dense, ids[0])
    assert len([block for block in axes.recording.blocks if block.path]) == 3
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[1].up.weight.mul_(0.1)
    task = RecoveryTask(
        model, dense, axes, Plan(), [Source("a", batches)], 0, folder / "state", progress=progress,
        parallel=Parallel(ranks),
    )
    history = distil.distil(task, distil.Settings(lr=0.01, passes=3, checks=3))["history"]
    assert all(not one.requires_grad or one.numel() for one in model.parameters())
    return [one["held_out"] for one in history], [float(one.detach().double().sum()) for one in model.parameters()]

if __name__ == "__main__":
    ranks, place = read_ranks(), Path(sys.argv[1])
    from regrow.distributed.parallel import connected
    with connected(ranks):
        folder = place / "two"
        if ranks.leads:
            folder.mkdir()
        try:
            train(ranks, folder, 8)
        except Killed:
            torch.distributed.barrier()
            assert (folder / "state").is_file()
        else:
            raise AssertionError("it was not stopped")
        history, sums = train(ranks, folder)
        own = torch.tensor(sums, dtype=torch.float64)
        least = own.clone()
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        assert torch.equal(own, least)  # every rank has the trained network
        if ranks.leads:
            print(json.dumps([history, sums]))
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads)  # one that runs while the process ends may abort it
"""


def test_two_ranks_have_the_loss_curve_of_one_and_resume_from_checkpoints(tmp_path):
    two = start("-c", DISTIL, str(tmp_path), cwd=tmp_path)
    names = {"__name__": "distil"}
    exec(DISTIL, names)
    (tmp_path / "one").mkdir()
    history, weights = names["train"](names["SINGLE"], tmp_path / "one")
    (said, errors, code), (_, complaints, other) = finish(two)
    assert (code, other) == (0, 0), errors + complaints
    curve, sums = json.loads(said)
    assert curve == pytest.approx(history, abs=1e-5)
    assert sums == pytest.approx(weights, abs=1e-3)
    assert history[-1] < history[0]
    # A finished training is read from the file that two ranks wrote: nothing is trained again.
    resumed, _ = names["train"](names["SINGLE"], tmp_path / "two")
    assert resumed == pytest.approx(history, abs=1e-5)


def test_an_uneven_share_is_refused():
    from regrow.distributed import ProcessRank
    from regrow.distributed.parallel import Parallel

    with pytest.raises(ValueError, match="a step takes 4 batches, which 3 processes cannot share evenly"):
        Parallel(ProcessRank(0, 3)).share([1, 2, 3, 4])


def test_a_checkpoint_that_some_ranks_cannot_read_is_refused(monkeypatch):
    from types import SimpleNamespace

    from regrow.distributed.parallel import ALONE
    from regrow.methods import recovery as fitting
    from regrow.store import StoreError

    task = SimpleNamespace(checkpoint=None, parallel=ALONE)
    assert fitting._read_state(task) is None
    monkeypatch.setattr(fitting, "everywhere", lambda ranks, holds: False)
    with pytest.raises(StoreError, match="cannot be read by all processes; make room"):
        fitting._read_state(task)
