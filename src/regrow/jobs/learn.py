"""Learn tasks one after the other, whether named on the command line or given in Python, on every rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.axes import AxisGraph, Example
from regrow.core.objectives import CLASSIFICATION, NEXT_TOKEN
from regrow.core.sources import move_inputs
from regrow.core.tasks import Task, first_examples, input_shape
from regrow.data import MissingError, SourceError
from regrow.distributed.parallel import Parallel, broadcast_record
from regrow.evaluation.continual import Matrix
from regrow.jobs.inputs import check_same_settings, check_same_tasks
from regrow.jobs.recording import ActiveRun, FolderRecorder, Invocation, Record, RunStart, read_history
from regrow.jobs.starting import (
    TaskSpecs,
    check_outputs,
    load_start,
    make_task_schedule,
    read_tasks,
    record_tasks,
    select_known,
)
from regrow.methods import MethodKind, find_method, refuse_recorded_code
from regrow.nets.devices import choose_device
from regrow.nets.files import check_regular_files
from regrow.nets.loaded import Loaded, image_example
from regrow.nets.vision import small
from regrow.settings.declaration import check_settings
from regrow.settings.learn import Settings
from regrow.store.errors import StoreError
from regrow.store.replacing import clear_leftovers
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import check_repeatable, convert_settings
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model
from regrow.training.continual import TaskSchedule, accuracy_matrix, measure_untrained_accuracies
from regrow.training.continual import learn as train_tasks
from regrow.training.fit import FitOptions, Fitted
from regrow.training.learner import Context, Learner, write_replacements
from regrow.training.schedule import NO_AXES
from regrow.training.state import CHECKPOINT, TrainState, check_checkpoint, resume_training, write_checkpoint


@dataclass(frozen=True)
class LearnInputs:
    """What a run learns, and with which network."""

    loaded: Loaded
    axes: AxisGraph
    tasks: Sequence[Task]
    learner: Learner[Any]
    schedule: TaskSchedule
    checkpoint: Path = Path(CHECKPOINT)  # the file with the state of the training, relative to the run folder
    # Returns the network before the run once more; `None`: no tasks are added to the run
    untrained: Callable[[], Loaded] | None = None
    new: bool = False
    sequence: Sequence[object] | None = None
    call: Mapping[str, object] | None = None


@dataclass(frozen=True)
class BegunRun:
    """A run to which tasks are added."""

    path: Path
    sequences: tuple[str, ...]
    over: int
    without_old: bool
    recorded: object


def carry_out(settings: Settings, inputs: Callable[[ActiveRun], LearnInputs], run: ActiveRun) -> Fitted[Any]:
    """Learn tasks one after the other, and record it; return the network and what was measured.

    All mistakes in the settings and inputs are found before anything is recorded. An interrupted run is resumed. All
    processes of the run call this, and train together.
    """
    check_settings(settings)
    taken = find_method(MethodKind.CONTINUAL, settings.method).defaults({*settings.method_settings, "seed"})
    identity = {"verb": "learn", "settings": asdict(settings), "defaults": taken}
    run.recorder.check(identity)
    opened = inputs(run)
    loaded, tasks = opened.loaded, opened.tasks
    check_same_tasks(run.ranks, loaded.model, tasks)
    with run.begin(RunStart(identity, None if opened.new else loaded, call=opened.call)) as record:
        record.update(sequence=opened.sequence)
        with run.stage("learn"):
            fitted = _learn(opened, run)
        fitted.model.eval()
        if record.kept:
            with run.stage("save"):
                store.write_model(replace(loaded, model=fitted.model), record.path)
        if missing := [task.name for task in tasks if task.gone]:
            record.log("gone", tasks=missing)
        record.log("matrix", tasks=[task.name for task in tasks], **record_matrix(accuracy_matrix(fitted.state)))
        run.finish()
        return fitted


def _learn(inputs: LearnInputs, run: ActiveRun) -> Fitted[Any]:
    """Train the network on all tasks, or resume."""
    learner, tasks, schedule, record, ranks = inputs.learner, inputs.tasks, inputs.schedule, run.record, run.ranks
    file = record.path / inputs.checkpoint
    if record.kept:
        file.parent.mkdir(exist_ok=True)
    history = read_history(record) if file.is_file() else None
    model, axes, state = resume_training(ranks, history, file, inputs.loaded.model, inputs.axes, learner.state)
    rows = LearningRecord(record, tasks)
    rows.resume(state)
    if inputs.untrained and 0 < len(state.before) < len(tasks):  # tasks have been added since
        before = measure_untrained_accuracies(inputs.untrained().model, tasks, schedule, ranks)
        state = replace(state, before=state.before + before[len(state.before) :])

    def keep(now: TrainState[Any], context: Context) -> None:
        rows.write(now)
        if record.kept:
            write_checkpoint(file, context.model, now, outside=True)

    options = FitOptions(checkpoint=keep, progress=run.progress, parallel=Parallel(ranks, by_rows=True))
    fitted = train_tasks(model, axes, tasks, learner, schedule, state=state, options=options)
    write_replacements(learner, fitted.state.learner, Context(fitted.model, fitted.axes, tasks[-1], len(tasks) - 1))
    return fitted


@dataclass
class LearningRecord:
    """Writes what a training has reached into its run, if that is in a folder: each plan, event and task once."""

    run: Record
    tasks: Sequence[Task]
    plans: int = 0
    events: int = 0
    over: int = 0

    def resume(self, start: TrainState[Any]) -> None:
        """Take back plans that the training does not have yet, and write what is missing."""
        if isinstance(self.run, RunFolder):
            self.run.own_ledger.truncate(len(start.plans))
            self.plans = len(self.run.own_ledger)
            self.write(start)

    def write(self, now: TrainState[Any]) -> None:
        """Write what is new since the last call."""
        if not isinstance(self.run, RunFolder):
            return
        for plan in now.plans[self.plans :]:
            self.run.own_ledger.append(plan)
        for i in range(self.events, len(now.events)):
            self.run.log("growth", number=i, **now.events[i])
        for i in range(self.over, now.number):
            scores = list(now.rows[i])
            # Scores that are no shares, of values or of a loss of one's own, are beside the accuracy.
            shares = _are_shares(scores)
            row = {"name": self.tasks[i].name, "accuracy": scores if shares else [None] * len(scores), **now.sizes[i]}
            self.run.log("task", row | ({} if shares else {"scores": scores}))
        self.plans, self.events, self.over = len(now.plans), len(now.events), now.number


def record_matrix(matrix: Matrix) -> dict[str, Any]:
    """Return the scores of all tasks as JSON data; if they are no shares, they are in ``scores``, and accuracy is none.

    >>> record_matrix(Matrix(((-0.5,),), (-2.0,)))["matrix"]
    [[None]]
    """
    record: dict[str, Any] = dict(matrix.record())
    if all(map(_are_shares, (*matrix.rows, matrix.before))):
        return record
    nothing: dict[str, Any] = dict.fromkeys(record)
    nothing |= {"matrix": [[None] * len(row) for row in matrix.rows], "before": [None] * len(matrix.before)}
    return nothing | {"scores": record}


def _are_shares(scores: Sequence[float]) -> bool:
    return all(0 <= score <= 1 or score != score for score in scores)


def build_learner(method: str, settings: Mapping[str, object], seed: int) -> Learner[Any]:
    """Return a learner; a method with a seed gets the run's, unless ``settings`` has another."""
    entry = find_method(MethodKind.CONTINUAL, method)
    learner: Learner[Any] = entry.create(method, select_known(entry, {"seed": seed}) | dict(settings))
    return learner


