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
from regrow.core.amounts import Measure, format_short, parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.candidates import Staged, fold_scales
from regrow.core.errors import InputError
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
    SearchData,
    SearchInputs,
    add_blocks,
    build_search,
    check_epochs,
    make_schedule,
    measure_times,
    read_search_data,
    remeasure_batchnorms,
    trace_examples,
)
from regrow.jobs.spaces import MemoryWatch, build_space, extract_network
from regrow.jobs.starting import find_space_start
from regrow.methods.search import Search
from regrow.methods.search.retrain import RetrainState, build
from regrow.methods.search.space import SearchState, measure_unmasked
from regrow.nets.devices import choose_device
from regrow.nets.loaded import Origin
from regrow.settings.declaration import check_settings
from regrow.settings.search import Settings, parse_search_target
from regrow.store.run_folder import RunFolder
from regrow.store.statistics import FOLDER as STATISTICS
from regrow.surgery import UndoStore
from regrow.tracing.meta_copy import clone_model
from regrow.training.continual import learn
from regrow.training.fit import FitOptions, Fitted, finish_training
from regrow.training.learner import Boundary, Context, Event, write_replacements
from regrow.training.state import CHECKPOINT, TrainState, resume_training, write_checkpoint

RETRAINING_FILE = "retraining.safetensors"
# Names of method settings that the run sets from its own settings.
SET_BY_RUN = ("target", "measure", "stages", "seed")


@dataclass(frozen=True)
class SearchResult:
    """The network that a search found."""

    model: nn.Module  # the one that was found, retrained if that was asked for
    axes: AxisGraph  # those of the searched network after all plans
    plans: tuple[Plan, ...]
    measure: str  # what sizes count, such as `params`
    target: float  # the largest size allowed
    before: float  # the size of the whole space
    size: float  # the size that was found
    saved: Mapping[str, float]  # `operations`, `filters` and `weights` → how much of the size each of them saved
    metric: str  # what the score is
    score: float  # the score on the validation data; higher is better
    rows: tuple[Mapping[str, Any], ...]  # one per epoch

    def __str__(self) -> str:
        return format_text([self._table()], self._summary())

    def _repr_html_(self) -> str:
        """Return the sizes as an HTML table, for notebooks."""
        return format_html([self._table()], self._summary())

    def _table(self) -> Table:
        """Return how much of the size removed operations, filters and weights saved; what saved nothing is left out."""
        rows = [(name, format_short(value)) for name, value in self.saved.items() if value]
        return Table("", ("removed", self.measure), rows, (1,))

    def _summary(self) -> str:
        """Return size, target and score in one line."""
        sizes = f"{format_short(self.before)} → {format_short(self.size)} {self.measure}"
        return f"{sizes} (target {format_short(self.target)}), validation {self.metric} {self.score:.3f}"


@dataclass
class SearchRecord:
    """Collects the rows of a search, and writes what it has reached to its run: each plan, event and row once."""

    record: Record
    watch: MemoryWatch
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # kind, values
    written_plans: int = 0  # how many are written so far, as below
    written_events: int = 0
    written_rows: int = 0

    def log(self, kind: str, /, **row: Any) -> None:
        """Keep a row until the next :meth:`write`; one of the kind ``status`` is dropped."""
        if kind != "status":
            self.rows.append((kind, row))

    def rows_of(self, kind: str) -> tuple[dict[str, Any], ...]:
        """Return the values of all rows of a kind, in order."""
        return tuple(row for name, row in self.rows if name == kind)

    def write(self, state: TrainState[Any], *, unfinished: int = 0) -> None:
        """Write what ``state``, of the whole search so far, and rows have beyond those of the last call.

        Memory is logged per stage, but for the last ``unfinished`` ones, which may yet need more.
        """
        if isinstance(self.record, RunFolder):
            for plan in state.plans[self.written_plans :]:
                self.record.own_ledger.append(plan)
        for i in range(self.written_events, len(state.events)):
            self.record.log("commit", number=i, **state.events[i])
        for kind, row in self.rows[self.written_rows :]:
            self.record.log(kind, row)
        self.written_plans, self.written_events, self.written_rows = len(state.plans), len(state.events), len(self.rows)
        stages = [*self.watch.rows.values()]
        for i, stage in enumerate(stages[: len(stages) - unfinished]):
            self.record.log("memory", number=i, **asdict(stage))


