"""``regrow.search``: search the widths and candidate operations of a network for one of a given size."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.amounts import Measure, Target, parse_share, short
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, read_inputs
from regrow.api.learn import OptimizerLike, build_schedule, first_batch, move_inputs
from regrow.axes import AxisGraph, Example
from regrow.candidates import fold_scales
from regrow.commands.searching import build_method, train_space
from regrow.commands.targets import target_measure
from regrow.data.batches import ReadOptions
from regrow.data.datasets import LoadedExamples, join_examples, to_examples
from regrow.errors import InputError
from regrow.evaluation import Latency, latency
from regrow.evaluation.continual import mean_score
from regrow.methods import MethodKind, find_method
from regrow.methods.search.assembly import Search
from regrow.methods.search.space import measure_whole
from regrow.objectives import choose_objective
from regrow.plan import Plan
from regrow.progress import Log, Progress, silent
from regrow.sources import Batch, device_of
from regrow.surgery import UndoStore
from regrow.tables import Table, format_html, format_text
from regrow.tasks import CappedExamples, Task
from regrow.tracing import trace
from regrow.training.checkpoint import read_checkpoint, write_checkpoint
from regrow.training.continual import TaskSchedule
from regrow.training.fit import finish
from regrow.training.learner import Context
from regrow.training.state import TrainState

HELD_OUT = 0.2
"""The fraction of the data that is held out where no validation data are given."""


@dataclass(frozen=True)
class SearchResult:
    """The network that a search found.

    Args:
        model: The network, without any part of the method: the one that was given, changed in place.
        axes: Its axes.
        plans: Every change of shape, in order.
        measure: What the target counts: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        target: The largest allowed size.
        before: The size before the search.
        size: The size now.
        saved: ``operations``, ``filters`` and ``weights`` → how much of the size each of them saved.
        metric: The name of the score, such as ``accuracy``.
        score: The score on the validation data; higher is better.
        rows: One row per epoch: validation score (``accuracy``), size, allowed size, kept fractions.
    """

    model: nn.Module
    axes: AxisGraph
    plans: tuple[Plan, ...]
    measure: str
    target: float
    before: float
    size: float
    saved: Mapping[str, float]
    metric: str
    score: float
    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        return format_text([self._table()], self._summary())

    def _repr_html_(self) -> str:
        """Return the sizes as an HTML table, for notebooks."""
        return format_html([self._table()], self._summary())

    def _table(self) -> Table:
        rows = [(name, short(value)) for name, value in self.saved.items() if value]
        return Table("", ("removed", self.measure), rows, (1,))

    def _summary(self) -> str:
        sizes = f"{short(self.before)} → {short(self.size)} {self.measure} (target {short(self.target)})"
        return f"{sizes}, validation {self.metric} {self.score:.3f}"


def search(
    model: ModelLike,
    data: Any,
    *,
    target: str | Target = "",
    smaller: str | float | None = None,
    validation: Any = None,
    method: str = "mgas",
    settings: Mapping[str, Any] | None = None,
    loss: LossLike = None,
    epochs: int = 10,
    batch_size: int = 64,
    optimizer: OptimizerLike = "sgd",
    lr: float = 0.01,
    device: DeviceLike = None,
    seed: int = 0,
    example: Any = None,
    axes: AxisGraph | None = None,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    progress: Progress = silent,
    **training: Any,
) -> SearchResult:
    """Search a network for the widths and operations that serve its loss best within a target size.

    The network is trained from the weights that it has, while what matters least is removed: units of free axes, of the
    operations that it marks with :class:`regrow.Candidates`, and single weights under a target in ``nonzero``.

    Args:
        model: The network, changed in place; or a model's name or a run folder.
        data: The training data with labels, as for :func:`regrow.prune`.
        target: The largest allowed size: ``"params=1M"``, ``"macs=2G"`` (of dense kernels, one example),
            ``"bytes=200M"``, ``"nonzero=50k"``, or ``"ms=12"`` for a batch on this device; or a share of what the
            network has, ``"macs=50%"``.
        smaller: The share of all parameters that is removed: ``"30%"`` or 0.3 is the target ``"params=70%"``.
        validation: Data for the reported scores; ``None``: a fifth of ``data`` is held out. An iterable that cannot be
            indexed is read into memory for that.
        method: One of ``regrow.methods.SEARCHERS``.
        settings: Settings of the method that differ from its defaults; but here images are not shifted and mirrored
            unless ``augment=True`` says so.
        loss: The loss, as for :func:`regrow.prune`.
        epochs: Passes over the data; 0 for methods that do not train.
        batch_size: Examples per step.
        optimizer: As for :func:`regrow.learn`.
        lr: Learning rate of the network's parameters.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        seed: Seed of the order of examples and of everything random.
        example: The input with which the network is traced; ``None``: two examples of the data.
        axes: The network's axes, if they are known; it is then not traced.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        checkpoint: A file that is written after each epoch, and from which the same call resumes if it exists. Times of
            a target in ms are then measured anew.
        progress: Called with (steps done, steps in all, what is being done).
        **training: More fields of :class:`regrow.training.continual.TaskSchedule`: ``weight_decay``, ``decay``,
            ``precision``.

    Raises:
        ValueError: If the method or a setting is unknown, the target cannot be met, or the data have no labels.

    >>> inputs = torch.randn(80, 6)
    >>> net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> result = search(net, (inputs, (inputs[:, 0] > 0).long()), smaller="50%", epochs=4)
    >>> result.size <= result.target, result.model[0].out_features < 32
    (True, True)
    """
    text, own = _target(target, smaller), _settings(method, settings or {})
    known = Example() if example is None else example
    net = read_inputs(model, example=known, tokenizer=tokenizer, device=device, progress=progress)
    task = _read_task(net, data, validation, batch_size, seed)
    given: Any = {"epochs": max(1, epochs), "batch_size": batch_size, "lr": lr, "seed": seed, **training}
    schedule = build_schedule(optimizer, objective=choose_objective(loss, first_batch(task)), **given)
    if axes is None:
        first = Example(*move_inputs(first_batch(task), device_of(net.model)))
        first = first if example is None else net.example
        axes = trace(net.model, *first.args, **first.kwargs)
    table = _time(net.model, task, batch_size) if target_measure(text) == Measure.TIME else None
    found = build_method(method, own, net.model, axes, text, seed=seed, epochs=epochs, table=table)
    context = Context(net.model, axes, task, epochs=epochs, seed=seed, undo=UndoStore(), objective=schedule.objective)
    found.check(context)
    return _run(found, context, schedule if epochs else None, checkpoint, progress)


def _settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method, which changes no images unless they say so: a user's data do that themselves."""
    entry = find_method(MethodKind.SEARCH, method)
    plain = {"augment": False} if any(one.name == "augment" for one in fields(entry.settings)) else {}
    return {**plain, **given}


