"""``regrow learn``: train a network on a sequence of tasks, in a run folder to which further tasks can be added."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow import store
from regrow.axes import AxisGraph
from regrow.commands.example_inputs import record_input
from regrow.commands.history import read_history
from regrow.commands.learning_record import LearningRecord
from regrow.commands.parents import describe_stage, start_from
from regrow.commands.starting import check_outputs, image_shape, load_start
from regrow.commands.task_sequences import TaskSpecs, fit_tasks, read_sequence, read_tasks, record_tasks
from regrow.commands.trackers import tracking
from regrow.data import MissingError, SourceError
from regrow.methods import MethodKind, find_method, refuse_recorded_code
from regrow.nets.devices import choose_device
from regrow.nets.files import check_files
from regrow.nets.loaded import Loaded, Origin
from regrow.nets.small import origin_of_small, small
from regrow.objectives import NEXT_TOKEN
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.learn import Settings
from regrow.settings.words import command_line
from regrow.sources import moved
from regrow.store.errors import StoreError
from regrow.store.replacing import clear_leftovers
from regrow.store.run_record import check_repeatable, convert_settings
from regrow.tasks import Task, first_examples, input_shape
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model
from regrow.training.checkpoint import CHECKPOINT, check_checkpoint, count_tasks, read_checkpoint, write_checkpoint
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn, untrained_accuracies
from regrow.training.learner import Context, Learner, write_replacements
from regrow.training.schedule import NO_AXES
from regrow.training.state import TrainState


@dataclass(frozen=True)
class LearnInputs:
    """Everything that a sequence of tasks is learned with.

    Args:
        tasks: The sequences of tasks.
        model: The name of the network.
        classes: The least number of outputs.
        learner: The method.
        schedule: How each task is trained, with the seed.
        device: The device that it is trained on.
        start: The network with its weights; ``None``: a new one is built.
    """

    tasks: TaskSpecs
    model: str
    classes: int
    learner: Learner[Any]
    schedule: TaskSchedule
    device: torch.device
    start: Loaded | None = None


def read_inputs(settings: Settings, start: Loaded | None = None) -> LearnInputs:
    """Return the typed inputs that the settings of a run describe.

    Args:
        settings: The settings.
        start: The network with its weights; ``None``: a new one is built.

    Raises:
        ValueError: If there is no such method, or a setting of it is wrong.
        ResourceError: If this machine does not have the device.
    """
    shared: dict[str, Any] = {
        one.name: getattr(settings, one.name) for one in fields(TaskSchedule) if hasattr(settings, one.name)
    }
    specs = TaskSpecs(settings.tasks, settings.train, settings.test, settings.scenario, settings.seed)
    learner = build_learner(settings.method, settings.method_settings, settings.seed)
    if start and start.tokenizer is not None:
        specs = replace(specs, tokenizer=start.tokenizer, seq_len=settings.seq_len)
        shared["objective"] = NEXT_TOKEN
    elif start:
        specs = replace(specs, shape=image_shape(start), normalised=start.origin.normalised_images)
    schedule, device = TaskSchedule(**shared), choose_device(settings.device)
    return LearnInputs(specs, settings.model, settings.classes, learner, schedule, device, start)


def build_learner(method: str, settings: Mapping[str, object], seed: int) -> Learner[Any]:
    """Return a learner; a method with a seed gets the run's, unless it was given its own.

    Args:
        method: The method's name.
        settings: Its settings that differ from the defaults.
        seed: The seed of the run.

    Raises:
        ValueError: If there is no such method, or a setting of it is wrong.
    """
    entry = find_method(MethodKind.CONTINUAL, method)
    has_seed = any(one.name == "seed" for one in fields(entry.settings))
    learner: Learner[Any] = entry.made(method, {**({"seed": seed} if has_seed else {}), **settings})
    return learner


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    track: str = "",
    write_page: WritePage | None = None,
) -> RunFolder:
    """Learn a sequence of tasks and write a run folder; an interrupted run is resumed.

    Args:
        settings: The settings of the run.
        out: The run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code: the
            recorded name is never imported.
        track: The name of a tracker that gets every measurement, too; empty: none.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If a setting or a sequence is not usable; says which, and the remedy.
    """
    check_settings(settings)
    choose_device(settings.device)
    build_learner(settings.method, settings.method_settings, settings.seed)
    identity: dict[str, Any] = {
        "verb": "learn",
        "settings": record_settings(settings),
        "defaults": _defaults(settings.method, settings.method_settings),
    }
    if RunFolder.check(out, **identity) and (begun := RunFolder.open_unfinished(out)):
        check_checkpoint(begun.path / CHECKPOINT, read_history(begun))
    start = load_start(settings.model, settings.tasks, settings.input, code=code, progress=progress)
    inputs = read_inputs(settings, start)
    tasks = read_tasks(inputs.tasks)
    if start is None:
        origin_of_small(inputs.model, input_shape(tasks[0].train), _count_outputs(inputs, tasks))
    elif start.tokenizer is None:
        check_outputs(start, tasks[0], _count_outputs(inputs, tasks))
    words = (*(("--code", code) if code else ()), "--out", str(out))
    with tracking(RunFolder.create(out, **identity, command=command_line(settings, *words)), track) as folder:
        if start:
            start_from(folder, settings.model, start, undo=settings.undo)
            folder.update(notes=list(start.notes) or None, **record_input(start))
        return _learn(folder, inputs, tasks, progress, write_page)


def extend(
    out: str | Path,
    more: Sequence[str],
    progress: Progress = silent,
    *,
    without_old: bool = False,
    total: int | None = None,
    code: str = "",
    track: str = "",
    write_page: WritePage | None = None,
) -> RunFolder:
    """Train the network of a run on further tasks, possibly much later and in another process.

    A finished run does not change until they are learned. An interrupted call is resumed when it is repeated; a
    completed call is refused when it is repeated, unless ``total`` says that the same sequences come once more.

    Args:
        out: The folder of a run, finished or interrupted.
        more: Further sequences, as ``Settings.tasks``; empty to finish an interrupted call.
        progress: Called with (steps done, steps in all, what is being done).
        total: The number of sequences that the run has in the end; ``None``: its own and ``more``.
        code: As for :func:`run`; also for a network that was named as ``pkg.mod:fn``.
        without_old: Whether data of finished tasks may be missing; the network is then not evaluated on these.
        track: The name of a tracker that gets every measurement, too; empty: none.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If the folder is no learning run, a sequence is not usable, or this very call was completed.
    """
    if Path(out).is_dir():
        check_files(Path(out))
    clear_leftovers(Path(out))
    folder = RunFolder.open_unfinished(out) or RunFolder.open(out)
    run_record = folder.run()
    if run_record.get("verb") != "learn":
        raise StoreError(f"{out} holds a run of {run_record.get('verb')!r}; give the folder of `regrow learn`")
    check_repeatable(Path(out), run_record)
    was = convert_settings(run_record["settings"], Settings)
    refuse_recorded_code(was.method, str(run_record.get("command")))
    check_checkpoint(folder.path / CHECKPOINT, read_history(folder))
    added = _added(run_record.get("extension"), was.tasks, tuple(more), total)
    if run_record.get("finished") and folder.path == Path(out) and not added:
        if more:
            raise StoreError(
                f"{out} has learned {', '.join(more)} by this very command; to learn the same once more, add "
                f"--total {len(was.tasks) + len(more)}"
            )
        return folder
    settings = replace(was, tasks=(*was.tasks, *added))
    # Defaults of this version may differ from those with which the run was begun.
    recorded = run_record.get("defaults", {})
    start = load_start(was.model, was.tasks, was.input, run=folder.path, code=code, progress=progress)
    inputs = read_inputs(replace(settings, method_settings={**recorded, **was.method_settings}), start)
    try:
        old = read_tasks(
            replace(inputs.tasks, sequences=was.tasks), run_record.get("sequence") if without_old else None
        )
    except MissingError as error:
        if without_old:
            raise SourceError(f"{error}; this run did not note what its tasks were like") from None
        raise MissingError(f"{error}; with --without-old, tasks that are over need no data any more") from None
    if late := [task.name for task in old[count_tasks(folder.path / CHECKPOINT) :] if task.gone]:
        raise SourceError(f"{', '.join(late)} is not over, and its data are not there: it cannot be learned")
    if inputs.learner.trains_on_past and (gone := [task.name for task in old if task.gone]):
        raise SourceError(f"{was.method} learns from all examples, and those of {', '.join(gone)} are not there")
    tasks = fit_tasks([*old, *(task for spec in added for task in read_sequence(spec, inputs.tasks))], inputs.tasks)
    _check_outputs(inputs, old, tasks, str(out))
    with tracking(RunFolder.reopen(out), track) as reopened:
        if reopened.run() != run_record:
            raise StoreError(f"{out} was changed by another process meanwhile; run this again")
        reopened.update(
            settings=record_settings(settings),
            defaults=_defaults(settings.method, settings.method_settings) | recorded,
            command=command_line(settings, *(("--code", code) if code else ()), "--out", str(out)),
            finished=None,
            extension=list(more) or None,
        )
        return _learn(reopened, inputs, tasks, progress, write_page)


def _check_outputs(inputs: LearnInputs, old: Sequence[Task], tasks: Sequence[Task], run: str) -> None:
    """Raise ValueError unless the network of a run has an output for each class of its old and new tasks."""
    outputs, wanted = _count_outputs(inputs, old), _count_outputs(inputs, tasks)
    if inputs.start and inputs.start.tokenizer is None:
        check_outputs(inputs.start, tasks[0], wanted)
    elif wanted > outputs:
        names = ", ".join(task.name for task in tasks[len(old) :])
        raise ValueError(
            f"{names} has classes up to {wanted - 1}, and the network of {run} has outputs for {outputs}: "
            f"begin a run with --classes {wanted}"
        )


def _added(last: object, tasks: tuple[str, ...], more: tuple[str, ...], total: int | None) -> tuple[str, ...]:
    """Return the sequences that a call adds to those of a run: none if this very call has added them already.

    Args:
        last: The sequences that the last call added, from ``run.json``.
        tasks: All sequences of the run.
        more: The sequences of this call.
        total: The number of sequences in the end; ``None``: not given.
    """
    if total is None:
        return () if last == list(more) else more
    if total == len(tasks) and tasks[len(tasks) - len(more) :] == more:
        return ()
    if total != len(tasks) + len(more):
        raise ValueError(
            f"total must be how many sequences of tasks the run has in the end, got {total}; it has {len(tasks)} and "
            f"{len(more)} are to come: --total {len(tasks) + len(more)}"
        )
    return more


def _learn(
    folder: RunFolder, inputs: LearnInputs, tasks: Sequence[Task], progress: Progress, write_page: WritePage | None
) -> RunFolder:
    start, learner = time.perf_counter(), inputs.learner
    model, origin = _build_network(inputs, tasks)
    axes = _trace(inputs, model, tasks)
    folder.update(sequence=record_tasks(inputs.tasks.sequences, tasks))
    state, place = TrainState(learner.state), folder.path / CHECKPOINT
    if folder.resumed and place.is_file():
        model, axes, state = read_checkpoint(place, model, axes, learner.state, read_history(folder))
    folder.own_ledger.truncate(len(state.plans))
    record = LearningRecord(folder, tasks, len(folder.own_ledger))

    def keep(now: TrainState[Any], context: Context) -> None:
        record.write(now)
        write_checkpoint(place, context.model, now, logged=record.events)

    record.write(state)  # version 0.1 stores before it logs
    if len(state.before) < len(tasks):
        # Tasks have been added since: what an untrained network knows of them is measured again.
        row = untrained_accuracies(_build_network(inputs, tasks)[0], tasks, inputs.schedule)
        state = replace(state, before=state.before + row[len(state.before) :])
    fitted = learn(model, axes, tasks, learner, inputs.schedule, state=state, checkpoint=keep, progress=progress)
    plain = clone_model(fitted.model)
    write_replacements(learner, fitted.state.learner, Context(plain, fitted.axes, tasks[-1], len(tasks) - 1))
    if inputs.start:
        store.write_model(replace(inputs.start, model=plain.eval()), folder.path)
    else:
        store.write_model(plain, folder.path, origin=origin)
    if missing := [task.name for task in tasks if task.gone]:
        folder.log("gone", tasks=missing)
    folder.log("matrix", tasks=[task.name for task in tasks], **accuracy_matrix(fitted.state).record())
    seconds = {"learn": round(time.perf_counter() - start, 3)}
    return folder.finish(write_page, seconds=seconds, stage=describe_stage(folder))


def _build_network(inputs: LearnInputs, tasks: Sequence[Task]) -> tuple[nn.Module, Origin]:
    """Return the network before the run, new or with its weights, and the record of how it was built."""
    if inputs.start:
        return clone_model(inputs.start.model).to(inputs.device), inputs.start.origin
    model, origin = small(inputs.model, input_shape(tasks[0].train), _count_outputs(inputs, tasks), inputs.tasks.seed)
    return model.to(inputs.device), origin


def _trace(inputs: LearnInputs, model: nn.Module, tasks: Sequence[Task]) -> AxisGraph:
    """Return the axes of the network; none for a loaded network whose method needs none."""
    if inputs.start is None:
        return trace(model, moved(first_examples(tasks[0].train, 2).inputs, inputs.device))
    args, kwargs = moved((inputs.start.example.args, dict(inputs.start.example.kwargs)), inputs.device)
    return trace(model, *args, **kwargs) if inputs.learner.uses_axes else NO_AXES


def _count_outputs(inputs: LearnInputs, tasks: Sequence[Task]) -> int:
    """Return the number of outputs of the network: the classes of all tasks, or as many as are asked for."""
    return max(inputs.classes, 1 + max((c for task in tasks for c in task.classes), default=0))


def _defaults(method: str, settings: Mapping[str, object]) -> dict[str, Any]:
    return find_method(MethodKind.CONTINUAL, method).defaults({*settings, "seed"})
