"""The inputs of a learning run that settings name: the network, and the tasks with their data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from regrow.core.axes import AxisGraph, Example
from regrow.core.objectives import CLASSIFICATION, NEXT_TOKEN
from regrow.core.sources import moved
from regrow.core.tasks import Task, first_examples, input_shape
from regrow.data import MissingError, SourceError
from regrow.jobs.recording import Clock, Invocation
from regrow.jobs.same_inputs import check_same_settings
from regrow.jobs.starting import check_outputs, image_shape, load_start
from regrow.jobs.task_sequences import TaskSpecs, fit_tasks, read_sequence, read_tasks, record_tasks
from regrow.jobs.training_memory import plan_learning
from regrow.methods import MethodKind, find_method
from regrow.nets.devices import choose_device
from regrow.nets.examples import image_example
from regrow.nets.loaded import Loaded
from regrow.nets.small import small
from regrow.settings.learn import Settings
from regrow.streaming.requirements import MemoryTerms
from regrow.tracing import trace
from regrow.tracing.meta_copy import clone_model
from regrow.training.checkpoint import CHECKPOINT
from regrow.training.continual import TaskSchedule
from regrow.training.learner import Learner
from regrow.training.schedule import NO_AXES


@dataclass(frozen=True)
class LearnInputs:
    """What a run learns, and with which network.

    Args:
        loaded: The network, changed in place.
        axes: Its axes.
        tasks: All tasks.
        learner: The method.
        schedule: How each task is trained.
        checkpoint: The file with the state of the training, relative to the run folder; ``None``: there is none.
        untrained: Returns the network before the run once more; ``None``: no tasks are added to the run.
        new: Whether the network is new, so that nothing is recorded of it.
        sequence: What is recorded of the tasks.
        call: What the result depends on besides settings, for a call from Python.
        memory: What the run needs of a limit of memory; ``None``: there is none.
    """

    loaded: Loaded
    axes: AxisGraph
    tasks: Sequence[Task]
    learner: Learner[Any]
    schedule: TaskSchedule
    checkpoint: Path | None = Path(CHECKPOINT)
    untrained: Callable[[], Loaded] | None = None
    new: bool = False
    sequence: Sequence[object] | None = None
    call: Mapping[str, object] | None = None
    memory: MemoryTerms | None = None


@dataclass(frozen=True)
class BegunRun:
    """A run to which tasks are added.

    Args:
        path: The folder that has its files.
        sequences: The sequences of tasks that it has had.
        over: How many of its tasks are over.
        without_old: Whether data of these may be missing.
        recorded: What it has recorded of its tasks.
    """

    path: Path
    sequences: tuple[str, ...]
    over: int
    without_old: bool
    recorded: object


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


def open_named(
    settings: Settings, invocation: Invocation, clock: Clock, *, begun: BegunRun | None = None
) -> LearnInputs:
    """Open the network and the tasks that settings name.

    Args:
        settings: The settings of the run.
        invocation: How the command was called. What the run needs of its memory is predicted once model and data are
            read, and the run is refused if that is more.
        clock: Times the stages ``load`` and ``trace``.
        begun: The run to which the last tasks are added; ``None``: all are those of a new run.

    Raises:
        ValueError: If the network or a sequence is not usable; says which, and the remedy.
    """
    ranks, code, progress = invocation.ranks, invocation.code, invocation.progress
    check_same_settings(ranks, settings)
    device = choose_device(settings.device, ranks)
    learner = build_learner(settings.method, settings.method_settings, settings.seed)
    with clock.stage("load"):
        known, folder = (begun.sequences, begun.path) if begun else (settings.tasks, None)
        start = load_start(settings.model, known, settings.input, run=folder, code=code, progress=progress)
        tasks, outputs = _read_named(settings, start, learner, begun)

        def build() -> Loaded:
            if start:
                return replace(start, model=clone_model(start.model).to(device))
            model, origin = small(settings.model, input_shape(tasks[0].train), outputs, settings.seed)
            return Loaded(model.to(device), None, image_example(model, *origin.input_shape), origin)

        network = start.model if start else None
        needs = plan_learning(
            settings, lambda: network or build().model, tasks, device, invocation.memory, invocation.announce
        )
        loaded, new = build(), start is None
    with clock.stage("trace"):
        example = start.example if start else Example((first_examples(tasks[0].train, 2).inputs,))
        args, kwargs = moved((example.args, dict(example.kwargs)), device)
        axes = trace(loaded.model, *args, **kwargs) if new or learner.uses_axes else NO_AXES
    shared: Any = {one.name: getattr(settings, one.name) for one in fields(TaskSchedule) if hasattr(settings, one.name)}
    schedule = TaskSchedule(**shared, objective=CLASSIFICATION if loaded.tokenizer is None else NEXT_TOKEN)
    names = record_tasks(settings.tasks, tasks)
    return LearnInputs(loaded, axes, tasks, learner, schedule, untrained=build, new=new, sequence=names, memory=needs)


def specs_of(settings: Settings, start: Loaded | None = None) -> TaskSpecs:
    """Return the sequences of tasks of a run, and how much of their data is used.

    Args:
        settings: The settings of the run.
        start: The network with its weights; ``None``: a new one is built.
    """
    specs = TaskSpecs(settings.tasks, settings.train, settings.test, settings.scenario, settings.seed)
    if start and start.tokenizer is not None:
        return replace(specs, tokenizer=start.tokenizer, seq_len=settings.seq_len)
    return replace(specs, shape=image_shape(start), normalised=start.origin.normalised_images) if start else specs


def _read_named(
    settings: Settings, start: Loaded | None, learner: Learner[Any], begun: BegunRun | None
) -> tuple[list[Task], int]:
    """Return all tasks, and the number of the network's outputs; raise ValueError if it has fewer."""
    specs = specs_of(settings, start)
    old = _read_old(begun, specs, settings.method, learner) if begun else read_tasks(specs)
    more = settings.tasks[len(begun.sequences) :] if begun else ()
    added = [task for spec in more for task in read_sequence(spec, specs)]
    tasks = fit_tasks([*old, *added], specs)
    had, outputs = (
        max(settings.classes, 1 + max((c for task in some for c in task.classes), default=0)) for some in (old, tasks)
    )
    if start and start.tokenizer is None:
        check_outputs(start, tasks[0], outputs)
    elif outputs > had:
        raise ValueError(
            f"{', '.join(task.name for task in added)} has classes up to {outputs - 1}, and the network of the run has "
            f"outputs for {had}: begin a run with --classes {outputs}"
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
