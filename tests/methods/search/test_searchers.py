"""The law of a search that is stopped, one row per method: gone on with, it was never stopped."""

from functools import cache

import pytest
import torch

from regrow import trace
from regrow.core.tasks import Task
from regrow.data import streams
from regrow.methods import SEARCHERS, MethodKind, find_method
from regrow.nets.cells import Cells, supernet_config
from regrow.surgery import UndoStore
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions
from regrow.training.state import axis_tensors, json_values, read_checkpoint, write_checkpoint

CONFIG = supernet_config((1, 8, 8), 10, width=4, cells=2, nodes=1, stride=1, heads=(0,))
WIRED = supernet_config((1, 8, 8), 10, width=4, cells=2, nodes=2, stride=1, operations=("skip", "sep3", "max"))
STAGED = {"target": 2500.0, "stages": (0, 1), "share": 0.2, "warm": 1, "every": 1, "regrow": 0.5}
STAGED |= {"regrow_filters": 0.5}
SEARCHES = {
    "mgas": (CONFIG, STAGED),
    "trials": (WIRED, {"target": 1500.0, "stages": (1,), "trial_steps": 2}),
    "trials, weights": (
        WIRED,
        {"target": 1500.0, "measure": "nonzero", "levels": ("operations", "filters", "weights"), "stages": (1,)},
    ),
    "darts": (WIRED, {"target": 1e4, "stages": (1,)}),
}
"""What is searched, and with which settings, by the method's name and what is special."""
SCHEDULE = TaskSchedule(epochs=6, batch_size=25, lr=0.02)


@pytest.fixture(scope="module")
def task():
    base = streams.sample_task(streams.load_digits(), 75, 40)
    return Task("digits", base.train, base.test, base.classes)


@cache
def axes_of(wired):
    return trace(Cells(WIRED if wired else CONFIG), torch.zeros(2, 1, 8, 8))


def begun(row):
    """The network, its axes, and the learner."""
    config, settings = SEARCHES[row]
    torch.manual_seed(0)
    return (
        Cells(config),
        axes_of(config is WIRED),
        find_method(MethodKind.SEARCH, named(row)).create(named(row), settings),
    )


def named(row):
    return row.split()[0].strip(",")


@pytest.fixture(scope="module", params=SEARCHES)
def run(request, task):
    """A search that nothing stopped."""
    net, axes, search = begun(request.param)
    state = learn(net, axes, [task], search.learner, SCHEDULE).state
    if named(request.param) != "darts":  # which cuts nothing before its end
        assert any(plan.drop for plan in state.plans)
    if named(request.param) == "mgas":
        assert any(plan.back for plan in state.plans)
    return request.param, net, state


def test_every_search_that_learns_has_a_row():
    assert {*map(named, SEARCHES)} == {*SEARCHERS} - {"blind"}


def test_killed_and_resumed_is_never_stopped(run, task, tmp_path):
    """Stopped after each of the first epochs; where there are two stages: before, at and after the change."""
    row, whole_net, straight = run
    place = tmp_path / "course.safetensors"
    net, axes, search = begun(row)
    state, undo = None, UndoStore()
    for last in (1, 2, 3, 4):

        def stop(now, _, net=net, undo=undo, last=last):
            write_checkpoint(place, net, now, undo)
            if now.epoch == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            options = FitOptions(undo=undo, checkpoint=stop)
            learn(net, axes, [task], search.learner, SCHEDULE, state=state, options=options)
        net, axes, search = begun(row)
        undo = UndoStore()
        net, axes, state = read_checkpoint(place, net, axes, search.learner.state, undo=undo)
        assert state.epoch == last
    state = learn(net, axes, [task], search.learner, SCHEDULE, state=state, options=FitOptions(undo=undo)).state
    assert state.rows == straight.rows and json_values(state.learner) == json_values(straight.learner)
    for name, value in whole_net.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    resumed = axis_tensors(state.learner)
    for name, one in axis_tensors(straight.learner).items():
        assert torch.equal(resumed[name].values, one.values), name


def test_the_order_of_random_operations_is_not_trained(task):
    """With epochs the weights of the network are trained; the order that was drawn stays."""
    torch.manual_seed(0)
    model, drawn = Cells(WIRED), []
    search = find_method(MethodKind.SEARCH, "blind").create("blind", {"target": 1e4})

    def record(state, context):
        drawn.append(state.learner.alpha.values.clone())

    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    learn(model, axes_of(True), [task], search.learner, SCHEDULE, options=FitOptions(checkpoint=record))
    assert len(drawn) > 1 and all(torch.equal(drawn[0], one) for one in drawn)
    assert any(not torch.equal(before[name], one) for name, one in model.named_parameters() if name in before)
