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
    describe_tasks,
    is_new_network,
    load_start_network,
    make_task_schedule,
    read_tasks,
    select_method_settings,
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
    axes: AxisGraph  # without axes if the learner does not use them
    tasks: Sequence[Task]  # all of the run, in order, earlier ones included
    learner: Learner[Any]
    schedule: TaskSchedule
    checkpoint: Path = Path(CHECKPOINT)  # the file with the state of the training, relative to the run folder
    # Returns the network before the run once more; `None`: no tasks are added to the run
    untrained: Callable[[], Loaded] | None = None
    new: bool = False  # whether the network has random weights, so that there is nothing to return to
    sequence: Sequence[object] | None = None  # what `run.json` records of the tasks, by `describe_tasks`
    # What the result depends on besides settings, in a call from Python
    python_call: Mapping[str, object] | None = None


@dataclass(frozen=True)
class RunToExtend:
    """A run to which tasks are added."""

    path: Path  # the folder with its files
    sequences: tuple[str, ...]  # the sequences of tasks that it has
    finished_tasks: int  # how many of its tasks are trained
    without_old: bool  # whether data of finished tasks may be missing
    recorded: object  # what `run.json` records of its tasks


def learn_tasks(settings: Settings, open_inputs: Callable[[ActiveRun], LearnInputs], run: ActiveRun) -> Fitted[Any]:
    """Learn tasks one after the other, and record the run; return the trained network and the state of its training.

    Mistakes in the settings and inputs raise before anything is written. An interrupted run is resumed. All processes
    of the run call this, and train together.
    """
    check_settings(settings)
    defaults = find_method(MethodKind.CONTINUAL, settings.method).defaults({*settings.method_settings, "seed"})
    identity = {"verb": "learn", "settings": asdict(settings), "defaults": defaults}
    run.recorder.check(identity)
    opened = open_inputs(run)
    loaded, tasks = opened.loaded, opened.tasks
    check_same_tasks(run.ranks, loaded.model, tasks)
    with run.begin(RunStart(identity, None if opened.new else loaded, python_call=opened.python_call)) as record:
        record.update(sequence=opened.sequence)
        with run.stage("learn"):
            fitted = _learn(opened, run)
        fitted.model.eval()
        if record.is_kept:
            with run.stage("save"):
                store.write_model(replace(loaded, model=fitted.model), record.path)
        if missing := [task.name for task in tasks if task.gone]:
            record.log("gone", tasks=missing)
        record.log("matrix", tasks=[task.name for task in tasks], **describe_matrix(accuracy_matrix(fitted.state)))
        run.finish()
        return fitted


def _learn(inputs: LearnInputs, run: ActiveRun) -> Fitted[Any]:
    """Train the network on all tasks in place, from the checkpoint if there is one; return it and the last state."""
    learner, tasks, schedule, record, ranks = inputs.learner, inputs.tasks, inputs.schedule, run.record, run.ranks
    file = record.path / inputs.checkpoint
    if record.is_kept:
        file.parent.mkdir(exist_ok=True)
    history = read_history(record) if file.is_file() else None
    model, axes, state = resume_training(ranks, history, file, inputs.loaded.model, inputs.axes, learner.state)
    log = LearningRecord(record, tasks)
    log.resume(state)
    if inputs.untrained and 0 < len(state.before) < len(tasks):  # tasks have been added since
        before = measure_untrained_accuracies(inputs.untrained().model, tasks, schedule, ranks)
        state = replace(state, before=state.before + before[len(state.before) :])

    def save(state: TrainState[Any], context: Context) -> None:
        log.write(state)
        if record.is_kept:
            write_checkpoint(file, context.model, state, outside=True)

    options = FitOptions(checkpoint=save, progress=run.progress, parallel=Parallel(ranks, by_rows=True))
    fitted = train_tasks(model, axes, tasks, learner, schedule, state=state, options=options)
    write_replacements(learner, fitted.state.learner, Context(fitted.model, fitted.axes, tasks[-1], len(tasks) - 1))
    return fitted


@dataclass
class LearningRecord:
    """Writes what a training has reached to the folder of its run, if it has one: each plan, event and task once."""

    record: Record
    tasks: Sequence[Task]  # all of the run
    written_plans: int = 0  # how many are written so far, as below
    written_events: int = 0
    written_tasks: int = 0

    def resume(self, start: TrainState[Any]) -> None:
        """Delete plans from the ledger that the checkpoint's state lacks, and write what the folder lacks of it."""
        if isinstance(self.record, RunFolder):
            self.record.own_ledger.truncate(len(start.plans))
            self.written_plans = len(self.record.own_ledger)
            self.write(start)

    def write(self, state: TrainState[Any]) -> None:
        """Write what ``state``, of the whole training so far, has beyond that of the last call."""
        if not isinstance(self.record, RunFolder):
            return
        for plan in state.plans[self.written_plans :]:
            self.record.own_ledger.append(plan)
        for i in range(self.written_events, len(state.events)):
            self.record.log("growth", number=i, **state.events[i])
        for i in range(self.written_tasks, state.number):
            row: dict[str, object] = {"name": self.tasks[i].name, "accuracy": list(state.rows[i]), **state.sizes[i]}
            if not _are_shares(state.rows[i]):  # of values, or of the user's own loss
                row |= {"accuracy": [None] * len(state.rows[i]), "scores": list(state.rows[i])}
            self.record.log("task", row)
        self.written_plans, self.written_events, self.written_tasks = len(state.plans), len(state.events), state.number