def search_network(
    settings: Settings, open_inputs: Callable[[ActiveRun], SearchInputs], run: ActiveRun
) -> SearchResult:
    """Search a network within the target size, train it if there are epochs for that, test it, and record the run.

    The network is changed in place; that of the result may be another. An interrupted run is resumed. All processes of
    the run call this, and train together. Mistakes in the settings and inputs raise before anything is written.
    """
    check_settings(settings)
    identity = {"verb": "search", "settings": asdict(settings)}
    recorded = run.recorder.check(identity)
    opened = open_inputs(run)
    data = opened.data
    check_training(settings, opened.model)
    batch, table = measure_times(settings, opened, recorded.get("latency"), run)
    check_same_tasks(run.ranks, opened.model, (data.search, data.whole))
    search = build_search(settings, opened.model, opened.axes, opened.stages, table, augments=not opened.in_place)
    axes = add_blocks(search, opened.model, opened.axes)
    context = Context(opened.model, axes, data.search, epochs=settings.epochs, seed=settings.seed)
    context = replace(context, undo=UndoStore(), objective=data.objective)
    search.check(context)
    stated = {*settings.method_settings, *SET_BY_RUN}
    defaults = {name: value for name, value in search.settings.items() if name not in stated}
    start = RunStart({**identity, "defaults": defaults}, opened.start, python_call=opened.python_call)
    with run.begin(start) as record:
        record.update(latency=asdict(table) if table else None)
        if opened.stages:
            record.log("stages", **asdict(opened.stages))
        before = measure_unmasked(search.space, (), context)
        with run.stage("search"):
            fitted, log = _search(settings, opened, search, context, run)
            model, origin = extract_network(fitted.model, opened.origin, in_place=opened.in_place)
            remeasure_batchnorms(model, context, settings.batch_size)
        example = first_examples(data.search.test if data.test is None else data.test, 1).inputs
        with run.stage("evaluate"):
            score = mean_score(model, data.search.test, data.objective) if run.ranks.leads else nan
            if record.is_kept:
                _write_network(model, record.path / "found", origin, opened)
                if 0 <= score <= 1:
                    record.log("found", accuracy=score, **dense(model, example))
                else:  # such as a negative loss
                    record.log("result", metric=data.objective.metric, score=score, **dense(model, example))
        if settings.retrain:
            with run.stage("retrain"):
                model = (
                    _retrain_both(run, settings, data, model) if settings.both else retrain(run, settings, data, model)
                )
        with run.stage("evaluate"):
            if record.is_kept:
                _write_network(model, record.path, origin, opened)
                if table and batch:
                    record.log("latency", whole=table.total, found=fastest_pass(model, batch, repeats=25) / 1e6)
                if data.test is not None and 0 <= (accuracy := mean_score(model, data.test, data.objective)) <= 1:
                    record.log("test", accuracy=accuracy, images=len(data.test), **dense(model, example))
        run.finish()
        (levels,), space = log.rows_of("levels"), search.space
        return SearchResult(
            model,
            fitted.axes,
            fitted.state.plans,
            str(space.measure),
            space.target,
            before,
            levels["size"],
            levels["saved"],
            data.objective.metric,
            score,
            log.rows_of("epoch"),
        )


