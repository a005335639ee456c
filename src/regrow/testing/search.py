"""Laws of architecture-search methods."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from regrow.core.axes import AxisGraph
from regrow.core.tasks import first_examples
from regrow.evaluation import dense
from regrow.jobs.spaces import extract_network
from regrow.methods.search import Search
from regrow.methods.search.space import SearchState
from regrow.nets.cells import Cells, supernet_config
from regrow.nets.loaded import Origin
from regrow.surgery import UndoStore
from regrow.surgery.gate import parametrize
from regrow.testing.continual import (
    Law,
    Subject,
    assert_frozen,
    assert_same_training,
    make_tasks,
    train_in_pieces,
)
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions, Fitted, finish_training
from regrow.training.learner import Boundary, Context, Event

SIDE, CLASSES = 8, 4
SPACE = supernet_config(
    (1, SIDE, SIDE), CLASSES, width=4, cells=2, nodes=2, stride=1, operations=("skip", "sep3", "max"), heads=(0,)
)

ORIGIN = Origin("cells", "cells", SPACE, "cells")
SCHEDULE = TaskSchedule(epochs=4, batch_size=48, lr=0.02)
# Measure → how much may be left of about 3,000
TARGETS = {"params": 1500.0, "nonzero": 1200.0}
TASK = make_tasks(1, SIDE)[0]


def make_network() -> tuple[Cells, AxisGraph]:
    """Return the search space as a network with fixed random weights, and its axes; torch's random seed is set."""
    axes = replace(_trace_space(), network=uuid4().hex)  # as if it were traced anew
    torch.manual_seed(0)
    return Cells(SPACE), axes


@cache
def _trace_space() -> AxisGraph:
    """Return the axes of the space, traced once."""
    return trace(Cells(SPACE), torch.zeros(2, 1, SIDE, SIDE))


def _measure_of(subject: Subject) -> str:
    """Return the measure that the method's settings name, ``params`` if none."""
    return str(subject.settings.get("measure", "params"))


def _build(subject: Subject) -> Search:
    """Return the method, built for the search space with the target in ``TARGETS`` of its measure."""
    search: Search = subject.build(target=TARGETS[_measure_of(subject)], measure="params", stages=(1,))
    return search


def _search(subject: Subject) -> tuple[Search, Fitted[Any], Context]:
    """Search; return the method, the network and state, and the context, before the plans after the last epoch."""
    search, undo = _build(subject), UndoStore()
    fitted = learn(*make_network(), [TASK], search.learner, SCHEDULE, options=FitOptions(undo=undo))
    epochs, steps = SCHEDULE.epochs, -(-len(TASK.train) // SCHEDULE.batch_size)
    return search, fitted, Context(fitted.model, fitted.axes, TASK, 0, epochs, epochs, steps, undo=undo)


def check_record(subject: Subject) -> None:
    """Law: the method is a frozen record, and so is the state of its learner."""
    search = _build(subject)
    assert isinstance(search, Search), f"build returns a {type(search).__name__}, not a Search"
    assert_frozen(search.learner.state)


def check_target(subject: Subject) -> None:
    """Law: the network that is found meets the target, as a plain network with nothing masked."""
    search, fitted, context = _search(subject)
    fitted, _ = finish_training(search.learner, fitted, context)
    plain, _ = extract_network(fitted.model, ORIGIN)
    sizes, measure = dense(plain, first_examples(TASK.test, 1).inputs), _measure_of(subject)
    size = sizes["parameters" if measure == "params" else measure]
    assert size <= TARGETS[measure], f"{size} {measure} are left, and {TARGETS[measure]:g} were allowed"


def check_resume(subject: Subject) -> None:
    """Law: a search that is stopped after each epoch and resumed from its checkpoint ends with the same bits."""
    _, whole, _ = _search(subject)
    assert_same_training(whole, train_in_pieces(lambda: _build(subject).learner, make_network, [TASK], SCHEDULE))


def check_finished(subject: Subject) -> None:
    """Law: the finished network gives the masked one's outputs, and so does the plain network built from it."""
    search, fitted, context = _search(subject)
    inputs, masked = first_examples(TASK.test, 8).inputs, list[Tensor]()

    def evaluate(state: SearchState, there: Context, boundary: Boundary) -> SearchState:
        state = search.learner.boundary(state, there, boundary)
        if boundary.event == Event.FINISH:
            values = search.learner.parametrize(state, replace(there, eval_task=0)).values
            with torch.no_grad(), parametrize(there.model, values):
                masked.append(there.model.eval()(inputs))
        return state

    fitted, _ = finish_training(replace(search.learner, boundary=evaluate), fitted, context)
    with torch.no_grad():
        finished, plain = fitted.model(inputs), extract_network(fitted.model, ORIGIN)[0](inputs)
    same = torch.allclose(masked[-1], finished, atol=1e-5)
    assert same, "the finished network gives other outputs than the masked one"
    assert torch.allclose(plain, finished, atol=1e-4), "the plain network gives other outputs than the finished one"


LAWS: Mapping[str, Law] = {
    "a search and its state are frozen records": check_record,
    "the target is met": check_target,
    "killed and resumed gives the same bits": check_resume,
    "the finished network is the one searched": check_finished,
}