def open_named(settings: Settings, invocation: Invocation, begun: BegunRun | None, run: ActiveRun) -> LearnInputs:
    """Open the network and the tasks that settings name; the last are added to the run that has ``begun``."""
    check_same_settings(run.ranks, settings)
    device = choose_device(settings.device, run.ranks)
    learner = build_learner(settings.method, settings.method_settings, settings.seed)
    with run.stage("load"):
        known, folder = (begun.sequences, begun.path) if begun else (settings.tasks, None)
        start = load_start(settings.model, known, settings.input, invocation, folder)
        tasks, outputs = _read_named(settings, start, learner, begun)

        def build() -> Loaded:
            if start:
                return replace(start, model=clone_model(start.model).to(device))
            model, origin = small(settings.model, input_shape(tasks[0].train), outputs, settings.seed)
            return Loaded(model.to(device), None, image_example(model, *origin.input_shape), origin)

        loaded, new = build(), start is None
    with run.stage("trace"):
        axes = NO_AXES
        if new or learner.uses_axes:
            example = start.example if start else Example((first_examples(tasks[0].train, 2).inputs,))
            axes = trace(loaded.model, *move_inputs(example.args, device), **move_inputs(dict(example.kwargs), device))
    schedule = make_task_schedule(settings, CLASSIFICATION if loaded.tokenizer is None else NEXT_TOKEN)
    names = record_tasks(settings.tasks, tasks)
    return LearnInputs(loaded, axes, tasks, learner, schedule, untrained=build, new=new, sequence=names)


def specs_of(settings: Settings, start: Loaded | None = None) -> TaskSpecs:
    """Return the tasks of a run on a network with weights (``start``) or a new one, and how much data is used."""
    specs = TaskSpecs(settings.tasks, settings.train, settings.test, settings.scenario, settings.seed)
    return specs.fit(start, settings.seq_len)


def _read_named(
    settings: Settings, start: Loaded | None, learner: Learner[Any], begun: BegunRun | None
) -> tuple[list[Task], int]:
    """Return all tasks, and the number of the network's outputs; raise ValueError if it has fewer."""
    specs = specs_of(settings, start)
    old = _read_old(begun, specs, settings.method, learner) if begun else read_tasks(specs)
    tasks = old
    if begun:
        tasks = read_tasks(replace(specs, sequences=settings.tasks[len(begun.sequences) :]), before=old)
    had, outputs = (
        max(settings.classes, 1 + max((c for task in some for c in task.classes), default=0)) for some in (old, tasks)
    )
    if start and start.tokenizer is None:
        check_outputs(start, tasks[0], outputs)
    elif outputs > had:
        raise ValueError(
            f"{', '.join(task.name for task in tasks[len(old) :])} has classes up to {outputs - 1}, and the network of "
            f"the run has outputs for {had}: begin a run with --classes {outputs}"
        )
    return tasks, outputs


