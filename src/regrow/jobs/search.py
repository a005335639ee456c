"""Search a space for a network of a given size, whether named on the command line or given in Python, on every rank."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from regrow import store
from regrow.core.amounts import format_short, parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.candidates import Staged, fold_scales
from regrow.core.plan import Plan
from regrow.core.tables import Table, format_html, format_text
from regrow.core.tasks import first_examples, input_shape
from regrow.distributed.parallel import Parallel
from regrow.evaluation import dense
from regrow.evaluation.continual import mean_score
from regrow.evaluation.timing import fastest_pass
from regrow.jobs.inputs import check_same_settings, check_same_tasks
from regrow.jobs.recording import ActiveRun, Invocation, Record, RunStart, read_history
from regrow.jobs.search_inputs import (
    Parts,
    SearchInputs,
    build_search,
    make_schedule,
    measure_statistics,
    measure_times,
    read_parts,
    trace_examples,
)
from regrow.jobs.spaces import MemoryWatch, build_space, extract_network
from regrow.jobs.starting import find_start
from regrow.methods.search import Search
from regrow.methods.search.retrain import RetrainState, build
from regrow.methods.search.space import SearchState, measure_unmasked
from regrow.nets.devices import choose_device
from regrow.nets.loaded import Origin
from regrow.settings.declaration import check_settings
from regrow.settings.search import Settings
from regrow.store.run_folder import RunFolder
from regrow.store.statistics import FOLDER as STATISTICS
from regrow.surgery import UndoStore
from regrow.tracing.meta_copy import clone_model
from regrow.training.continual import learn
from regrow.training.fit import FitOptions, Fitted, finish_training
from regrow.training.learner import Boundary, Context, Event, write_replacements
from regrow.training.state import CHECKPOINT, TrainState, resume_training, write_checkpoint

RETRAINING = "retraining.safetensors"
GIVEN = ("target", "measure", "stages", "seed")
"""Names of method settings that the run sets from its own settings."""


@dataclass(frozen=True)
class SearchResult:
    """The network that a search found."""

    model: nn.Module
    axes: AxisGraph
    plans: tuple[Plan, ...]
    measure: str
    target: float
    before: float
    size: float
    saved: Mapping[str, float]  # `operations`, `filters` and `weights` → how much of the size each of them saved
    metric: str
    score: float  # the score on the validation data; higher is better
    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        return format_text([self._table()], self._summary())

    def _repr_html_(self) -> str:
        """Return the sizes as an HTML table, for notebooks."""
        return format_html([self._table()], self._summary())

    def _table(self) -> Table:
        rows = [(name, format_short(value)) for name, value in self.saved.items() if value]
        return Table("", ("removed", self.measure), rows, (1,))

    def _summary(self) -> str:
        sizes = f"{format_short(self.before)} → {format_short(self.size)} {self.measure}"
        return f"{sizes} (target {format_short(self.target)}), validation {self.metric} {self.score:.3f}"


@dataclass
class SearchRecord:
    """Collects the rows of a search (kind and values), and writes what it has reached, each thing once."""

    record: Record
    watch: MemoryWatch
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    plans: int = 0
    events: int = 0
    written: int = 0

    def log(self, kind: str, /, **row: Any) -> None:
        """Take a row, which :meth:`write` writes with the state that it belongs to."""
        if kind != "status":
            self.rows.append((kind, row))

    def of(self, kind: str) -> tuple[dict[str, Any], ...]:
        """Return the rows of a kind."""
        return tuple(row for name, row in self.rows if name == kind)

    def write(self, now: TrainState[Any], *, unfinished: int = 0) -> None:
        """Write what is new since the last call; ``unfinished`` stages at the end may yet need more memory."""
        if isinstance(self.record, RunFolder):
            for plan in now.plans[self.plans :]:
                self.record.own_ledger.append(plan)
        for i in range(self.events, len(now.events)):
            self.record.log("commit", number=i, **now.events[i])
        for kind, row in self.rows[self.written :]:
            self.record.log(kind, row)
        self.plans, self.events, self.written = len(now.plans), len(now.events), len(self.rows)
        stages = [*self.watch.rows.values()]
        for i, stage in enumerate(stages[: len(stages) - unfinished]):
            self.record.log("memory", number=i, **asdict(stage))


def carry_out(settings: Settings, inputs: Callable[[ActiveRun], SearchInputs], run: ActiveRun) -> SearchResult:
    """Search a network within the target size, train it if there are epochs for that, test it, and record it.

    An interrupted run is resumed. All processes of the run call this, and train together.
    """
    check_settings(settings)
    identity = {"verb": "search", "settings": asdict(settings)}
    recorded = run.recorder.check(identity)
    opened = inputs(run)
    parts = opened.parts
    batch, table = measure_times(settings, opened, recorded.get("latency"), run.ranks)
    check_same_tasks(run.ranks, opened.model, (parts.search, parts.whole))
    search = build_search(settings, opened.model, opened.axes, opened.stages, table, augments=not opened.in_place)
    context = Context(
        opened.model,
        opened.axes,
        parts.search,
        epochs=settings.epochs,
        seed=settings.seed,
        undo=UndoStore(),
        objective=parts.objective,
    )
    search.check(context)
    taken = {name: value for name, value in search.settings.items() if name not in {*settings.method_settings, *GIVEN}}
    with run.begin(RunStart({**identity, "defaults": taken}, opened.start, call=opened.call)) as record:
        record.update(latency=asdict(table) if table else None)
        if opened.stages:
            record.log("stages", **asdict(opened.stages))
        before = measure_unmasked(search.space, (), context)
        with run.stage("search"):
            fitted, log = _search(settings, opened, search, context, run)
            model, origin = extract_network(fitted.model, opened.origin, in_place=opened.in_place)
            measure_statistics(model, context, settings.batch_size)
        example = first_examples(parts.search.test if parts.test is None else parts.test, 1).inputs
        with run.stage("evaluate"):
            score = mean_score(model, parts.search.test, parts.objective) if run.ranks.leads else nan
            if record.kept:
                _write_network(model, record.path / "found", origin, opened)
                if 0 <= score <= 1:
                    record.log("found", accuracy=score, **dense(model, example))
                else:  # such as a negative loss
                    record.log("result", metric=parts.objective.metric, score=score, **dense(model, example))
        if settings.retrain:
            inherit = settings.inherit or opened.start is not None
            with run.stage("retrain"):
                model = retrain(run, replace(settings, inherit=inherit), parts, model)
        with run.stage("evaluate"):
            if record.kept:
                _write_network(model, record.path, origin, opened)
                if table and batch:
                    record.log("latency", whole=table.total, found=fastest_pass(model, batch) / 1e6)
                if parts.test is not None and 0 <= (accuracy := mean_score(model, parts.test, parts.objective)) <= 1:
                    record.log("test", accuracy=accuracy, images=len(parts.test), **dense(model, example))
        run.finish()
        (levels,), space = log.of("levels"), search.space
        return SearchResult(
            model,
            fitted.axes,
            fitted.state.plans,
            str(space.measure),
            space.target,
            before,
            levels["size"],
            levels["saved"],
            parts.objective.metric,
            score,
            log.of("epoch"),
        )


def _search(
    settings: Settings, inputs: SearchInputs, search: Search, context: Context, run: ActiveRun
) -> tuple[Fitted[SearchState], SearchRecord]:
    """Run or resume the search; return the network, cut by all plans, and the rows that were logged."""
    record, undo = run.record, context.undo
    file = record.path / STATISTICS / CHECKPOINT
    if record.kept:
        file.parent.mkdir(exist_ok=True)
    history = read_history(record, "commit") if file.is_file() else None
    model, axes, state = resume_training(
        run.ranks, history, file, context.model, context.axes, search.learner.state, undo
    )
    if isinstance(record, RunFolder):
        record.own_ledger.truncate(len(state.plans))
    if state.learner.recomputed:
        cast(Staged, model).recomputed = True
    budget = parse_bytes(settings.memory) if settings.memory else 0
    watch = MemoryWatch(search, budget, settings.batch_size, dict(state.learner.memory))
    log = SearchRecord(record, watch, [("epoch", dict(row)) for row in state.learner.history], len(state.plans))

    def write(now: TrainState[SearchState], there: Context) -> None:
        log.write(now, unfinished=1)
        if record.kept:
            recomputed = bool(search.space.ends) and cast(Staged, there.model).recomputed
            now = replace(now, learner=replace(now.learner, memory=dict(watch.rows), recomputed=recomputed))
            write_checkpoint(file, there.model, now, undo, outside=True)

    context = replace(context, model=model, axes=axes, log=log.log)
    if settings.epochs:
        fitted = learn(
            model,
            axes,
            [context.task],
            search.learner,
            inputs.schedule,
            state=state,
            options=FitOptions(
                undo=undo,
                checkpoint=write,
                around=watch,
                log=log.log,
                progress=run.progress,
                parallel=Parallel(run.ranks, by_rows=True),
            ),
        )
    else:
        begun = search.learner.boundary(state.learner, context, Boundary(Event.TASK_START))
        fitted = Fitted(model, axes, replace(state, learner=begun))
    log.write(fitted.state)
    end = replace(context, model=fitted.model, axes=fitted.axes, epoch=settings.epochs)
    fitted, last = finish_training(search.learner, fitted, end)
    fitted = replace(fitted, state=replace(fitted.state, plans=(*fitted.state.plans, *last)))
    log.write(fitted.state)
    return fitted, log


def _write_network(model: nn.Module, folder: Path, origin: Origin, inputs: SearchInputs) -> None:
    """Write a network that a search left into a folder, with the tokenizer of the network that it started from."""
    start = inputs.start
    store.write_model(replace(start, model=model, origin=origin) if start else model, folder, origin=origin)


def retrain(run: ActiveRun, settings: Settings, parts: Parts, searched: nn.Module) -> nn.Module:
    """Train the found network on all training examples, re-initialised unless ``inherit``; weights at 0 stay 0."""
    record = run.record
    model, schedule = clone_model(searched), make_schedule(settings, parts.objective, settings.retrain, "cosine")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if not settings.inherit and callable(reset):
                reset()
    axes = trace_examples(model, parts.whole, parts)
    context = Context(model, axes, parts.whole, objective=parts.objective)
    learner = build(settings.cutout, context, dict(searched.named_parameters()))
    file = record.path / STATISTICS / RETRAINING
    file.parent.mkdir(exist_ok=True)

    def write(now: TrainState[RetrainState], there: Context) -> None:
        if record.kept:
            write_checkpoint(file, there.model, now)

    history = TrainState(None) if file.is_file() else None
    model, axes, state = resume_training(run.ranks, history, file, model, axes, learner.state)
    options = FitOptions(checkpoint=write, progress=run.progress, parallel=Parallel(run.ranks, by_rows=True))
    fitted = learn(model, axes, [parts.whole], learner, schedule, state=state, options=options)
    write_replacements(learner, fitted.state.learner, replace(context, model=fitted.model, axes=fitted.axes))
    fold_scales(fitted.model)
    return fitted.model.eval()


def open_named(settings: Settings, invocation: Invocation, run: ActiveRun) -> SearchInputs:
    """Open the network and the data that settings name."""
    with run.stage("load"):
        start = find_start(settings.space, settings.data, settings.input, invocation)
        device = choose_device(settings.device, run.ranks)
        if settings.cutout and start and start.tokenizer is not None:
            raise ValueError(f"--cutout {settings.cutout} is of images, and the data are text: drop it")
        parts = read_parts(settings, start)
        if settings.cutout and settings.cutout >= (side := min(input_shape(parts.whole.train)[1:])):
            raise ValueError(
                f"--cutout {settings.cutout} of pictures of {side} pixels: take 0, for none, to {side - 1}"
            )
        model, origin, stages = build_space(settings, parts.search, start)
        model.to(device)
    with run.stage("trace"):
        axes = trace_examples(model, parts.search, parts)
    schedule = make_schedule(settings, parts.objective, settings.epochs)
    return SearchInputs(model, origin, axes, parts, schedule, start, stages)


def run(settings: Settings, invocation: Invocation) -> RunFolder:
    """Search the space that settings name, as ``regrow search`` does, and return the folder."""
    check_same_settings(invocation.ranks, settings)
    run = invocation.start(settings, settings.space, undo=settings.undo)
    carry_out(settings, partial(open_named, settings, invocation), run)
    return RunFolder(Path(invocation.out))