def describe_matrix(matrix: Matrix) -> dict[str, Any]:
    """Return ``matrix.record()``; if a score is not in [0, 1], under ``scores``, with ``None`` in its usual places.

    >>> describe_matrix(Matrix(((-0.5,),), (-2.0,)))["matrix"]
    [[None]]
    """
    record: dict[str, Any] = dict(matrix.record())
    if all(map(_are_shares, (*matrix.rows, matrix.before))):
        return record
    nothing: dict[str, Any] = dict.fromkeys(record)
    nothing |= {"matrix": [[None] * len(row) for row in matrix.rows], "before": [None] * len(matrix.before)}
    return nothing | {"scores": record}


def _are_shares(scores: Sequence[float]) -> bool:
    """Whether all scores are from 0 to 1, or not measured (NaN)."""
    return all(0 <= score <= 1 or score != score for score in scores)


def build_learner(method: str, settings: Mapping[str, object], seed: int) -> Learner[Any]:
    """Return a learner by its method's name and settings; ``seed``: its setting of that name, if they give none."""
    entry = find_method(MethodKind.CONTINUAL, method)
    learner: Learner[Any] = entry.create(method, select_method_settings(entry, {"seed": seed}) | dict(settings))
    return learner


def open_named(settings: Settings, invocation: Invocation, begun: RunToExtend | None, run: ActiveRun) -> LearnInputs:
    """Open the network and tasks that settings name; ``begun``: the run with the first of them, if one is extended."""
    check_same_settings(run.ranks, settings)
    device = choose_device(settings.device, run.ranks)
    learner = build_learner(settings.method, settings.method_settings, settings.seed)
    with run.stage("load"):
        sequences = begun.sequences if begun else settings.tasks
        folder = begun.path if begun else None
        start = load_start_network(settings.model, sequences, settings.input, invocation, folder)
        tasks, outputs = _read_tasks_of_run(settings, start, learner, begun)

        def build() -> Loaded:
            """Return the untrained network: a copy of the one with weights, or a new one of the seed."""
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
    names = describe_tasks(settings.tasks, tasks)
    return LearnInputs(loaded, axes, tasks, learner, schedule, untrained=build, new=new, sequence=names)


def make_task_specs(settings: Settings, start: Loaded | None = None) -> TaskSpecs:
    """Return the tasks of a run and how much data is used, as the network ``start`` takes them (``None``: new)."""
    specs = TaskSpecs(settings.tasks, settings.train, settings.test, settings.scenario, settings.seed)
    return specs.adapt_to(start, settings.seq_len)


def _read_tasks_of_run(
    settings: Settings, start: Loaded | None, learner: Learner[Any], begun: RunToExtend | None
) -> tuple[list[Task], int]:
    """Return all tasks, and how many outputs they need; ValueError if ``start``, or that of ``begun``, has fewer."""
    specs = make_task_specs(settings, start)
    old = _read_earlier_tasks(begun, specs, settings.method, learner) if begun else read_tasks(specs)
    tasks = old
    if begun:
        tasks = read_tasks(replace(specs, sequences=settings.tasks[len(begun.sequences) :]), before=old)

    def count_outputs(tasks: Sequence[Task]) -> int:
        return max(settings.classes, 1 + max((c for task in tasks for c in task.classes), default=0))

    outputs = count_outputs(tasks)
    if start and start.tokenizer is None:
        check_outputs(start, tasks[0], outputs)
    elif outputs > count_outputs(old):
        raise ValueError(
            f"{', '.join(task.name for task in tasks[len(old) :])} has classes up to {outputs - 1}, and the network of "
            f"the run has outputs for {count_outputs(old)}: begin a run with --classes {outputs}"
        )
    return tasks, outputs


def _read_earlier_tasks(begun: RunToExtend, specs: TaskSpecs, method: str, learner: Learner[Any]) -> list[Task]:
    """Return the tasks that a run has, if ``begun.without_old`` finished ones without data; else SourceError."""
    try:
        old = read_tasks(replace(specs, sequences=begun.sequences), begun.recorded if begun.without_old else None)
    except MissingError as error:
        if begun.without_old:
            raise SourceError(f"{error}; this run did not note what its tasks were like") from None
        raise MissingError(f"{error}; with --without-old, tasks that are over need no data any more") from None
    if unfinished := [task.name for task in old[begun.finished_tasks :] if task.gone]:
        raise SourceError(f"{', '.join(unfinished)} is not over, and its data are not there: it cannot be learned")
    if learner.trains_on_past and (gone := [task.name for task in old if task.gone]):
        raise SourceError(f"{method} learns from all examples, and those of {', '.join(gone)} are not there")
    return old


