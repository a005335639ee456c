"""``regrow.learn``: train a network on one task after the other, with any data, loss and method."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, choose_reading, read_inputs, require_weights
from regrow.api.runs import Destination, finish, loaded_of, name_of, run_of
from regrow.axes import AxisGraph, Example
from regrow.commands.learning_record import LearningRecord, record_matrix
from regrow.data.task_data import to_tasks
from regrow.errors import InputError
from regrow.evaluation.continual import Matrix
from regrow.evaluation.forward import evaluating
from regrow.methods import MethodKind, find_method
from regrow.objectives import CLASSIFICATION, OBJECTIVES, OWN, Objective, choose_objective, describe_misfit
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.progress_bar import visible
from regrow.settings.learn import Settings
from regrow.sources import Batch, Source, device_of
from regrow.store.building import describe_origin
from regrow.store.statistics import FOLDER as STATISTICS
from regrow.tables import Table, format_html
from regrow.tasks import Task, first_examples
from regrow.tracing import trace
from regrow.training import continual
from regrow.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from regrow.training.learner import Context, Learner, write_replacements
from regrow.training.schedule import NO_AXES
from regrow.training.state import TrainState

OptimizerLike = str | Callable[[Any], torch.optim.Optimizer]
"""``"sgd"``, ``"adamw"``, or a function (parameter groups) → optimizer."""
MORE = ("scenario", "weight_decay", "decay", "precision", "held_out", "patience")
"""The further arguments of :func:`learn`."""


@dataclass(frozen=True)
class Learned:
    """The result of learning a sequence of tasks.

    Args:
        model: The trained network, without any part of the method: the one that was given, changed in place.
        axes: Its axes; empty if the method changes no shapes.
        tasks: The names of the tasks.
        scores: ``scores.rows[i][j]``: the score on task j after learning task i (of classes: accuracy), with averages.
        plans: Every change of shape, in order.
        rows: One row per task: parameters, multiply–accumulates of one example, bytes of state, seconds.
    """

    model: nn.Module
    axes: AxisGraph
    tasks: tuple[str, ...]
    scores: Matrix
    plans: tuple[Plan, ...]
    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        lines = [
            f"{name}: " + " ".join("–" if score != score else f"{score:.3f}" for score in row)
            for name, row in zip(self.tasks, self.scores.rows, strict=False)
        ]
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        """Return the scores as an HTML table, for notebooks: a row after each task, a column per task."""
        rows = [
            (name, *("–" if score != score else f"{score:.3f}" for score in row))
            for name, row in zip(self.tasks, self.scores.rows, strict=False)
        ]
        return format_html([Table("", ("after learning", *self.tasks), rows, range(1, len(rows) + 1))], self._summary())

    def _summary(self) -> str:
        return f"average {self.scores.average:.3f}, forgetting {self.scores.forgetting or 0:.3f}"


def learn(
    model: ModelLike,
    tasks: Any,
    *,
    method: str = "sparsegrow",
    settings: Mapping[str, Any] | None = None,
    loss: LossLike = None,
    epochs: int = 5,
    batch_size: int = 64,
    optimizer: OptimizerLike = "sgd",
    lr: float = 0.01,
    device: DeviceLike = None,
    seed: int = 0,
    example: Any = None,
    axes: AxisGraph | None = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    track: str = "",
    progress: Progress = silent,
    **training: Any,
) -> Learned:
    """Train a network on one task after the other, and measure the score on all tasks after each one.

    Args:
        model: The network, changed in place (it may also change its shape); or a model's name or a run folder.
        tasks: An iterable of (training data, test data), each as for :func:`regrow.prune`; an Avalanche-shaped
            benchmark; or training data alone, of which a tenth is held out for testing. Data sets and loaders are read
            batch by batch, so that memory does not grow with the number of tasks.
        method: One of ``regrow.methods.LEARNERS``; ``"naive"`` is plain training.
        settings: Settings of the method that differ from its defaults.
        loss: The loss, as for :func:`regrow.prune`. Methods that need class probabilities refuse other losses.
        epochs: Passes over each task.
        batch_size: Examples per step.
        optimizer: ``"sgd"`` (momentum 0.9, Nesterov), ``"adamw"``, or a function (parameter groups) → optimizer, such
            as ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.8)``.
        lr: Learning rate.
        device: The device to train on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        seed: Seed of the order of examples and of everything random.
        example: The input with which the network is traced; ``None``: two examples of the first task.
        axes: The network's axes, if they are known; it is then not traced.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        checkpoint: A file that is written after each epoch, and from which the same call resumes; ``out`` has its own.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        track: With ``out``: a tracker that gets every measurement, too: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.
        progress: Called with (steps done, steps in all, what is being done).
        **training: More fields of :class:`regrow.training.continual.TaskSchedule`: ``scenario``, ``weight_decay``,
            ``decay``, ``precision``, ``held_out``, ``patience``.

    Raises:
        ValueError: If the method or a setting is unknown, a task has no labels, or the loss is not finite.

    >>> inputs = torch.randn(60, 4)
    >>> tasks = [(inputs, (inputs[:, i] > 0).long()) for i in (0, 1)]
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> learned = learn(net, tasks, method="ewc", epochs=2)
    >>> len(learned.scores.rows), learned.tasks
    (2, ('task-1', 'task-2'))
    """
    check_arguments("learn", training, MORE)
    place = Destination(out, track, checkpoint).checked(tasks=tasks)
    known = Example() if example is None else example
    net = read_inputs(model, example=known, tokenizer=tokenizer, device=device, progress=progress)
    require_weights(net.model)
    every = to_tasks(tasks, choose_reading(net.model, net.tokenizer, batch_size))
    learner, batch = _build(method, settings or {}, seed), first_batch(every[0])
    given: Any = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, **training}
    schedule = build_schedule(optimizer, objective=find_objective(net.model, loss, batch), **given)
    if schedule.objective is CLASSIFICATION:
        _check_classes(net.model, every, batch)
    traced = net.example if example is not None else Example(*move_inputs(batch, device_of(net.model)))
    if axes is None:
        axes = _trace(net.model, traced, method) if learner.uses_axes else NO_AXES
    work = _Learning(axes, every, learner, schedule, progress)
    if place.out is None:
        return _fit(net.model, work, Path(checkpoint) if checkpoint is not None else None)
    inputs = {"loss": name_of(loss), "optimizer": name_of(optimizer), "training": training}
    described = _describe(describe_origin(net.model).name, method, settings or {}, work)
    return _learn_in_folder(replace(net, example=traced), work, place, described, model, inputs)


@dataclass(frozen=True)
class _Learning:
    """What is learned, and how."""

    axes: AxisGraph
    tasks: list[Task]
    learner: Learner[Any]
    schedule: continual.TaskSchedule
    progress: Progress


def find_objective(model: nn.Module, loss: LossLike, batch: Batch) -> Objective:
    """Return what a network is trained for, after running it on the first examples.

    Args:
        model: The network.
        loss: The loss, as for :func:`regrow.prune`; a function is not run, as outputs may depend on the mode.
        batch: The first examples.

    Raises:
        InputError: If the network cannot take them, or their labels do not fit its outputs.
    """
    objective = choose_objective(loss, batch)
    if objective is not OWN:
        with evaluating(model) as device:
            batch = batch.to(device)
            output = batch.run(model)
            if objective.name in OBJECTIVES:
                objective.compute_loss(output, batch)
    return objective


def _check_classes(model: nn.Module, tasks: list[Task], batch: Batch) -> None:
    """Raise InputError if the network has no output for a class of the tasks."""
    largest = max((label for task in tasks for label in task.classes), default=0)
    with evaluating(model) as device:
        batch = batch.to(device)
        output = batch.run(model)
    if problem := describe_misfit(output, torch.full((batch.size,), largest)):
        raise InputError(problem)


def check_arguments(name: str, given: Mapping[str, object], known: Sequence[str], remedy: str = "") -> None:
    """Raise TypeError, as Python does, for an argument that a function does not have.

    Args:
        name: The name of the function.
        given: The arguments that it collects.
        known: The names that it takes.
        remedy: What the arguments that it has are for, with a semicolon behind it.
    """
    if unknown := given.keys() - known:
        raise TypeError(f"{name} has no argument {min(unknown)!r}; {remedy}further arguments are {', '.join(known)}")


def build_schedule(optimizer: OptimizerLike, **given: Any) -> continual.TaskSchedule:
    """Return how each task is trained.

    Args:
        optimizer: The name of an optimizer, or a function that builds one.
        **given: The other fields of the schedule.
    """
    if not isinstance(optimizer, str) and not callable(optimizer):
        raise InputError(
            "optimizer must be 'sgd', 'adamw' or a function from parameter groups to an optimizer, got "
            f"a {type(optimizer).__name__}; write functools.partial(torch.optim.{type(optimizer).__name__}, lr=0.1)"
        )
    if isinstance(optimizer, str):
        return continual.TaskSchedule(optimizer=optimizer, **given)
    return continual.TaskSchedule(build_optimizer=optimizer, **given)


def _build(method: str, settings: Mapping[str, Any], seed: int) -> Learner[Any]:
    """Return the learner of a method; one with a seed gets the given one, unless the settings have their own."""
    entry = find_method(MethodKind.CONTINUAL, method)
    own = {"seed": seed} if any(one.name == "seed" for one in fields(entry.settings)) else {}
    learner: Learner[Any] = entry.made(method, {**own, **settings})
    return learner


def first_batch(task: Task, n: int = 2) -> Batch:
    """Return the first training examples of a task as the network's inputs, with labels.

    Args:
        task: The task.
        n: How many.
    """
    first = first_examples(task.train, n)
    where = f"source {task.name!r}, first examples"
    if isinstance(first.inputs, Mapping):
        return Batch((), first.inputs, first.labels, where)
    inputs = (first.inputs,) if isinstance(first.inputs, torch.Tensor) else tuple(first.inputs)
    return Batch(inputs, {}, first.labels, where)


def _fit(
    model: nn.Module,
    work: _Learning,
    file: Path | None,
    record: Callable[[TrainState[Any]], None] = lambda state: None,
) -> Learned:
    """Learn the tasks, resuming from the checkpoint if there is one."""
    learner, tasks, axes = work.learner, work.tasks, work.axes
    state = TrainState(learner.state)
    if file is not None and file.is_file():
        model, axes, state = read_checkpoint(file, model, axes, learner.state)
    record(state)

    def write(now: TrainState[Any], context: Context) -> None:
        record(now)
        if file is not None:
            write_checkpoint(file, context.model, now)

    resume: Any = {"state": state, "checkpoint": write}
    fitted = continual.learn(model, axes, tasks, learner, work.schedule, **resume, progress=work.progress)
    last = len(tasks) - 1
    write_replacements(learner, fitted.state.learner, Context(fitted.model, fitted.axes, tasks[last], last))
    record(fitted.state)
    names = tuple(task.name for task in tasks)
    fitted.model.eval()
    matrix = continual.accuracy_matrix(fitted.state)
    return Learned(fitted.model, fitted.axes, names, matrix, fitted.state.plans, fitted.state.sizes)


def _learn_in_folder(
    net: Inputs,
    work: _Learning,
    place: Destination,
    settings: Settings,
    model: ModelLike,
    inputs: Mapping[str, object],
) -> Learned:
    """Learn and write the run, or resume it."""
    start, loaded = time.perf_counter(), loaded_of(net)
    data = place.describe(_first_batches(work.tasks))
    with (
        run_of(place, "learn", settings, model, loaded, data=data, **inputs) as folder,
        visible(work.progress) as shown,
    ):
        (folder.path / STATISTICS).mkdir(exist_ok=True)
        file = folder.path / STATISTICS / CHECKPOINT  # not part of the finished run
        record = LearningRecord(folder, work.tasks, len(folder.own_ledger))
        learned = _fit(net.model, replace(work, progress=shown), file, record.write)
        folder.log("matrix", tasks=list(learned.tasks), **record_matrix(learned.scores))
        finish(folder, replace(loaded, model=learned.model), learn=time.perf_counter() - start)
    return learned


def _first_batches(tasks: list[Task]) -> Iterator[Source]:
    """Yield the first training and the first test examples of each task."""
    for task in tasks:
        yield Source(task.name, [first_batch(task)])
        yield Source(f"{task.name} (test)", [first_batch(replace(task, train=task.test))])


def _describe(name: str, method: str, given: Mapping[str, Any], work: _Learning) -> Settings:
    """Return the settings of the command that say what a call does."""
    schedule = work.schedule
    shared: Any = {one.name: getattr(schedule, one.name) for one in fields(Settings) if hasattr(schedule, one.name)}
    return Settings(tuple(task.name for task in work.tasks), name, method, dict(given), **shared)


def _trace(model: nn.Module, example: Example, method: str) -> AxisGraph:
    """Trace a network, and say which method needs its axes if that fails."""
    try:
        return trace(model, *example.args, **example.kwargs)
    except ValueError as error:
        raise InputError(f"{method} needs the network's axes, and it cannot be traced: {error}") from error


def move_inputs(batch: Batch, device: torch.device) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the positional and named inputs of a batch on a device.

    Args:
        batch: The batch.
        device: The device.
    """
    batch = batch.to(device)
    return batch.args, batch.kwargs
