"""``regrow.search``: search the widths and candidate operations of a network for one of a given size."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.amounts import Measure, Target, parse_share, short
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, choose_reading, read_inputs
from regrow.api.learn import OptimizerLike, build_schedule, check_arguments, find_objective, first_batch, move_inputs
from regrow.api.runs import Destination, loaded_of, name_of, run_of
from regrow.api.runs import finish as finish_run
from regrow.axes import AxisGraph, Example
from regrow.candidates import fold_scales
from regrow.commands import latencies
from regrow.commands.search_record import SearchRecord
from regrow.commands.searching import build_method, measure_statistics, train_space
from regrow.data.datasets import fix_order, to_examples
from regrow.errors import InputError
from regrow.evaluation import Latency, dense, latency
from regrow.evaluation.continual import mean_score
from regrow.methods import MethodKind, find_method
from regrow.methods.search.assembly import Search
from regrow.methods.search.space import measure_whole
from regrow.plan import Plan
from regrow.progress import Log, Progress, silent
from regrow.progress_bar import visible
from regrow.settings.search import Settings, parse_search_target
from regrow.sources import Batch, Source, device_of
from regrow.store.building import describe_origin
from regrow.store.statistics import FOLDER as STATISTICS
from regrow.surgery import UndoStore
from regrow.tables import Table, format_html, format_text
from regrow.tasks import CappedExamples, Task, first_examples
from regrow.training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from regrow.training.continual import TaskSchedule
from regrow.training.fit import finish
from regrow.training.learner import Context
from regrow.training.state import TrainState

HELD_OUT = 0.2
"""The fraction of the data that is held out where no validation data are given."""
MORE = ("weight_decay", "decay", "precision")
"""The further arguments of :func:`search`."""


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
    out: str | Path | None = None,
    track: str = "",
    progress: Progress = silent,
    **training: Any,
) -> SearchResult:
    """Search a network for the widths and operations that serve its loss best within a target size.

    It is trained from the weights that it has, while what matters least is removed: units of free axes, operations in
    :class:`regrow.Candidates`, and single weights (target ``nonzero``). At the end, BatchNorms are measured again.

    Args:
        model: The network, changed in place; or a model's name or a run folder.
        data: The training data with labels, as for :func:`regrow.prune`.
        target: The largest allowed size: ``"params=1M"``, ``"macs=2G"`` (of one example), ``"bytes=200M"``,
            ``"nonzero=50k"``, ``"ms=12"`` (a batch on this device); or a share of what it has, ``"macs=50%"``.
        smaller: The share of all parameters that is removed: ``"30%"`` or 0.3 is the target ``"params=70%"``.
        validation: Data for the reported scores; ``None``: a fifth of ``data`` (read into memory if it has no indices).
        method: One of ``regrow.methods.SEARCHERS``.
        settings: Settings that differ from the method's defaults; images are shifted and mirrored by ``augment=True``.
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
        checkpoint: A file that is written after each epoch, and from which the same call resumes; ``out`` has its own.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        track: With ``out``: a tracker that gets every measurement, too: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.
        progress: Called with (steps done, steps in all, what is being done).
        **training: ``weight_decay``, ``decay`` and ``precision``, as for :func:`regrow.learn`.

    Raises:
        ValueError: If the method or a setting is unknown, the target cannot be met, or the data have no labels.

    >>> inputs, net = torch.randn(80, 6), nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> result = search(net, (inputs, (inputs[:, 0] > 0).long()), smaller="50%", epochs=4)
    >>> result.size <= result.target, result.model[0].out_features < 32
    (True, True)
    """
    check_arguments("search", training, MORE, "the size is given by target='macs=50%' or smaller='30%'; ")
    place = Destination(out, track, checkpoint).checked(data=data, validation=validation)
    text, own = _target(target, smaller), _settings(method, settings or {})
    known = Example() if example is None else example
    net = read_inputs(model, example=known, tokenizer=tokenizer, device=device, progress=progress)
    task = _read_task(net, data, validation, batch_size, seed)
    given: Any = {"epochs": max(1, epochs), "batch_size": batch_size, "lr": lr, "seed": seed, **training}
    schedule = build_schedule(optimizer, objective=find_objective(net.model, loss, first_batch(task)), **given)
    net = _with_example(net, task) if example is None else net
    axes = net.trace() if axes is None else axes
    table = _time(net.model, task, batch_size, place) if parse_search_target(text).measure == Measure.TIME else None
    found = build_method(method, own, net.model, axes, text, seed=seed, epochs=epochs, table=table)
    work = _begin(found, Context(net.model, axes, task, epochs=epochs, seed=seed), schedule, table, progress)
    if place.out is None:
        return _run(work, Path(checkpoint) if checkpoint is not None else None)
    inputs = {"loss": name_of(loss), "optimizer": name_of(optimizer), "training": training}
    return _run_in_folder(net, work, place, _describe(net.model, method, settings or {}, text, work), model, inputs)


@dataclass(frozen=True)
class _Searching:
    """What is searched, and how."""

    search: Search
    context: Context
    schedule: TaskSchedule
    table: Latency | None
    progress: Progress


def _begin(
    search: Search, context: Context, schedule: TaskSchedule, table: Latency | None, progress: Progress
) -> _Searching:
    """Return what is searched, after checking that the method can search it."""
    context = replace(context, undo=UndoStore(), objective=schedule.objective)
    search.check(context)
    return _Searching(search, context, schedule, table, progress)


def _with_example(net: Inputs, task: Task) -> Inputs:
    """Return the inputs with two training examples as the example."""
    return replace(net, example=Example(*move_inputs(first_batch(task), device_of(net.model))))


def _settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method, which changes no images unless they say so: a user's data do that themselves."""
    entry = find_method(MethodKind.SEARCH, method)
    plain = {"augment": False} if any(one.name == "augment" for one in fields(entry.settings)) else {}
    return {**plain, **given}


