"""The law of a search that is stopped, one row per method: gone on with, it was never stopped."""

import pytest
import torch

from regrow import trace
from regrow.data import streams
from regrow.methods import SEARCHERS, searcher_entry
from regrow.nets.cells import Cells, whole
from regrow.runs.courses import read_course, write_course
from regrow.runs.learning import Schedule, learn
from regrow.tasks import Task

CONFIG = whole((1, 8, 8), 10, width=4, cells=2, nodes=1, stride=1, heads=(0,))
SCHEDULE = Schedule(epochs=6, batch_size=50, lr=0.02)
STAGED = {"target": 2500.0, "stages": (0, 1), "share": 0.2, "warm": 1, "every": 1, "regrow": 0.5}
SEARCHES = {
    "mgas": STAGED | {"regrow_filters": 0.5, "regrow_weights": 0.3},
    "mgas as it was": STAGED | {"revive": "old", "press": 0.01, "floor": 1.0},
    "mgas by its authors' controller": STAGED | {"controller": "feedback"},
    "darts": {"target": 1e4, "stages": (0, 1)},
    "darts with edges": {"target": 1e4, "stages": (0, 1), "edges": True, "warm": 0.5},
    "darts of partial channels": {"target": 1e4, "stages": (0, 1), "edges": True, "partial": 2},
    "gold_nas": {"target": 2500.0, "stages": (1,), "warm": 1},
}


@pytest.fixture(scope="module")
def task():
    base = streams.fewer(streams.digits_task(), 100, 40)
    return Task("digits", base.train, base.test, base.classes)


@pytest.fixture(scope="module")
def axes():
    return trace(network(), torch.zeros(2, 1, 8, 8))


def network():
    torch.manual_seed(0)
    return Cells(CONFIG)


def learner(row):
    name = row.partition(" ")[0]
    return searcher_entry(name).made(name, SEARCHES[row])


@pytest.fixture(scope="module", params=SEARCHES)
def run(request, task, axes):
    """A search that nothing stopped."""
    own, net = learner(request.param), network()
    _, course = learn(net, axes, [task], own, SCHEDULE)
    return request.param, own, net, course


def test_every_search_that_learns_has_a_row():
    assert {row.partition(" ")[0] for row in SEARCHES} == {*SEARCHERS} - {"blind"}


@pytest.mark.parametrize("last", [1, 2, 3, 4])  # of two stages: before, at and after the change
def test_killed_and_resumed_is_never_stopped(run, task, axes, tmp_path, last):
    row, straight, whole_net, course = run
    place = tmp_path / "course.safetensors"
    own, net = learner(row), network()

    def stop(now, _):
        write_course(place, net, own, now)
        if now.epoch == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(net, axes, [task], own, SCHEDULE, on_epoch=stop)
    again, other = learner(row), network()
    here, stood = read_course(place, other, axes, again)
    _, stood = learn(other, here, [task], again, SCHEDULE, course=stood)
    assert stood.rows == course.rows and again.values["history"] == straight.values["history"]
    for name, value in whole_net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    for name, one in straight.tensors.items():
        assert torch.equal(again.tensors[name].values, one.values), name
