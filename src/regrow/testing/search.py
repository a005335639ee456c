"""Laws of architecture-search methods."""

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.tasks import Task, first_examples
from regrow.evaluation import dense
from regrow.jobs.spaces import extract_network
from regrow.methods import MethodEntry
from regrow.methods.search import Search
from regrow.methods.search.space import SearchState
from regrow.nets.cells import Cells, supernet
from regrow.nets.loaded import Origin
from regrow.surgery import UndoStore
from regrow.surgery.gate import parametrize
from regrow.testing.continual import Law, StoppedError, assert_equal_tensors, assert_frozen, make_tasks, stop_at
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions, Fitted, finish
from regrow.training.learner import Boundary, Context, Event
from regrow.training.state import read_checkpoint, values_of

SIDE, CLASSES = 8, 4
SPACE = supernet(
    (1, SIDE, SIDE), CLASSES, width=4, cells=2, nodes=2, stride=1, operations=("skip", "sep3", "max"), heads=(0,)
)
"""A space of two cells, each with a classifier, so that it can be searched in one stage or in two."""
SCHEDULE = TaskSchedule(epochs=4, batch_size=48, lr=0.02)
TARGETS = {"params": 1500.0, "nonzero": 1200.0}
"""Measure → how much may be left of about 3,000."""


def make_network() -> tuple[Cells, AxisGraph, Task]:
    """The space as a network with fixed random weights, its axes, and a task of noisy patterns."""
    axes = replace(_trace_space(), network=uuid4().hex)  # as if it were traced anew
    torch.manual_seed(0)
    return Cells(SPACE), axes, make_tasks(1, SIDE)[0]


@cache
def _trace_space() -> AxisGraph:
    return trace(Cells(SPACE), torch.zeros(2, 1, SIDE, SIDE))


def _make(method: MethodEntry, settings: Mapping[str, object]) -> Search:
    target = TARGETS[str(settings.get("measure", "params"))]
    made: Search = method.made("the method", {"target": target, "measure": "params", "stages": (1,), **settings})
    return made


def _search(method: MethodEntry, settings: Mapping[str, object]) -> tuple[Search, Fitted[Any], Context]:
    """Search, without the plans after the last epoch."""
    model, axes, task = make_network()
    search, undo = _make(method, settings), UndoStore()
    fitted = learn(model, axes, [task], search.learner, SCHEDULE, options=FitOptions(undo=undo))
    epochs, steps = SCHEDULE.epochs, -(-len(task.train) // SCHEDULE.batch_size)
    return search, fitted, Context(fitted.model, fitted.axes, task, 0, epochs, epochs, steps, undo=undo)


def check_record(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """The method is a frozen record, and so is the state of its learner."""
    search = _make(method, settings)
    assert isinstance(search, Search), f"build returns a {type(search).__name__}, not a Search"
    assert_frozen(search.learner.state)


def check_target(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """The network that is found meets the target, as a plain network with nothing masked."""
    search, fitted, context = _search(method, settings)
    fitted, _ = finish(search.learner, fitted, context)
    plain, _ = extract_network(fitted.model, Origin("cells", "cells", SPACE, "cells"))
    sizes = dense(plain, first_examples(context.task.test, 1).inputs)
    measure = str(settings.get("measure", "params"))
    size = sizes["parameters"] if measure == "params" else _count_nonzero(plain)
    assert size <= TARGETS[measure], f"{size} {measure} are left, and {TARGETS[measure]:g} were allowed"


def _count_nonzero(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def check_resume(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Stopped after each epoch in turn and resumed from its checkpoint, a search ends with the same bits."""
    _, whole, _ = _search(method, settings)
    search, (model, axes, task) = _make(method, settings), make_network()
    undo, state = UndoStore(), None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        for _ in range(1, SCHEDULE.epochs):
            stop = stop_at(path, 1, undo)
            with contextlib.suppress(StoppedError):
                options = FitOptions(undo=undo, checkpoint=stop)
                learn(model, axes, [task], search.learner, SCHEDULE, state=state, options=options)
            (model, axes, task), undo = make_network(), UndoStore()
            _, axes, state = read_checkpoint(path, model, axes, search.learner.state, undo=undo)
    resumed = learn(model, axes, [task], search.learner, SCHEDULE, state=state, options=FitOptions(undo=undo))
    assert_equal_tensors(whole.model.state_dict(), resumed.model.state_dict(), "resumed after every epoch")
    same = values_of(whole.state.learner) == values_of(resumed.state.learner)
    assert same, "resumed after every epoch: another state"


def check_finished(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """The finished network gives the masked one's outputs, and so does the plain network that is built from it."""
    search, fitted, context = _search(method, settings)
    inputs, masked = first_examples(context.task.test, 8).inputs, list[Tensor]()

    def evaluate(state: SearchState, there: Context, boundary: Boundary) -> SearchState:
        state = search.learner.boundary(state, there, boundary)
        if boundary.event == Event.FINISH:
            values = search.learner.parametrize(state, replace(there, answered=0)).values
            with torch.no_grad(), parametrize(there.model, values):
                masked.append(there.model.eval()(inputs))
        return state

    fitted, _ = finish(replace(search.learner, boundary=evaluate), fitted, context)
    with torch.no_grad():
        finished = fitted.model(inputs)
        plain = extract_network(fitted.model, Origin("cells", "cells", SPACE, "cells"))[0](inputs)
    same = torch.allclose(masked[-1], finished, atol=1e-5)
    assert same, "the finished network gives other outputs than the masked one"
    assert torch.allclose(plain, finished, atol=1e-4), "the plain network gives other outputs than the finished one"


LAWS: Mapping[str, Law] = {
    "a search and its state are frozen records": check_record,
    "the target is met": check_target,
    "killed and resumed gives the same bits": check_resume,
    "the finished network is the one searched": check_finished,
}
