"""Laws that every continual-learning method must obey, on small generated tasks."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import size_of
from regrow.core.plan import Plan
from regrow.core.tasks import Examples, Task, first_examples
from regrow.methods import MethodEntry
from regrow.nets.vision import small
from regrow.surgery import UndoStore
from regrow.surgery.gate import parametrize
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions, Fitted
from regrow.training.learner import Context, Learner, write_replacements
from regrow.training.state import TrainState, axis_tensors, read_checkpoint, restore_state, values_of, write_checkpoint
from regrow.training.step import apply_plan

CLASSES, SIDE = 4, 6
SCHEDULE = TaskSchedule(epochs=3, batch_size=16, lr=0.1)


Law = Callable[[MethodEntry, Mapping[str, object]], None]
"""(method, its settings) → ``None``; raises ``AssertionError`` if the method breaks the law."""


class StoppedError(Exception):
    """Training was stopped on purpose."""


def make_tasks(count: int = 2, side: int = SIDE) -> list[Task]:
    """Small classification tasks: noisy copies of ``CLASSES`` patterns, other patterns in each task."""
    tasks = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        patterns = torch.randn(CLASSES, 1, side, side, generator=generator)
        train, test = (_noisy(patterns, many, generator) for many in (96, 48))
        tasks.append(Task(f"patterns-{number + 1}", train, test, tuple(range(CLASSES))))
    return tasks


def _noisy(patterns: Tensor, many: int, generator: torch.Generator) -> Examples:
    labels = torch.arange(many) % CLASSES
    noise = torch.randn(many, *patterns.shape[1:], generator=generator)
    return Examples(patterns[labels] + 0.5 * noise, labels)


def make_network(tasks: list[Task]) -> tuple[nn.Module, AxisGraph]:
    """Return a small network with random weights, and its axes."""
    model, _ = small("mlp:16-12", (1, SIDE, SIDE), CLASSES)
    return model, trace(model, first_examples(tasks[0].train, 2).inputs)


def _fit(
    method: MethodEntry,
    settings: Mapping[str, object],
    tasks: list[Task],
    schedule: TaskSchedule = SCHEDULE,
    checkpoint: Callable[[TrainState[Any], Context], None] | None = None,
) -> tuple[Learner[Any], Fitted[Any]]:
    learner = method.made("the method", settings)
    model, axes = make_network(tasks)
    return learner, learn(model, axes, tasks, learner, schedule, options=FitOptions(checkpoint=checkpoint))


def check_record(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: the learner is a :class:`Learner`, and its state is a frozen dataclass."""
    learner = method.made("the method", settings)
    assert isinstance(learner, Learner), f"build returns a {type(learner).__name__}, not a Learner"
    assert_frozen(learner.state)


def assert_frozen(state: object) -> None:
    """Raise an ``AssertionError`` unless a state is a frozen dataclass."""
    frozen = is_dataclass(state) and getattr(type(state), "__dataclass_params__").frozen  # noqa: B009
    assert frozen, f"the state is a {type(state).__name__}, not a frozen dataclass"


