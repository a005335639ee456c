"""``regrow.learn``: any network, data, loss and optimizer; equal to the command on the same tasks."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow
from regrow.core.tasks import first_examples
from regrow.data.streams import load_digits, permuted_tasks
from regrow.nets.vision import small

INPUTS = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))


def net(outputs=2):
    """A small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs))


def tasks(labels):
    """Two tasks, each a loader and a data set for testing."""
    data = [TensorDataset(INPUTS, labels(i)) for i in (0, 1)]
    return [(DataLoader(one, batch_size=16), one) for one in data]


TARGETS = {
    "classification": (2, lambda i: (INPUTS[:, i] > 0).long()),
    "multi-label": (2, lambda i: (INPUTS[:, i : i + 2] > 0).float()),
    "regression": (1, lambda i: INPUTS[:, i : i + 1] * 2),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_any_labels_are_learned(kind):
    outputs, labels = TARGETS[kind]
    learned = regrow.learn(net(outputs), tasks(labels), method="naive", epochs=20, lr=0.05, batch_size=16)
    rows = learned.scores.rows
    assert rows[0][0] > learned.scores.before[0]
    assert rows[1][1] > rows[0][1]
    assert rows[1][1] > (0.9 if kind != "regression" else -0.3)


@pytest.mark.parametrize("method", ["sparsegrow", "ewc", "replay"])
def test_data_sets_that_are_read_equal_tasks_in_memory(method):
    """Bit for bit, as does a finished network whose data were read from data sets."""
    base = permuted_tasks(load_digits(), 2)
    read = [
        tuple(
            [(x, int(y)) for x, y in zip(some.inputs, some.labels, strict=True)]
            for some in (first_examples(part, 200) for part in (task.train, task.test))
        )
        for task in base
    ]
    memory = [
        regrow.data.streams.Task(one.name, first_examples(one.train, 200), first_examples(one.test, 200), one.classes)
        for one in base
    ]
    found = []
    for given in (read, memory):
        model, _ = small("mlp:20", (1, 8, 8), 10, 0)
        learned = regrow.learn(model, given, method=method, epochs=2)
        found.append((learned.scores.rows, model.state_dict()))
    (rows, weights), (again, same) = found
    assert rows == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_an_optimizer_of_ones_own():
    given = tasks(TARGETS["classification"][1])
    by_name = regrow.learn(net(), given, method="naive", epochs=2, lr=0.1).model
    own = regrow.learn(
        net(), given, method="naive", epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    ).model
    other = regrow.learn(net(), given, method="naive", epochs=2, optimizer=partial(torch.optim.Adam, lr=0.1)).model
    assert torch.equal(by_name[0].weight, own[0].weight)
    assert not torch.equal(own[0].weight, other[0].weight)


@pytest.mark.parametrize("method", ["ewc", "laplace"])
def test_strengths_are_relative_to_the_rate_of_ones_own_optimizer(method):
    given, sgd = tasks(TARGETS["classification"][1]), partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    by_name = regrow.learn(net(), given, method=method, epochs=2, lr=0.1).model
    own = regrow.learn(net(), given, method=method, epochs=2, optimizer=sgd).model
    assert torch.equal(by_name[0].weight, own[0].weight)


def test_the_global_generator_is_left_as_it_was():
    model, state = net(), torch.get_rng_state()
    regrow.learn(model, tasks(TARGETS["classification"][1]), method="laplace", epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_grows_is_the_result():
    model, _ = small("mlp:12", (1, 8, 8), 10, 0)
    given = {"grow": "always", "cap": 4.0}
    learned = regrow.learn(model, permuted_tasks(load_digits(), 2), method="sparsegrow", settings=given)
    assert learned.model is model
    assert learned.plans
    assert "average" in str(learned)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "ewc", "loss": nn.MSELoss()}, "needs probabilities of classes or tokens"),
        ({"method": "nothing"}, "there is no method 'nothing'"),
    ],
)
def test_mistakes_name_the_remedy(more, words):
    with pytest.raises(ValueError, match=words):
        regrow.learn(net(), tasks(TARGETS["classification"][1]), **more)
