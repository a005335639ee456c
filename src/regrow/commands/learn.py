"""``regrow learn``: train a network on a sequence of tasks, in a run folder to which further tasks can be added."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow import store
from regrow.commands.example_inputs import record_input
from regrow.commands.history import read_history
from regrow.commands.learn_inputs import (
    LearnInputs,
    build_learner,
    build_network,
    count_outputs,
    read_inputs,
    trace_network,
    train_tasks,
)
from regrow.commands.learning_record import LearningRecord
from regrow.commands.parents import check_room, describe_stage, start_from
from regrow.commands.same_inputs import check_same_settings, check_same_tasks
from regrow.commands.share_learning import announce_end, announce_run
from regrow.commands.starting import check_outputs, load_start
from regrow.commands.task_sequences import fit_tasks, read_sequence, read_tasks, record_tasks
from regrow.commands.trackers import tracking
from regrow.commands.training_memory import plan_learning
from regrow.data import MissingError, SourceError
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import Parallel
from regrow.methods import MethodKind, find_method, refuse_recorded_code
from regrow.nets.devices import choose_device
from regrow.nets.files import check_files
from regrow.nets.small import origin_of_small
from regrow.process_memory import reset_peak
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.learn import Settings
from regrow.settings.words import command_line
from regrow.store.errors import StoreError
from regrow.store.replacing import clear_leftovers
from regrow.store.run_record import check_repeatable, convert_settings
from regrow.streaming.requirements import MemoryTerms, record_peak
from regrow.tasks import Task, input_shape
from regrow.tracing.meta_copy import clone_model
from regrow.training.checkpoint import CHECKPOINT, check_checkpoint, count_tasks, read_checkpoint, write_checkpoint
from regrow.training.continual import accuracy_matrix
from regrow.training.learner import Context, write_replacements
from regrow.training.resuming import broadcast_start
from regrow.training.state import TrainState


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    track: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    ranks: ProcessRank = SINGLE,
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
        memory: How much memory the run may use, such as ``4GiB``: what it needs is predicted once model and data are
            read, and the run is refused if that is more. Empty: it is not predicted.
        announce: Called with one line that says what the run needs of that memory.
        ranks: The processes that train together; this one is rank 0, and the others call ``share_learning.share``.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If a setting or a sequence is not usable; says which, and the remedy.
    """
    check_settings(settings)
    choose_device(settings.device, ranks)
    build_learner(settings.method, settings.method_settings, settings.seed)
    identity: dict[str, Any] = {
        "verb": "learn",
        "settings": record_settings(settings),
        "defaults": _defaults(settings.method, settings.method_settings),
    }
    check_same_settings(ranks, settings)
    reset_peak()
    if RunFolder.check(out, **identity) and (begun := RunFolder.open_unfinished(out)):
        check_checkpoint(begun.path / CHECKPOINT, read_history(begun))
    start = load_start(settings.model, settings.tasks, settings.input, code=code, progress=progress)
    inputs = read_inputs(settings, start, ranks)
    tasks = read_tasks(inputs.tasks)
    if start is None:
        origin_of_small(inputs.model, input_shape(tasks[0].train), count_outputs(inputs, tasks))
    elif start.tokenizer is None:
        check_outputs(start, tasks[0], count_outputs(inputs, tasks))
    needs = plan_learning(inputs, tasks, settings, memory, announce)
    if start:
        check_room(settings.model, start, out, undo=settings.undo)
    words = (*(("--code", code) if code else ()), *(("--memory", memory) if memory else ()), "--out", str(out))
    with tracking(RunFolder.create(out, **identity, command=command_line(settings, *words)), track) as folder:
        if start:
            start_from(folder, settings.model, start, undo=settings.undo)
            folder.update(notes=list(start.notes) or None, **record_input(start))
        announce_run(ranks, settings, folder.path, settings.tasks)
        return _learn(folder, inputs, tasks, progress, write_page, ranks, needs)