def _read_old(begun: BegunRun, specs: TaskSpecs, method: str, learner: Learner[Any]) -> list[Task]:
    """Return the tasks that a run has had, without data where these may be missing."""
    try:
        old = read_tasks(replace(specs, sequences=begun.sequences), begun.recorded if begun.without_old else None)
    except MissingError as error:
        if begun.without_old:
            raise SourceError(f"{error}; this run did not note what its tasks were like") from None
        raise MissingError(f"{error}; with --without-old, tasks that are over need no data any more") from None
    if late := [task.name for task in old[begun.over :] if task.gone]:
        raise SourceError(f"{', '.join(late)} is not over, and its data are not there: it cannot be learned")
    if learner.trains_on_past and (gone := [task.name for task in old if task.gone]):
        raise SourceError(f"{method} learns from all examples, and those of {', '.join(gone)} are not there")
    return old


def run(settings: Settings, invocation: Invocation) -> RunFolder:
    """Learn the tasks that settings name, as ``regrow learn`` does, and return the folder."""

    def open_inputs(run: ActiveRun) -> LearnInputs:
        if run.ranks.leads and (begun := RunFolder.open_unfinished(invocation.out)):
            check_checkpoint(begun.path / CHECKPOINT, read_history(begun))
        return open_named(settings, invocation, None, run)

    carry_out(settings, open_inputs, invocation.start(settings, settings.model, undo=settings.undo))
    return RunFolder(Path(invocation.out))


def extend(invocation: Invocation, more: Sequence[str], *, without_old: bool = False) -> RunFolder:
    """Train the network of a run on further tasks, possibly much later and in another process; all ranks call this.

    A finished run does not change until they are learned. An interrupted call is resumed when it is repeated; a
    completed one changes nothing. Data of finished tasks may be missing ``without_old``; the network is then not
    evaluated on these.
    """
    out, ranks = Path(invocation.out), invocation.ranks
    known = broadcast_record(ranks, _read_begun(out, tuple(more)) if ranks.leads else None)
    if known is None:
        invocation.announce(f"{out} has learned {', '.join(more) or 'all its tasks'}: nothing is left to do")
        return RunFolder(out)
    (record, over, added), folder = known, RunFolder.open_unfinished(out) or RunFolder(out)
    was = convert_settings(record["settings"], Settings)
    settings = replace(was, tasks=(*was.tasks, *added))
    # Defaults of this version may differ from those with which the run was begun.
    whole = replace(settings, method_settings={**record["defaults"], **was.method_settings})
    begun = BegunRun(folder.path, was.tasks, over, without_old, record.get("sequence"))
    run = invocation.start(settings, was.model, undo=False)
    if isinstance(made := run.recorder, FolderRecorder):
        run.recorder = ExtensionRecorder(
            made.out, made.model, made.command, False, made.write_page, record, tuple(more)
        )
    carry_out(settings, partial(open_named, whole, invocation, begun), run)
    return RunFolder(out)


@dataclass(frozen=True)
class ExtensionRecorder(FolderRecorder):
    """Records tasks that are added to a run in its folder, which does not change until they are learned."""

    known: Mapping[str, Any] = field(default_factory=dict)  # the content of `run.json` before
    added: tuple[str, ...] = ()  # the sequences of tasks that this call was given

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the folder was checked when it was read."""
        return {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Open the run for writing inside the ``with`` block, unless another process has changed it since."""
        with RunFolder.reopen(self.out) as folder:
            if folder.run() != self.known:
                raise StoreError(f"{self.out} was changed by another process meanwhile; run this again")
            defaults = {**start.identity["defaults"], **self.known.get("defaults", {})}
            folder.update(
                settings=start.identity["settings"],
                defaults=defaults,
                command=self.command,
                finished=None,
                extension=list(self.added) or None,
            )
            yield folder


def _read_begun(out: Path, sequences: tuple[str, ...]) -> tuple[dict[str, Any], int, tuple[str, ...]] | None:
    """Return ``run.json``, the number of tasks that are over, and the sequences to add; ``None`` if all is learned.

    Sequences that the last call has added are those of this call, which is repeated.
    """
    if out.is_dir():
        check_regular_files(out)
    clear_leftovers(out)
    folder = RunFolder.open_unfinished(out) or RunFolder.open(out)
    record = folder.run()
    if record["verb"] != "learn":
        raise StoreError(f"{out} holds a run of {record['verb']!r}; give the folder of `regrow learn`")
    check_repeatable(out, record)
    refuse_recorded_code(convert_settings(record["settings"], Settings).method, record["command"])
    done = check_checkpoint(folder.path / CHECKPOINT, read_history(folder))
    added = () if record.get("extension") == list(sequences) else sequences
    return (record, done, added) if added or not record.get("finished") or folder.path != out else None