def _search(
    settings: Settings, inputs: SearchInputs, search: Search, context: Context, run: ActiveRun
) -> tuple[Fitted[SearchState], SearchRecord]:
    """Run or resume the search; return the network, cut in place by all plans, with its state, and the logged rows."""
    record, undo = run.record, context.undo
    file = record.path / STATISTICS / CHECKPOINT
    if record.is_kept:
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
    search.around_trial = watch.measure_trial
    done = [row for row in record.metrics() if row["what"] == "epoch"][: None if state.number else state.epoch]
    rows = [("epoch", {key: value for key, value in row.items() if key != "what"}) for row in done]
    log = SearchRecord(record, watch, rows, len(state.plans))

    def save(state: TrainState[SearchState], context: Context) -> None:
        log.write(state, unfinished=1)
        if record.is_kept:
            recomputed = bool(search.space.ends) and cast(Staged, context.model).recomputed
            state = replace(state, learner=replace(state.learner, memory=dict(watch.rows), recomputed=recomputed))
            write_checkpoint(file, context.model, state, undo, outside=True)

    context = replace(context, model=model, axes=axes, log=log.log)
    if settings.epochs:
        options = FitOptions(undo=undo, checkpoint=save, around=watch, log=log.log, progress=run.progress)
        options = replace(options, parallel=Parallel(run.ranks, by_rows=True))
        fitted = learn(model, axes, [context.task], search.learner, inputs.schedule, state=state, options=options)
    else:
        learner_state = search.learner.boundary(state.learner, context, Boundary(Event.TASK_START))
        fitted = Fitted(model, axes, replace(state, learner=learner_state))
    log.write(fitted.state)
    steps = -(-len(context.task.train) // settings.batch_size)  # rounded up
    end = replace(context, model=fitted.model, axes=fitted.axes, epoch=settings.epochs, steps=steps)
    fitted, last = finish_training(search.learner, fitted, end)
    fitted = replace(fitted, state=replace(fitted.state, plans=(*fitted.state.plans, *last)))
    log.write(fitted.state)
    return fitted, log


def _write_network(model: nn.Module, folder: Path, origin: Origin, inputs: SearchInputs) -> None:
    """Write the searched network into a folder, with the tokenizer of the one that the search started from, if any."""
    start = inputs.start
    store.write_model(replace(start, model=model, origin=origin) if start else model, folder, origin=origin)


def _retrain_both(run: ActiveRun, settings: Settings, data: SearchData, searched: nn.Module) -> nn.Module:
    """Return the better on validation data of two trained copies: from the weights of the search, and from new ones."""
    held_out, scores = replace(data, whole=data.search), dict[float, nn.Module]()
    for fresh in (True, False):
        model = retrain(run, replace(settings, fresh=fresh, both=False), held_out, searched)
        score = mean_score(model, data.search.test, data.objective)
        run.record.log("retrained", fresh=fresh, score=score)
        scores[score] = model
    return scores[max(scores)]


def retrain(run: ActiveRun, settings: Settings, data: SearchData, searched: nn.Module) -> nn.Module:
    """Return a copy of the network ``searched``, in eval mode, trained on ``data.whole``; ``nonzero``: zeros stay.

    With the setting ``fresh`` it is first re-initialised from the seed. An interrupted training is resumed.
    """
    record = run.record
    model = clone_model(searched)
    schedule = make_schedule(settings, data.objective, settings.retrain, decay="cosine")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for module in model.modules() if settings.fresh else ():
            for reset in find_resets(module):
                reset()
    axes = trace_examples(model, data.whole, data)
    context = Context(model, axes, data.whole, objective=data.objective)
    counts_zeros = parse_search_target(settings.target).measure != Measure.NONZERO
    learner = build(settings.cutout, context, {} if counts_zeros else dict(searched.named_parameters()))
    file = record.path / STATISTICS / f"{'fresh' if settings.fresh else 'further'}_{RETRAINING_FILE}"
    file.parent.mkdir(exist_ok=True)

    def save(state: TrainState[RetrainState], context: Context) -> None:
        if record.is_kept:
            write_checkpoint(file, context.model, state)

    history = TrainState(None) if file.is_file() else None
    model, axes, state = resume_training(run.ranks, history, file, model, axes, learner.state)
    options = FitOptions(checkpoint=save, progress=run.progress, parallel=Parallel(run.ranks, by_rows=True))
    fitted = learn(model, axes, [data.whole], learner, schedule, state=state, options=options)
    write_replacements(learner, fitted.state.learner, replace(context, model=fitted.model, axes=fitted.axes))
    fold_scales(fitted.model)
    return fitted.model.eval()


def find_resets(module: nn.Module) -> list[Callable[[], None]]:
    """Return the method with which a module initialises its own parameters, if it has one."""
    methods = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return [method for method in methods if callable(method)][:1]


def check_training(settings: Settings, model: nn.Module) -> None:
    """Raise InputError for a network that no search can train, or whose parameters cannot be initialised again."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{name} is {kind}, and a search trains in float32; convert the network with .float(), and take "
                "precision bfloat16 to compute in it"
            )
    for path, module in model.named_modules() if settings.fresh or settings.both else ():
        if not find_resets(module) and (own := next(module.named_parameters(recurse=False), None)):
            raise InputError(
                f"--fresh and --both need new weights, and {type(module).__name__} does not initialise "
                f"{f'{path}.{own[0]}'.lstrip('.')}; give it a method reset_parameters(), or leave the option out"
            )


def open_named(settings: Settings, invocation: Invocation, run: ActiveRun) -> SearchInputs:
    """Open the network or build the space that settings name, split the data, and trace."""
    with run.stage("load"):
        start = find_space_start(settings.space, settings.data, settings.input, invocation)
        device = choose_device(settings.device, run.ranks)
        if settings.cutout and start and start.tokenizer is not None:
            raise ValueError(f"--cutout {settings.cutout} is of images, and the data are text: drop it")
        data = read_search_data(settings, start)
        if settings.cutout and settings.cutout >= (side := min(input_shape(data.whole.train)[1:])):
            raise ValueError(
                f"--cutout {settings.cutout} of pictures of {side} pixels: take 0, for none, to {side - 1}"
            )
        model, origin, stages = build_space(settings, data.search, start)
        if note := check_epochs(settings, model):
            invocation.announce(note)
        model.to(device)
    with run.stage("trace"):
        axes = trace_examples(model, data.search, data)
    schedule = make_schedule(settings, data.objective, settings.epochs)
    return SearchInputs(model, origin, axes, data, schedule, start, stages)


def search_named(settings: Settings, invocation: Invocation) -> RunFolder:
    """Search the space that settings name, as ``regrow search`` does, and return the finished folder."""
    check_same_settings(invocation.ranks, settings)
    run = invocation.start_run(settings, settings.space, undo=settings.undo)
    search_network(settings, partial(open_named, settings, invocation), run)
    return RunFolder(Path(invocation.out))