def extend(
    out: str | Path,
    more: Sequence[str],
    progress: Progress = silent,
    *,
    without_old: bool = False,
    total: int | None = None,
    code: str = "",
    track: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    ranks: ProcessRank = SINGLE,
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
        memory: As for :func:`run`.
        announce: As for :func:`run`.
        ranks: The processes that train together; this one is rank 0, and the others call ``share_learning.share``.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If the folder is no learning run, a sequence is not usable, or this very call was completed.
    """
    if Path(out).is_dir():
        check_files(Path(out))
    reset_peak()
    clear_leftovers(Path(out))
    folder = RunFolder.open_unfinished(out) or RunFolder.open(out)
    run_record = folder.run()
    if run_record["verb"] != "learn":
        raise StoreError(f"{out} holds a run of {run_record['verb']!r}; give the folder of `regrow learn`")
    check_repeatable(Path(out), run_record)
    was = convert_settings(run_record["settings"], Settings)
    refuse_recorded_code(was.method, run_record["command"])
    check_checkpoint(folder.path / CHECKPOINT, read_history(folder))
    added = _added(run_record.get("extension"), was.tasks, tuple(more), total)
    if run_record.get("finished") and folder.path == Path(out) and not added:
        if more:
            raise StoreError(
                f"{out} has learned {', '.join(more)} by this very command; to learn the same once more, add "
                f"--total {len(was.tasks) + len(more)}"
            )
        announce_end(ranks)
        return folder
    settings = replace(was, tasks=(*was.tasks, *added))
    # Defaults of this version may differ from those with which the run was begun.
    recorded = run_record["defaults"]
    start = load_start(was.model, was.tasks, was.input, run=folder.path, code=code, progress=progress)
    effective = replace(settings, method_settings={**recorded, **was.method_settings})
    inputs, recorded_tasks = read_inputs(effective, start, ranks), run_record.get("sequence") if without_old else None
    old = _read_old_tasks(inputs, was, folder, recorded_tasks, without_old)
    tasks = fit_tasks([*old, *(task for spec in added for task in read_sequence(spec, inputs.tasks))], inputs.tasks)
    _check_outputs(inputs, old, tasks, str(out))
    needs = plan_learning(inputs, tasks, effective, memory, announce)
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
        announce_run(ranks, effective, reopened.path, was.tasks, recorded_tasks)
        return _learn(reopened, inputs, tasks, progress, write_page, ranks, needs)


def _read_old_tasks(
    inputs: LearnInputs, was: Settings, folder: RunFolder, recorded: object, without_old: bool
) -> list[Task]:
    """Return the tasks that a run has had, without data where these may be missing."""
    try:
        old = read_tasks(replace(inputs.tasks, sequences=was.tasks), recorded)
    except MissingError as error:
        if without_old:
            raise SourceError(f"{error}; this run did not note what its tasks were like") from None
        raise MissingError(f"{error}; with --without-old, tasks that are over need no data any more") from None
    if late := [task.name for task in old[count_tasks(folder.path / CHECKPOINT) :] if task.gone]:
        raise SourceError(f"{', '.join(late)} is not over, and its data are not there: it cannot be learned")
    if inputs.learner.trains_on_past and (gone := [task.name for task in old if task.gone]):
        raise SourceError(f"{was.method} learns from all examples, and those of {', '.join(gone)} are not there")
    return old


def _check_outputs(inputs: LearnInputs, old: Sequence[Task], tasks: Sequence[Task], run: str) -> None:
    """Raise ValueError unless the network of a run has an output for each class of its old and new tasks."""
    outputs, wanted = count_outputs(inputs, old), count_outputs(inputs, tasks)
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
    folder: RunFolder,
    inputs: LearnInputs,
    tasks: Sequence[Task],
    progress: Progress,
    write_page: WritePage | None,
    ranks: ProcessRank,
    needs: MemoryTerms | None = None,
) -> RunFolder:
    start, learner, parallel = time.perf_counter(), inputs.learner, Parallel(ranks, by_rows=True)
    model, origin = build_network(inputs, tasks)
    axes = trace_network(inputs, model, tasks)
    check_same_tasks(ranks, model, tasks)
    folder.update(sequence=record_tasks(inputs.tasks.sequences, tasks))
    state, place = TrainState(learner.state), folder.path / CHECKPOINT
    history = read_history(folder) if folder.resumed and place.is_file() else None
    broadcast_start(ranks, history, place)
    if history:
        model, axes, state = read_checkpoint(place, model, axes, learner.state, history)
    folder.own_ledger.truncate(len(state.plans))
    record = LearningRecord(folder, tasks, len(folder.own_ledger))

    def keep(now: TrainState[Any], context: Context) -> None:
        record.write(now)
        write_checkpoint(place, context.model, now, logged=record.events)

    fitted = train_tasks(inputs, tasks, model, axes, state, parallel, checkpoint=keep, progress=progress)
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
    peak = record_peak(needs) if needs else None
    return folder.finish(write_page, seconds=seconds, stage=describe_stage(folder), memory=peak)


def _defaults(method: str, settings: Mapping[str, object]) -> dict[str, Any]:
    return find_method(MethodKind.CONTINUAL, method).defaults({*settings, "seed"})
