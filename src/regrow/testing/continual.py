"""Laws that every continual-learning method must obey, on small generated tasks."""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
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
from regrow.training.state import (
    TrainState,
    axis_tensors,
    json_values,
    read_checkpoint,
    restore_state,
    write_checkpoint,
)
from regrow.training.step import apply_plan

CLASSES, SIDE = 4, 6
SCHEDULE = TaskSchedule(epochs=3, batch_size=16, lr=0.1)


@dataclass(frozen=True)
class Subject:
    """A method and the settings with which the laws run on it; settings that are not given have their defaults."""

    entry: MethodEntry
    settings: Mapping[str, object] = field(default_factory=dict)

    def build(self, **defaults: object) -> Any:
        """Build the method and return it, with ``defaults`` for settings that the subject does not give."""
        return self.entry.create("the method", {**defaults, **self.settings})


# Raises `AssertionError` if the method breaks the law
Law = Callable[[Subject], None]


class StoppedError(Exception):
    """Raised by a law to stop training on purpose, as a kill would."""


def make_tasks(count: int = 2, side: int = SIDE) -> list[Task]:
    """Return small classification tasks: noisy copies of ``CLASSES`` patterns, ``side`` × ``side``, other ones each."""
    tasks = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        patterns = torch.randn(CLASSES, 1, side, side, generator=generator)
        train, test = (_noisy(patterns, size, generator) for size in (96, 48))
        tasks.append(Task(f"patterns-{number + 1}", train, test, tuple(range(CLASSES))))
    return tasks


def _noisy(patterns: Tensor, size: int, generator: torch.Generator) -> Examples:
    """Return ``size`` examples: noisy copies of ``patterns``, ``[CLASSES, 1, side, side]``, labelled by pattern."""
    labels = torch.arange(size) % CLASSES
    noise = torch.randn(size, *patterns.shape[1:], generator=generator)
    return Examples(patterns[labels] + 0.5 * noise, labels)


def make_network() -> tuple[nn.Module, AxisGraph]:
    """Return a small classifier for :func:`make_tasks`, with the same random weights in each call, and its axes."""
    model, _ = small("mlp:16-12", (1, SIDE, SIDE), CLASSES)
    return model, trace(model, torch.zeros(2, 1, SIDE, SIDE))


def _fit(learner: Learner[Any], tasks: list[Task], schedule: TaskSchedule = SCHEDULE) -> Fitted[Any]:
    """Train a new small network on tasks, one after the other, and return it with its final state."""
    return learn(*make_network(), tasks, learner, schedule)


def check_record(subject: Subject) -> None:
    """Law: the method is a :class:`Learner`, and its state is a frozen dataclass."""
    learner = subject.build()
    assert isinstance(learner, Learner), f"build returns a {type(learner).__name__}, not a Learner"
    assert_frozen(learner.state)


def assert_frozen(state: object) -> None:
    """Raise an ``AssertionError`` unless a state is a frozen dataclass."""
    frozen = is_dataclass(state) and getattr(type(state), "__dataclass_params__").frozen  # noqa: B009
    assert frozen, f"the state is a {type(state).__name__}, not a frozen dataclass"


def check_learning(subject: Subject) -> None:
    """Law: the first task is learned to more than twice the accuracy of chance."""
    accuracy = _fit(subject.build(), make_tasks(1), replace(SCHEDULE, epochs=6)).state.rows[0][0]
    assert accuracy > 2 / CLASSES, f"accuracy {accuracy:.2f} on the first task; chance is {1 / CLASSES:.2f}"


def check_seed(subject: Subject) -> None:
    """Law: two runs with the same seed give the same weights, bit for bit."""
    first, second = (_fit(subject.build(), make_tasks()).model.state_dict() for _ in range(2))
    assert_equal_tensors(first, second, "two runs with the same seed differ")


def check_resume(subject: Subject) -> None:
    """Law: training that is stopped after each epoch and resumed from its checkpoint ends with the same bits."""
    tasks = make_tasks()
    resumed = train_in_pieces(subject.build, make_network, tasks, SCHEDULE)
    assert_same_training(_fit(subject.build(), tasks), resumed)