def _run(
    search: Search,
    context: Context,
    schedule: TaskSchedule | None,
    checkpoint: str | Path | None,
    progress: Progress,
) -> SearchResult:
    """Search, resuming from the checkpoint if there is one."""
    rows: dict[str, list[dict[str, Any]]] = {"epoch": [], "levels": []}

    def log(kind: str, /, **row: Any) -> None:
        if kind in rows:
            rows[kind].append(row)

    file, state = Path(checkpoint) if checkpoint is not None else None, TrainState(search.learner.state)
    before = measure_whole(search.rules.space, (), context)
    model, axes, undo = context.model, context.axes, context.undo
    if file is not None and file.is_file():
        model, axes, state = read_checkpoint(file, model, axes, search.learner.state, None, undo)
        rows["epoch"] += map(dict, state.learner.history)

    def write(now: TrainState[Any], there: Context) -> None:
        if file is not None:
            write_checkpoint(file, there.model, now, undo)

    now = _at(context, model, axes, log, 0)
    more: Any = {"state": state, "checkpoint": write, "log": log, "progress": progress}
    fitted = train_space(search, now, schedule, **more)
    now = _at(context, fitted.model, fitted.axes, log, context.epochs)
    fitted, last = finish(search.learner, fitted, now)
    fold_scales(fitted.model)
    fitted.model.eval()
    (levels,) = rows["levels"]
    return SearchResult(
        fitted.model,
        fitted.axes,
        (*fitted.state.plans, *last),
        str(search.rules.space.measure),
        search.rules.space.target,
        before,
        levels["size"],
        levels["saved"],
        context.objective.metric,
        mean_score(fitted.model, context.task.test, context.objective),
        tuple(rows["epoch"]),
    )


def _at(context: Context, model: nn.Module, axes: AxisGraph, log: Log, epoch: int) -> Context:
    """Return the context at an epoch of the search."""
    return replace(context, model=model, axes=axes, log=log, epoch=epoch)


def _target(target: str | Target, smaller: str | float | None) -> str:
    """Return the target as text, from one of two ways to give it."""
    if bool(target) == (smaller is not None):
        given = f"target={target!s} and smaller={smaller}" if target else "neither"
        raise InputError(f'give one of target= and smaller=, got {given}; for example smaller="30%"')
    return str(target) if smaller is None else str(Target.smaller(parse_share(str(smaller))))


def _read_task(net: Inputs, data: Any, validation: Any, batch_size: int, seed: int) -> Task:
    """Return training and validation examples, all of which are read in batches of at most ``batch_size``."""
    shift = type(net.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    side = next((one.shape[-1] for one in net.example.args if isinstance(one, torch.Tensor)), 224)
    reading = ReadOptions(batch_size, net.tokenizer, size=side, shift=shift)
    train = to_examples(data, reading)
    if validation is not None:
        test = to_examples(validation, reading)
    else:
        if isinstance(train, LoadedExamples):
            train = join_examples(train.batches(0))
        n, many = len(train), max(1, round(HELD_OUT * len(train)))
        if n - many < 2:
            raise InputError(f"{n} examples leave {n - many} to learn from; give more data, or validation=")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        test, train = (train.subset(part.sort()[0]) for part in order.split([many, n - many]))
    return Task("search", CappedExamples(train, batch_size), CappedExamples(test, batch_size), ())


def _time(model: nn.Module, task: Task, batch_size: int) -> Latency:
    """Return the measured times of the network's operations and layers on a batch."""
    return latency(model, Batch(*move_inputs(first_batch(task, batch_size), device_of(model))))