def _run(work: _Searching, file: Path | None, record: SearchRecord | None = None) -> SearchResult:
    """Search, resuming from the checkpoint if there is one; what is reached goes to the record, too."""
    search, context = work.search, work.context
    rows: dict[str, list[dict[str, Any]]] = {"epoch": [], "levels": []}

    def log(kind: str, /, **row: Any) -> None:
        if record:
            record.log(kind, **row)
        if kind in rows:
            rows[kind].append(row)

    state = TrainState(search.learner.state)
    before = measure_whole(search.rules.space, (), context)
    model, axes, undo = context.model, context.axes, context.undo
    if file is not None and file.is_file():
        model, axes, state = read_checkpoint(file, model, axes, search.learner.state, None, undo)
        rows["epoch"] += map(dict, state.learner.history)

    def write(now: TrainState[Any], there: Context) -> None:
        if record:
            record.write(now)
        if file is not None:
            write_checkpoint(file, there.model, now, undo)

    now = _at(context, model, axes, log, 0)
    more: Any = {"state": state, "checkpoint": write, "log": log, "progress": work.progress}
    fitted = train_space(search, now, work.schedule if context.epochs else None, **more)
    now = _at(context, fitted.model, fitted.axes, log, context.epochs)
    fitted, last = finish(search.learner, fitted, now)
    fold_scales(fitted.model)
    measure_statistics(fitted.model, now, work.schedule.batch_size)
    fitted.model.eval()
    if record:
        record.write(replace(fitted.state, plans=(*fitted.state.plans, *last)))
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


def _run_in_folder(
    net: Inputs,
    work: _Searching,
    place: Destination,
    settings: Settings,
    model: ModelLike,
    inputs: Mapping[str, object],
) -> SearchResult:
    """Search and write the run, or resume it."""
    start, loaded, task = time.perf_counter(), loaded_of(net), work.context.task
    both = {"data": task, "validation": replace(task, train=task.test)}
    data = place.describe(Source(name, [first_batch(part)]) for name, part in both.items())
    with (
        run_of(place, "search", settings, model, loaded, data=data, **inputs) as folder,
        visible(work.progress) as shown,
    ):
        if work.table:
            latencies.write(folder.path, work.table)
        (folder.path / STATISTICS).mkdir(exist_ok=True)
        record = SearchRecord(folder, len(folder.own_ledger))
        result = _run(replace(work, progress=shown), folder.path / STATISTICS / CHECKPOINT, record)
        size = dense(result.model, first_examples(task.test, 1).inputs)
        if 0 <= result.score <= 1:
            folder.log("found", accuracy=result.score, **size)
        else:  # such as a negative loss
            folder.log("result", metric=result.metric, score=result.score, **size)
        finish_run(folder, replace(loaded, model=result.model), search=time.perf_counter() - start)
    return result


def _describe(model: nn.Module, method: str, given: Mapping[str, Any], target: str, work: _Searching) -> Settings:
    """Return the settings of the command that say what a call does."""
    shared = {one: getattr(work.schedule, one) for one in ("batch_size", "lr", "weight_decay", "precision", "seed")}
    more: Any = {"method": method, "method_settings": dict(given), "epochs": work.context.epochs, "retrain": 0}
    return Settings(describe_origin(model).name, "data", target, **more, **shared)


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
    side = next((one.shape[-1] for one in net.example.args if isinstance(one, torch.Tensor)), 224)
    reading = choose_reading(net.model, net.tokenizer, batch_size, side)
    train = to_examples(data, reading)
    if validation is not None:
        test = to_examples(validation, reading)
    else:
        train = fix_order(train)
        n, many = len(train), max(1, round(HELD_OUT * len(train)))
        if n - many < 2:
            raise InputError(f"{n} examples leave {n - many} to learn from; give more data, or validation=")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        test, train = (train.subset(part.sort()[0]) for part in order.split([many, n - many]))
    return Task("search", CappedExamples(train, batch_size), CappedExamples(test, batch_size), ())


def _time(model: nn.Module, task: Task, batch_size: int, place: Destination) -> Latency:
    """Return the measured times of the network's operations and layers on a batch, or those of an interrupted run."""
    batch = Batch(*move_inputs(first_batch(task, batch_size), device_of(model)))
    begun = place.begun()
    return latencies.read_or_measure(begun, model, batch, False) if begun else latency(model, batch)