def check_learning(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: the first task is learned to more than twice the accuracy of chance."""
    _, fitted = _fit(method, settings, make_tasks(1), schedule=replace(SCHEDULE, epochs=6))
    accuracy = fitted.state.rows[0][0]
    assert accuracy > 2 / CLASSES, f"accuracy {accuracy:.2f} on the first task; chance is {1 / CLASSES:.2f}"


def check_seed(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: two runs with the same seed give the same weights, bit for bit."""
    first, second = (_fit(method, settings, make_tasks())[1].model for _ in range(2))
    assert_equal_tensors(first.state_dict(), second.state_dict(), "two runs with the same seed differ")


def check_resume(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: training that is stopped after any epoch and resumed from its checkpoint ends with the same bits."""
    tasks = make_tasks()
    _, whole = _fit(method, settings, tasks)
    for stop in range(1, 2 * SCHEDULE.epochs):
        model, axes, state = _stop_and_read(method, settings, tasks, stop)
        learner = method.made("the method", settings)
        resumed = learn(model, axes, tasks, learner, SCHEDULE, state=state)
        where = f"resumed after epoch {stop}"
        assert_equal_tensors(whole.model.state_dict(), resumed.model.state_dict(), where)
        assert whole.state.rows == resumed.state.rows, f"{where}: other accuracies"
        assert values_of(whole.state.learner) == values_of(resumed.state.learner), f"{where}: another state"


def _stop_and_read(
    method: MethodEntry, settings: Mapping[str, object], tasks: list[Task], stop: int
) -> tuple[nn.Module, AxisGraph, TrainState[Any]]:
    """Train, stop at a checkpoint, and read it as a new process would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        with contextlib.suppress(StoppedError):
            _fit(method, settings, tasks, checkpoint=stop_at(path, stop))
        model, axes = make_network(tasks)
        return read_checkpoint(path, model, axes, method.made("the method", settings).state)


def stop_at(path: Path, number: int, undo: UndoStore | None = None) -> Callable[[TrainState[Any], Context], None]:
    """Return a callback that writes a checkpoint at its ``number``-th call, and stops training there."""
    calls = count(1)

    def write(state: TrainState[Any], context: Context) -> None:
        if next(calls) == number:
            write_checkpoint(path, context.model, state, undo)
            raise StoppedError

    return write


def check_stored_state(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: a state that is restored from its tensors and values equals the original."""
    learner, fitted = _fit(method, settings, make_tasks())
    state = fitted.state.learner
    restored = restore_state(learner.state, axis_tensors(state), values_of(state))
    assert values_of(restored) == values_of(state), "the values changed"
    assert axis_tensors(restored).keys() == axis_tensors(state).keys(), "tensors are missing"


def check_plans(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: the state follows plans of other origin that cut and widen the network, and it trains further."""
    tasks = make_tasks()
    learner, fitted = _fit(method, settings, tasks[:1])
    context, state = Context(fitted.model, fitted.axes, tasks[0]), fitted.state.learner
    key = next(axis.key for axis in fitted.axes.units())
    for change in ("cut", "widen"):
        size = context.axes[key].size
        kept = Plan.keeping(context.axes, {key: [*range(1, size)]})
        plan = kept if change == "cut" else Plan.growing(context.axes, {key: 2})
        context, state = apply_plan(learner, state, context, plan)
        for name, tensor in axis_tensors(state).items():
            shape = tuple(size_of(dim, context.axes.sizes()) for dim in tensor.dims)
            assert tuple(tensor.values.shape) == shape, f"{change}: {name} has the shape {tuple(tensor.values.shape)}"
    state = replace(fitted.state, learner=state, before=())
    after = learn(context.model, context.axes, tasks, learner, SCHEDULE, state=state)
    assert all(bool(p.isfinite().all()) for p in after.model.parameters()), "weights are not finite after a plan"


def check_mixed_precision(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: with losses computed in bfloat16, parameters and the learner's state stay in float32."""
    _, fitted = _fit(method, settings, make_tasks(), schedule=replace(SCHEDULE, precision="bfloat16"))
    assert {p.dtype for p in fitted.model.parameters()} == {torch.float32}, "parameters changed their precision"
    dtypes = {tensor.values.dtype for tensor in axis_tensors(fitted.state.learner).values()}
    assert torch.bfloat16 not in dtypes, "a tensor of the state is in bfloat16"


def check_finished(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Law: the network that is saved, without its learner, has the logits of the network that was evaluated."""
    tasks = make_tasks()
    learner, fitted = _fit(method, settings, tasks)
    state, last = fitted.state.learner, len(tasks) - 1
    context = Context(fitted.model, fitted.axes, tasks[last], last, answered=last)
    plain = clone_model(fitted.model).eval()
    write_replacements(learner, state, replace(context, model=plain))
    inputs = first_examples(tasks[last].test, len(tasks[last].test)).inputs
    with torch.no_grad(), parametrize(fitted.model, learner.parametrize(state, context).values):
        evaluated = fitted.model.eval()(inputs)
    assert torch.equal(plain(inputs), evaluated), "the finished network gives other logits"


def assert_equal_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor], where: str) -> None:
    """Raise an ``AssertionError`` that starts with ``where`` unless two mappings hold the same tensors, bit for bit."""
    assert first.keys() == second.keys(), f"{where}: other tensors"
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{where}: {', '.join(different)}"


LAWS: Mapping[str, Law] = {
    "a learner and its state are frozen records": check_record,
    "the first task is learned": check_learning,
    "the same seed gives the same weights": check_seed,
    "killed and resumed gives the same bits": check_resume,
    "a stored state comes back": check_stored_state,
    "the state follows plans": check_plans,
    "mixed precision keeps parameters in float32": check_mixed_precision,
    "the finished network is the one evaluated": check_finished,
}
