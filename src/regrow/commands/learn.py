"""``regrow learn``: train a network on a sequence of tasks, in a run folder to which further tasks can be added."""

import re
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import islice, takewhile
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from regrow import store
from regrow.commands.history import read_history
from regrow.data import MissingError, SourceError, streams
from regrow.methods import MethodKind, find_method, refuse_recorded_code
from regrow.nets.files import check_files
from regrow.nets.loaded import Origin
from regrow.nets.small import origin_of_small, small
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.learn import Settings
from regrow.settings.words import command_line
from regrow.store.errors import StoreError
from regrow.store.replacing import clear_leftovers
from regrow.store.run_record import convert_settings
from regrow.tasks import Task, first_examples, input_shape
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model
from regrow.training.checkpoint import CHECKPOINT, check_checkpoint, count_tasks, read_checkpoint, write_checkpoint
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn, untrained_accuracies
from regrow.training.growth_metrics import is_settled
from regrow.training.learner import Context, Learner, write_replacements
from regrow.training.state import TrainState

MOST_INPUTS, MOST_CLASSES = 2**24, 2**20
"""The largest number of values in an example, and of classes, that a file may claim."""


def schedule_of(settings: Settings) -> TaskSchedule:
    """Return how every task is trained, from the settings of a run.

    Args:
        settings: The settings.
    """
    shared = (one.name for one in fields(TaskSchedule) if hasattr(settings, one.name))
    return TaskSchedule(**{name: getattr(settings, name) for name in shared})


def run(
    settings: Settings, out: str | Path, progress: Progress = silent, *, write_page: WritePage | None = None
) -> RunFolder:
    """Learn a sequence of tasks and write a run folder; an interrupted run is resumed.

    Args:
        settings: The settings of the run.
        out: The run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If a setting or a sequence is not usable; says which, and the remedy.
    """
    check_settings(settings)
    learner, schedule, told = built(settings), schedule_of(settings), _told(settings)
    if RunFolder.check(out, **told) and (begun := RunFolder.open_unfinished(out)):
        check_checkpoint(begun.path / CHECKPOINT, read_history(begun))
    tasks = tasks_of(settings)
    origin_of_small(settings.model, input_shape(tasks[0].train), outputs_of(settings, tasks))
    with RunFolder.create(out, **told, command=command_line(settings, "--out", str(out))) as folder:
        return _go_on(folder, settings, learner, schedule, tasks, progress, write_page)