def learn_named(settings: Settings, invocation: Invocation) -> RunFolder:
    """Learn the tasks that settings name, as ``regrow learn`` does, and return the finished folder."""
    if not settings.lr:
        new = is_new_network(settings.model) and settings.optimizer == "sgd"
        learner = build_learner(settings.method, settings.method_settings, settings.seed)
        settings = replace(settings, lr=learner.lr if new else 0.01)

    def open_inputs(run: ActiveRun) -> LearnInputs:
        if run.ranks.leads and (begun := RunFolder.open_unfinished(invocation.out)):
            check_checkpoint(begun.path / CHECKPOINT, read_history(begun))
        return open_named(settings, invocation, None, run)

    learn_tasks(settings, open_inputs, invocation.start_run(settings, settings.model, undo=settings.undo))
    return RunFolder(Path(invocation.out))


def extend(invocation: Invocation, sequences: Sequence[str], *, without_old: bool = False) -> RunFolder:
    """Train the network of the run in ``invocation.out`` on further tasks, and return its folder; all ranks call this.

    ``sequences``: as ``--task`` takes them; none: the interrupted run is resumed. A finished run does not change until
    they are learned. An interrupted call is resumed when it is repeated; a completed one changes nothing. With
    ``without_old``, data of finished tasks may be missing; the network is then not evaluated on these.
    """
    out, ranks = Path(invocation.out), invocation.ranks
    extension = broadcast_record(ranks, _read_run_to_extend(out, tuple(sequences)) if ranks.leads else None)
    if extension is None:
        invocation.announce(f"{out} has learned {', '.join(sequences) or 'all its tasks'}: nothing is left to do")
        return RunFolder(out)
    record, finished_tasks, added = extension
    folder = RunFolder.open_unfinished(out) or RunFolder(out)
    old = convert_settings(record["settings"], Settings)
    settings = replace(old, tasks=(*old.tasks, *added))
    # The learner is built with the defaults with which the run was begun; run.json keeps the settings as given.
    complete = replace(settings, method_settings={**record["defaults"], **old.method_settings})
    begun = RunToExtend(folder.path, old.tasks, finished_tasks, without_old, record.get("sequence"))
    run = invocation.start_run(settings, old.model, undo=False)
    if isinstance(run.recorder, FolderRecorder):
        run.recorder = ExtensionRecorder(**vars(run.recorder), old_record=record, added=tuple(sequences))
    learn_tasks(settings, partial(open_named, complete, invocation, begun), run)
    return RunFolder(out)


@dataclass(frozen=True)
class ExtensionRecorder(FolderRecorder):
    """Records tasks that are added to a run in its folder, which does not change until they are learned."""

    old_record: Mapping[str, Any] = field(default_factory=dict)  # the content of `run.json` before
    added: tuple[str, ...] = ()  # the sequences of tasks that this call was given

    def check(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``{}``: the folder was checked when it was read."""
        return {}

    @contextmanager
    def begin(self, start: RunStart) -> Iterator[Record]:
        """Context manager: open the run for writing, and yield it; StoreError if another process has changed it."""
        with RunFolder.reopen(self.out) as folder:
            if folder.read_record() != self.old_record:
                raise StoreError(f"{self.out} was changed by another process meanwhile; run this again")
            defaults = {**start.identity["defaults"], **self.old_record.get("defaults", {})}
            folder.update(
                settings=start.identity["settings"],
                defaults=defaults,
                command=self.command,
                finished=None,
                extension=list(self.added) or None,
            )
            yield folder


def _read_run_to_extend(out: Path, sequences: tuple[str, ...]) -> tuple[dict[str, Any], int, tuple[str, ...]] | None:
    """Return ``run.json``, the number of finished tasks, and the sequences to add; ``None`` if all is learned.

    If the last call was given the same sequences, this one repeats it and adds none. Raises StoreError if the folder
    holds no run of learning.
    """
    if out.is_dir():
        check_regular_files(out)  # links that lead out of it are refused
    clear_leftovers(out)
    folder = RunFolder.open_unfinished(out) or RunFolder.open(out)
    record = folder.read_record()
    if record["verb"] != "learn":
        raise StoreError(f"{out} holds a run of {record['verb']!r}; give the folder of `regrow learn`")
    check_repeatable(out, record)
    refuse_recorded_code(convert_settings(record["settings"], Settings).method, record["command"])
    finished_tasks = check_checkpoint(folder.path / CHECKPOINT, read_history(folder))
    added = () if record.get("extension") == list(sequences) else sequences
    # A process that is killed while it finishes leaves a working area whose `run.json` says that it is finished.
    is_complete = record.get("finished") and folder.path == out
    return None if is_complete and not added else (record, finished_tasks, added)