def train_in_pieces(
    build: Callable[[], Learner[Any]],
    make_network: Callable[[], tuple[nn.Module, AxisGraph]],
    tasks: Sequence[Task],
    schedule: TaskSchedule,
) -> Fitted[Any]:
    """Return the result of training that stops after each epoch and resumes from its checkpoint in a new network.

    ``build`` and ``make_network`` are called anew for each piece.
    """
    (model, axes), undo, state = make_network(), UndoStore(), None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"

        def stop(state: TrainState[Any], context: Context) -> None:
            write_checkpoint(path, context.model, state, undo)
            raise StoppedError

        for _ in range(1, len(tasks) * schedule.epochs):
            options = FitOptions(undo=undo, checkpoint=stop)
            with contextlib.suppress(StoppedError):
                learn(model, axes, tasks, build(), schedule, state=state, options=options)
            (model, axes), undo = make_network(), UndoStore()
            model, axes, state = read_checkpoint(path, model, axes, build().state, undo=undo)
    return learn(model, axes, tasks, build(), schedule, state=state, options=FitOptions(undo=undo))


def assert_same_training(whole: Fitted[Any], resumed: Fitted[Any]) -> None:
    """Raise an ``AssertionError`` unless two trainings have equal weights, accuracies and state values, bit for bit."""
    where = "resumed after every epoch"
    assert_equal_tensors(whole.model.state_dict(), resumed.model.state_dict(), where)
    assert whole.state.rows == resumed.state.rows, f"{where}: other accuracies"
    assert json_values(whole.state.learner) == json_values(resumed.state.learner), f"{where}: another state"


def check_stored_state(subject: Subject) -> None:
    """Law: a state that is restored from its tensors and values equals the original."""
    learner = subject.build()
    state = _fit(learner, make_tasks()).state.learner
    restored = restore_state(learner.state, axis_tensors(state), json_values(state))
    assert json_values(restored) == json_values(state), "the values changed"
    assert axis_tensors(restored).keys() == axis_tensors(state).keys(), "tensors are missing"


def check_external_plans(subject: Subject) -> None:
    """Law: the learner's state follows a cut and a growth that it did not plan itself; weights then stay finite."""
    learner, tasks = subject.build(), make_tasks()
    fitted = _fit(learner, tasks[:1])
    context, state = Context(fitted.model, fitted.axes, tasks[0]), fitted.state.learner
    key = next(axis.key for axis in fitted.axes.units())
    for change in ("cut", "widen"):
        kept = Plan.keeping(context.axes, {key: [*range(1, context.axes[key].size)]})
        plan = kept if change == "cut" else Plan.growing(context.axes, {key: 2})
        context, state = apply_plan(learner, state, context, plan)
        for name, tensor in axis_tensors(state).items():
            shape = tuple(size_of(dim, context.axes.sizes()) for dim in tensor.dims)
            assert tuple(tensor.values.shape) == shape, f"{change}: {name} has the shape {tuple(tensor.values.shape)}"
    state = replace(fitted.state, learner=state, before=())
    after = learn(context.model, context.axes, tasks, learner, SCHEDULE, state=state)
    assert all(bool(p.isfinite().all()) for p in after.model.parameters()), "weights are not finite after a plan"


def check_mixed_precision(subject: Subject) -> None:
    """Law: with losses computed in bfloat16, parameters stay in float32, and the learner's state is as without it."""
    found = []
    for precision in ("bfloat16", "float32"):
        fitted = _fit(subject.build(), make_tasks()[:1], replace(SCHEDULE, precision=precision))
        assert {p.dtype for p in fitted.model.parameters()} == {torch.float32}, "parameters changed their precision"
        found.append({name: one.values.dtype for name, one in axis_tensors(fitted.state.learner).items()})
    assert found[0] == found[1], f"in bfloat16 the state has {found[0]}, else {found[1]}"


def check_finished(subject: Subject) -> None:
    """Law: the network that is saved, without its learner, has the logits of the network that was evaluated."""
    learner, tasks = subject.build(), make_tasks()
    fitted = _fit(learner, tasks)
    state, last = fitted.state.learner, len(tasks) - 1
    context = Context(fitted.model, fitted.axes, tasks[last], last, eval_task=last)
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
    "the state follows plans": check_external_plans,
    "mixed precision keeps parameters in float32": check_mixed_precision,
    "the finished network is the one evaluated": check_finished,
}