def extend(
    out: str | Path,
    more: Sequence[str],
    progress: Progress = silent,
    *,
    without_old: bool = False,
    total: int | None = None,
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
        without_old: Whether data of finished tasks may be missing; the network is then not evaluated on these.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If the folder is no learning run, a sequence is not usable, or this very call was completed.
    """
    if Path(out).is_dir():
        check_files(Path(out))
    clear_leftovers(Path(out))
    folder = RunFolder.open_unfinished(out) or RunFolder.open(out)
    told = folder.run()
    if told.get("verb") != "learn":
        raise StoreError(f"{out} holds a run of {told.get('verb')!r}; give the folder of `regrow learn`")
    was = convert_settings(told["settings"], Settings)
    refuse_recorded_code(was.method, str(told.get("command")))
    check_checkpoint(folder.path / CHECKPOINT, read_history(folder))
    added = _added(told.get("extension"), was.tasks, tuple(more), total)
    if told.get("finished") and folder.path == Path(out) and not added:
        if more:
            raise StoreError(
                f"{out} has learned {', '.join(more)} by this very command; to learn the same once more, add "
                f"--total {len(was.tasks) + len(more)}"
            )
        return folder
    settings = replace(was, tasks=(*was.tasks, *added))
    # It goes on as it began, be the defaults of this version others.
    learner = built(replace(settings, method_settings={**told.get("defaults", {}), **was.method_settings}))
    try:
        old = tasks_of(was, told.get("sequence") if without_old else None)
    except MissingError as error:
        if without_old:
            raise SourceError(f"{error}; this run did not note what its tasks were like") from None
        raise MissingError(f"{error}; with --without-old, tasks that are over need no data any more") from None
    if gone := [task.name for task in old if task.gone]:
        over = count_tasks(folder.path / CHECKPOINT)
        if late := [task.name for task in old[over:] if task.gone]:
            raise SourceError(f"{', '.join(late)} is not over, and its data are not there: it cannot be learned")
        if learner.trains_on_past:
            raise SourceError(f"{was.method} learns from all examples, and those of {', '.join(gone)} are not there")
    tasks = streams.alike([*old, *(task for spec in added for task in _sequence(spec, settings))])
    outputs, wanted = outputs_of(was, old), outputs_of(settings, tasks)
    if wanted > outputs:
        raise ValueError(
            f"{', '.join(more)} has classes up to {wanted - 1}, and the network of {out} has outputs for {outputs}: "
            f"begin a run with --classes {wanted}"
        )
    taken = _told(settings)["defaults"] | told.get("defaults", {})
    with RunFolder.reopen(out) as reopened:
        if reopened.run() != told:
            raise StoreError(f"{out} was changed by another process meanwhile; run this again")
        reopened.update(
            settings=record_settings(settings),
            defaults=taken,
            command=command_line(settings, "--out", str(out)),
            finished=None,
            extension=list(more) or None,
        )
        return _go_on(reopened, settings, learner, schedule_of(settings), tasks, progress, write_page)


def _added(last: Any, tasks: tuple[str, ...], more: tuple[str, ...], total: int | None) -> tuple[str, ...]:
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


def _go_on(
    folder: RunFolder,
    settings: Settings,
    learner: Learner[Any],
    schedule: TaskSchedule,
    tasks: Sequence[Task],
    progress: Progress,
    write_page: WritePage | None,
) -> RunFolder:
    start = time.perf_counter()
    model, origin = network(settings, tasks)
    axes = trace(model, first_examples(tasks[0].train, 2).inputs)
    folder.update(sequence=_known(settings, tasks))
    state, place = TrainState(learner.state), folder.path / CHECKPOINT
    if folder.resumed and place.is_file():
        model, axes, state = read_checkpoint(place, model, axes, learner.state, read_history(folder))
    folder.ledger.truncate(len(state.plans))
    plans, events, over = len(folder.ledger), 0, 0

    def record(now: TrainState[Any]) -> None:
        nonlocal plans, events, over
        for plan in now.plans[plans:]:
            folder.ledger.append(plan)
        for i in range(events, settled := _count_settled(now)):
            folder.log("growth", number=i, **now.events[i])
        for i in range(over, now.number):
            folder.log("task", name=tasks[i].name, accuracy=list(now.rows[i]), **now.sizes[i])
        plans, events, over = len(now.plans), settled, now.number

    def keep(now: TrainState[Any], context: Context) -> None:
        record(now)
        write_checkpoint(place, context.model, now, logged=events)

    record(state)  # version 0.1 stores before it logs
    if len(state.before) < len(tasks):
        # Tasks have been added since: what an untrained network knows of them is measured again.
        row = untrained_accuracies(network(settings, tasks)[0], tasks, schedule)
        state = replace(state, before=state.before + row[len(state.before) :])
    fitted = learn(model, axes, tasks, learner, schedule, state=state, checkpoint=keep, progress=progress)
    plain = clone_model(fitted.model)
    write_replacements(learner, fitted.state.learner, Context(plain, fitted.axes, tasks[-1], len(tasks) - 1))
    store.write_model(plain, folder.path, origin=origin)
    if gone := [task.name for task in tasks if task.gone]:
        folder.log("gone", tasks=gone)
    folder.log("matrix", tasks=[task.name for task in tasks], **accuracy_matrix(fitted.state).record())
    return folder.finish(write_page, seconds={"learn": round(time.perf_counter() - start, 3)})


def _count_settled(state: TrainState[Any]) -> int:
    """Return the number of growth events that need no more watching; the others are logged at the end of their task."""
    return len(list(takewhile(lambda event: is_settled(event) or event["task"] < state.number, state.events)))


def network(settings: Settings, tasks: Sequence[Task]) -> tuple[nn.Module, Origin]:
    """Return the network of a run with random weights, and the record of how it was built.

    Args:
        settings: The settings, with the network's name and the seed.
        tasks: All tasks, which give input shape and classes.
    """
    shape = input_shape(tasks[0].train)
    return small(settings.model, shape, outputs_of(settings, tasks), settings.seed)


def outputs_of(settings: Settings, tasks: Sequence[Task]) -> int:
    """Return the number of outputs (classes) of the network of a run.

    Args:
        settings: The settings, which may ask for more.
        tasks: All tasks.
    """
    return max(settings.classes, 1 + max(c for task in tasks for c in task.classes))


def _told(settings: Settings) -> dict[str, Any]:
    """Return what identifies a run: command, settings and the method's defaults."""
    taken = find_method(MethodKind.CONTINUAL, settings.method).defaults({*settings.method_settings, "seed"})
    return {"verb": "learn", "settings": record_settings(settings), "defaults": taken}


def built(settings: Settings) -> Learner[Any]:
    """Return the learner of a run.

    Args:
        settings: The settings, with the method's name and settings.

    Raises:
        ValueError: If there is no such method, or a setting of it is wrong.
    """
    entry = find_method(MethodKind.CONTINUAL, settings.method)
    given = dict(settings.method_settings)
    if any(one.name == "seed" for one in fields(entry.settings)):
        given.setdefault("seed", settings.seed)
    found: Learner[Any] = entry.made(settings.method, given)
    return found


def tasks_of(settings: Settings, known: Any = None) -> list[Task]:
    """Return the tasks of a run, with their data.

    Args:
        settings: The settings of the run.
        known: The record of each sequence's tasks in ``run.json``, which replaces data that are missing; ``None``: all
            data must be there.

    Raises:
        SourceError: If a sequence is misspelled, or its data are missing.
        StoreError: If the record of a sequence is invalid.
    """
    found: list[Task] = []
    for i, spec in enumerate(settings.tasks):
        try:
            found += _sequence(spec, settings)
        except MissingError:
            if not isinstance(known, list) or i >= len(known):
                raise
            found += _gone(known[i], _spelled(spec)[2])
    return streams.alike(found)


def _sequence(spec: str, settings: Settings) -> list[Task]:
    kind, data, n = _spelled(spec)
    base = streams.of(data, settings.train, settings.test, settings.seed)
    if n < 1:
        raise SourceError(f"{spec}: a sequence has at least one task")
    match kind:
        case "":
            return [base]
        case "permuted":
            return streams.permuted_tasks(base, n, settings.seed)
        case "rotated":
            return streams.rotated_tasks(base, n)
    return streams.split(base, n, relabel=settings.scenario == "domain")


def _spelled(spec: str) -> tuple[str, str, int]:
    """Parse a sequence: the transformation, the data's name, and the number of tasks."""
    fit = re.fullmatch(r"(permuted|rotated|split):(.+?):(\d{1,3})", spec)
    return (fit[1], fit[2], int(fit[3])) if fit else ("", spec, 1)


def _known(settings: Settings, tasks: Sequence[Task]) -> list[list[dict[str, Any]]]:
    """Return the record of each sequence that is needed once its data are missing."""
    rest = iter(tasks)
    return [
        [
            {"name": task.name, "inputs": list(input_shape(task.train)), "classes": list(task.classes)}
            for task in islice(rest, _spelled(spec)[2])
        ]
        for spec in settings.tasks
    ]


def _gone(told: Any, many: int) -> list[Task]:
    """Return the tasks of a sequence from an untrusted ``run.json``, without data."""
    found = []
    for one in told if isinstance(told, list) else []:
        match one:
            case {"name": str(name), "inputs": [int(), int(), int()] as inputs, "classes": [int(), *_] as classes}:
                if (
                    min(inputs) > 0
                    and prod(inputs) <= MOST_INPUTS
                    and all(type(c) is int and 0 <= c < MOST_CLASSES for c in classes)
                ):
                    found.append(Task.of_gone(name, tuple(inputs), tuple(classes)))
    if len(found) != many:
        raise StoreError(f"run.json tells of {many} tasks what cannot be ({str(told)[:80]}); restore it")
    return found
