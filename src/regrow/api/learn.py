"""``regrow.learn``: train a network on one task after the other, with any data, loss and method."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from regrow.api.call import Call, describe_argument
from regrow.api.inputs import (
    DeviceLike,
    Inputs,
    LossLike,
    ModelLike,
    Precision,
    choose_reading,
    require_weights,
)
from regrow.core.axes import AxisGraph, Example
from regrow.core.errors import InputError
from regrow.core.objectives import CLASSIFICATION, OBJECTIVES, OWN, Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, preserve_random_state
from regrow.core.tables import Table, format_html
from regrow.core.tasks import Task, first_examples, pack_batch
from regrow.data.datasets import to_tasks
from regrow.evaluation.continual import Matrix
from regrow.evaluation.measure import evaluating
from regrow.jobs.learn import LearnInputs, build_learner, learn_tasks
from regrow.jobs.progress_bar import ensure_progress
from regrow.jobs.recording import ActiveRun
from regrow.jobs.starting import make_task_schedule
from regrow.settings.learn import Settings
from regrow.store.statistics import FOLDER as STATISTICS
from regrow.store.statistics import parameter_sums
from regrow.training.continual import accuracy_matrix
from regrow.training.schedule import NO_AXES, Schedule
from regrow.training.state import CHECKPOINT

# ``"sgd"``, ``"adamw"``, or a function (parameter groups) → optimizer.
OptimizerLike = Literal["sgd", "adamw"] | Callable[[Any], torch.optim.Optimizer]
AnySchedule = TypeVar("AnySchedule", bound=Schedule)


@dataclass(frozen=True)
class Learned:
    """The result of learning a sequence of tasks.

    Args:
        model: The trained network, without any part of the method: the one that was given, changed in place.
        axes: Its axes; empty if the method changes no shapes.
        tasks: The names of the tasks.
        scores: ``scores.rows[i][j]``: the score on task j after learning task i (of classes: accuracy), NaN where
            it was not measured; ``scores.before[j]``: that before any task was learned.
        plans: Every change of shape, in the order in which they were applied to ``model``.
        rows: One row per task: parameters, multiply–accumulates of one example, bytes of state, seconds.
    """

    model: nn.Module
    axes: AxisGraph
    tasks: tuple[str, ...]
    scores: Matrix
    plans: tuple[Plan, ...]
    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        lines = [f"{name}: {' '.join(cells)}" for name, *cells in self._rows()]
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        """Return the scores as an HTML table, for notebooks: a row after each task, a column per task."""
        rows = self._rows()
        return format_html([Table("", ("after learning", *self.tasks), rows, range(1, len(rows) + 1))], self._summary())

    def _rows(self) -> list[tuple[str, ...]]:
        """Return, per task learned, its name and then the score on every task, as text; "–" where none was measured."""
        return [
            (name, *("–" if score != score else f"{score:.3f}" for score in row))
            for name, row in zip(self.tasks, self.scores.rows, strict=False)
        ]

    def _summary(self) -> str:
        """Return one line: the average score after the last task, and forgetting, the mean fall from the best score."""
        return f"average {self.scores.average:.3f}, forgetting {self.scores.forgetting or 0:.3f}"


def learn(
    model: ModelLike,
    tasks: Any,
    *,
    method: str = "laplace",
    settings: Mapping[str, Any] | None = None,
    scenario: Literal["domain", "class", "task"] = "domain",
    loss: LossLike = None,
    epochs: int = 5,
    batch_size: int = 64,
    optimizer: OptimizerLike = "sgd",
    lr: float = 0.01,
    weight_decay: float = 0.0,
    device: DeviceLike = None,
    precision: Precision = "float32",
    seed: int = 0,
    example: Any = None,
    axes: AxisGraph | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Learned:
    """Train a network on one task after the other, and measure the score on all tasks after each one.

    Args:
        model: The network, changed in place (it may also change its shape); or a model's name or a run folder.
        tasks: An iterable of (training data, test data), each as for :func:`regrow.prune`, or of training data alone,
            of which a tenth is held out for testing. Data sets and loaders are read batch by batch, so that memory does
            not grow with the number of tasks.
        method: One of ``regrow.methods.LEARNERS``; ``"naive"`` is plain training.
        settings: Settings of the method that differ from its defaults.
        scenario: Predictions are made among all classes (``"domain"``), those seen so far (``"class"``), or those of
            the task (``"task"``).
        loss: The loss, as for :func:`regrow.prune`. Methods that need probabilities of classes or tokens refuse others.
        epochs: Passes over each task.
        batch_size: Examples per step.
        optimizer: ``"sgd"`` (momentum 0.9, Nesterov), ``"adamw"``, or a function (parameter groups) → optimizer, such
            as ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.8)``.
        lr: Learning rate; a function as ``optimizer`` has its own.
        weight_decay: Weight decay, likewise.
        device: The device to train on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"``: forward passes compute in it, as for :func:`regrow.prune`.
        seed: Seed of the order of examples and of everything random.
        example: The input with which the network is traced; ``None``: two examples of the first task.
        axes: The network's axes, if they are known; it is then not traced.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If the method or a setting is unknown, a task has no labels, or the loss is not finite.

    >>> inputs = torch.randn(60, 4)
    >>> tasks = [(inputs, (inputs[:, i] > 0).long()) for i in (0, 1)]
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> learned = learn(net, tasks, method="ewc", epochs=2)
    >>> len(learned.scores.rows), learned.tasks
    (2, ('task-1', 'task-2'))
    """
    call = Call(model, None, None, example, loss, tokenizer, batch_size, device, axes=axes, out=out)
    call = call.with_generators(tasks=tasks)
    net = replace(call, example=Example() if example is None else example, axes=None).read(progress)
    require_weights(net.model)
    all_tasks = to_tasks(tasks, choose_reading(net.model, net.loaded.tokenizer, batch_size, net.loaded.example))
    names = tuple(task.name for task in all_tasks)
    config = Settings(names, net.loaded.origin.name, method, dict(settings or {}), scenario, epochs, batch_size)
    config = replace(config, lr=float(lr), weight_decay=float(weight_decay), precision=precision, seed=seed)
    with preserve_random_state(), nullcontext(progress) if out is None else ensure_progress(progress) as bar:
        open_inputs = partial(_open_inputs, call, config, net, all_tasks, optimizer)
        fitted = learn_tasks(config, open_inputs, call.start_run("learn", bar))
    state = fitted.state
    return Learned(fitted.model, fitted.axes, names, accuracy_matrix(state), state.plans, state.sizes)


def _open_inputs(
    call: Call, config: Settings, net: Inputs, tasks: list[Task], optimizer: OptimizerLike, run: ActiveRun
) -> LearnInputs:
    """Return the inputs of a run, with what is recorded of them; InputError if loss, network and data do not fit.

    ``net``: the network; its example is replaced by the first batch of the first task if the call has none.
    """
    learner = build_learner(config.method, config.method_settings, config.seed)
    batch = first_batch(tasks[0])
    objective = find_objective(net.model, call.loss, batch)
    if objective is CLASSIFICATION and (classified := [task for task in tasks if task.classes]):
        last = max(classified, key=lambda task: max(task.classes))  # the network needs an output for its classes, too
        labels = torch.full((batch.size,), max(last.classes))
        find_objective(net.model, call.loss, replace(batch, labels=labels, where=f"source {last.name!r}"))
    schedule = with_optimizer(make_task_schedule(config, objective), optimizer)
    inputs = net.with_example(batch) if call.example is None else net
    arguments = {"optimizer": describe_argument(optimizer)}
    record = call.describe_data(_first_batches(tasks), partial(parameter_sums, net.model), arguments)
    axes = NO_AXES if call.axes is None else call.axes
    if call.axes is None and learner.uses_axes:
        try:
            axes = inputs.trace()
        except ValueError as error:
            raise InputError(f"{config.method} needs the network's axes, and it cannot be traced: {error}") from error
    # The checkpoint is not part of the finished run, whose data have no names.
    file = Path(STATISTICS, CHECKPOINT)
    return LearnInputs(inputs.for_saving(), axes, tasks, learner, schedule, file, python_call=record)


def find_objective(model: nn.Module, loss: LossLike, batch: Batch) -> Objective:
    """Return the loss and score with which a network is trained, after it has run on a batch in eval mode as a test.

    A named loss is computed, too, and raises what does not fit. A loss that is a function is not, as outputs may
    depend on the mode; with a network that returns its own loss, nothing runs.
    """
    objective = choose_objective(loss, batch)
    if objective is not OWN:
        with evaluating(model) as device:
            batch = batch.to(device)
            output = batch.run(model)
            if objective.name in OBJECTIVES:
                objective.compute_loss(output, batch)
    return objective


def with_optimizer(schedule: AnySchedule, optimizer: OptimizerLike) -> AnySchedule:
    """Return a copy of the schedule with an optimizer, given by name or as a function (parameter groups) → optimizer.

    Raise InputError for anything else. Names are not checked here.
    """
    if isinstance(optimizer, str):
        return replace(schedule, optimizer=optimizer)
    if callable(optimizer):
        return replace(schedule, build_optimizer=optimizer)
    raise InputError(
        f"optimizer must be 'sgd', 'adamw' or a function from parameter groups to an optimizer, got a "
        f"{type(optimizer).__name__}; write functools.partial(torch.optim.{type(optimizer).__name__}, lr=0.1)"
    )


def first_batch(task: Task) -> Batch:
    """Return the first two training examples of a task (or its only one) as a batch, with labels."""
    first = first_examples(task.train, 2)
    return pack_batch(first.inputs, first.labels, f"source {task.name!r}, first examples")


def _first_batches(tasks: list[Task]) -> Iterator[Source]:
    """Yield two sources per task: its first two training examples, and its first two test examples."""
    for task in tasks:
        yield Source(task.name, [first_batch(task)])
        yield Source(f"{task.name} (test)", [first_batch(replace(task, train=task.test))])
