"""Train a small network on two tasks by a method of continual learning, in this process or several."""

import dataclasses
import json
import sys

import torch
import torch.nn.functional as F
from torch import nn

from regrow import trace
from regrow.core.errors import InputError
from regrow.core.tasks import Examples, Task
from regrow.distributed import SINGLE, read_ranks
from regrow.distributed.parallel import Parallel, gather_rows
from regrow.jobs.learn import build_learner
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions
from regrow.training.shared_rows import share_rows

METHODS = {
    "naive": {},
    "replay": {"memory": 30, "logit_weight": 0.5},
    "ewc": {"samples": 20},
    "laplace": {"samples": 20, "boundaries": "detected"},
    "lwf": {},
    "wsn": {},
    "sparsegrow": {"grow": "always", "memory": 20, "width": 0.5, "multiple": 1, "cap": 3.0},
}


class Net(nn.Module):
    """Convolutions with BatchNorm, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.first, self.second = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.second(F.relu(self.first(x.flatten(1))))


def train(method, ranks):
    """Return losses per step, scores per task, sums of parameters, and plans."""
    torch.manual_seed(0)
    net = Net().double()
    x, y = torch.randn(2, 47, 1, 6, 6).double(), torch.randint(0, 2, (2, 47))
    parts = slice(37), slice(37, 47)
    tasks = [
        Task(f"t{i}", *(Examples(x[i, part], y[i, part] + 2 * i) for part in parts), (2 * i, 2 * i + 1))
        for i in range(2)
    ]
    learner, losses = build_learner(method, METHODS[method], 0), []
    inner = learner.loss

    def loss(state, context, step):
        result = inner(state, context, step)
        losses.append(float(result.value.detach()))
        return result

    schedule = TaskSchedule(scenario="class", epochs=2, batch_size=8, lr=0.05)
    result = learn(
        net,
        trace(net, x[0, :2]),
        tasks,
        dataclasses.replace(learner, loss=loss),
        schedule,
        options=FitOptions(parallel=Parallel(ranks, by_rows=True)),
    )
    return {
        "losses": losses,
        "rows": result.state.rows,
        "sums": [float(one.detach().double().sum()) for one in net.state_dict().values()],
        "plans": [plan.to_json() for plan in result.state.plans],
    }


def check_rows(ranks):
    """Compare losses, gradients, statistics and random draws of shared rows with those of a single process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.0), nn.Linear(5, 2)).double()
    inputs, results = torch.randn(5, 3).double(), []
    for active in (SINGLE, ranks):
        with share_rows(model, active):
            model.zero_grad()
            model[1].reset_running_stats()
            loss = model(inputs).square().mean() + model[0].weight.square().sum()
            loss.backward()
        if active.several:
            Parallel(ranks, by_rows=True).reduce([*model.parameters()], 0.0)
        numbers = [loss, *(one.grad for one in model.parameters()), *model.buffers()]
        results.append([one.detach().clone() for one in numbers])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)

    before = torch.get_rng_state()
    with share_rows(model, ranks):
        model(inputs)
        assert torch.equal(before, torch.get_rng_state())  # nothing was drawn
        dropout = nn.Dropout(0.5).double()
        with share_rows(dropout, ranks):
            first, second = dropout(torch.ones(40, 3)), dropout(torch.ones(40, 3))
    assert not torch.equal(first[:20], first[20:]) and not torch.equal(first, second)
    draws = [torch.rand(1).item(), first.sum().item()]
    rows = gather_rows(ranks, [draws])
    assert all(row == rows[0] for row in rows)

    model.eval()
    with share_rows(model, ranks):
        assert len(model(inputs[:1])) == 1  # fewer than ranks: whole on each
    flat = nn.Flatten(0)
    with share_rows(flat, ranks):
        try:
            flat(inputs)
        except InputError as error:
            assert "cannot put together" in str(error)
        else:
            raise AssertionError


if __name__ == "__main__":
    ranks = read_ranks()
    from regrow.distributed.parallel import connected

    with connected(ranks):
        check_rows(ranks)
        results = {method: train(method, ranks) for method in sys.argv[1:] or METHODS}
        if ranks.leads:
            sys.stdout.write(json.dumps(results))
