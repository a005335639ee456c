"""The network with its weights and the tasks that a learning run or a search starts from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from regrow import store
from regrow.core.errors import InputError
from regrow.core.names import names_function
from regrow.core.objectives import Objective
from regrow.core.sources import logits_in
from regrow.core.tasks import Task, first_examples, input_shape, run_network
from regrow.data import Half, MissingError, SourceError, streams, text, windows
from regrow.data.datasets import LoadedExamples, batch_to_examples, join_examples
from regrow.jobs.models import ModelSpec, find_input_shape, load_model
from regrow.jobs.recording import Invocation
from regrow.methods import MethodEntry
from regrow.nets import Loaded
from regrow.nets.load import check_code
from regrow.nets.vision import BUILDERS
from regrow.settings.learn import parse_sequence
from regrow.store.errors import StoreError
from regrow.store.run_record import BEFORE
from regrow.training.continual import TaskSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The largest number of values in an example, and of classes, that ``run.json`` may claim.
MOST_INPUTS, MOST_CLASSES = 2**24, 2**20


@dataclass(frozen=True)
class TaskSpecs:
    """The sequences of tasks of a run, and how much of their data is used."""

    sequences: tuple[str, ...]  # as `--tasks` takes them
    train: int = 0  # the number of training examples of each data set; 0: all
    test: int = 0  # the number of test examples; 0: all
    scenario: str = "domain"  # `domain`, `class` or `task`; split tasks are relabelled in the first
    seed: int = 0
    # The shape `[C, H, W]` that images are converted to; empty: that of the first task's images
    shape: tuple[int, ...] = ()
    normalised: bool = False  # whether images are normalised by the mean and deviation of ImageNet
    # The tokenizer of a language model, whose tasks are text domains; `None`: tasks are of images
    tokenizer: "PreTrainedTokenizerBase | None" = None
    seq_len: int = 256  # tokens per window of text

    def adapt_to(self, start: Loaded | None, seq_len: int) -> "TaskSpecs":
        """Return these specs with the form of data that ``start`` takes, text of ``seq_len``; ``None``: as they are."""
        if start is None:
            return self
        if start.tokenizer is not None:
            return replace(self, tokenizer=start.tokenizer, seq_len=seq_len)
        return replace(self, shape=_require_image_form(start), normalised=start.origin.normalised_images)


def read_tasks(specs: TaskSpecs, recorded: object = None, before: Sequence[Task] = ()) -> list[Task]:
    """Return the tasks ``before`` and those of the specs; images get the shape of the specs, or of the first task.

    ``recorded``: what :func:`describe_tasks` returned, for tasks whose data are missing; ``None``: MissingError then.
    """
    tasks = [*before]
    for i, spec in enumerate(specs.sequences):
        try:
            tasks += _read_sequence(spec, specs)
        except MissingError:
            if not isinstance(recorded, list) or i >= len(recorded):
                raise
            _, _, count = parse_sequence(spec)
            tasks += _restore_tasks(recorded[i], count)
    if specs.tokenizer is not None or (len(tasks) == 1 and not specs.shape):
        return tasks
    return streams.resize_tasks(tasks, specs.shape)


def _read_sequence(spec: str, specs: TaskSpecs) -> list[Task]:
    """Return the tasks of the sequence ``spec``; SourceError if it has none, MissingError if its data are not there."""
    if specs.tokenizer is not None:
        return [_read_text(spec, specs)]
    transformation, data, n = parse_sequence(spec)
    base = streams.load_task(
        data, specs.train, specs.test, specs.seed, size=specs.shape[1:], normalised=specs.normalised
    )
    if n < 1:
        raise SourceError(f"{spec}: a sequence has at least one task")
    match transformation:
        case "":
            return [base]
        case "permuted":
            return streams.permuted_tasks(base, n, specs.seed)
        case "rotated":
            return streams.rotated_tasks(base, n)
    return streams.split_by_classes(base, n, relabel=specs.scenario == "domain")


def _read_text(spec: str, specs: TaskSpecs) -> Task:
    """Return the text domain ``spec`` as a task: windows of its calibration half to train on, of the other to test."""
    domain = text(spec)
    read = partial(windows, domain, specs.tokenizer, seq_len=specs.seq_len, seed=specs.seed)
    train = read(n=specs.train or None, half=Half.CALIBRATION)
    test = read(n=specs.test or None, half=Half.EVALUATION)
    return Task(domain.name, join_examples(map(batch_to_examples, train)), LoadedExamples(test.batches), ())


def describe_tasks(sequences: Sequence[str], tasks: Sequence[Task]) -> list[list[dict[str, object]]]:
    """Return, per sequence, its part of ``tasks`` as JSON data (name, input shape, classes), in case data get lost."""
    records: list[dict[str, object]] = [
        {"name": task.name, "inputs": list(input_shape(task.train)), "classes": list(task.classes)} for task in tasks
    ]
    rest = iter(records)
    return [list(islice(rest, parse_sequence(spec)[2])) for spec in sequences]


def _restore_tasks(record: object, count: int) -> list[Task]:
    """Return the ``count`` tasks of a sequence, without data, from its untrusted ``record``; StoreError if damaged."""
    tasks = []
    for entry in record if isinstance(record, list) else []:
        match entry:
            case {"name": str(name), "inputs": [int(), int(), int()] as inputs, "classes": [int(), *_] as classes}:
                valid = all(type(c) is int and 0 <= c < MOST_CLASSES for c in classes)
                if valid and min(inputs) > 0 and prod(inputs) <= MOST_INPUTS:
                    tasks.append(Task.of_gone(name, tuple(inputs), tuple(classes)))
    if len(tasks) != count:
        raise StoreError(f"run.json tells of {count} tasks what cannot be ({str(record)[:80]}); restore it")
    return tasks


def is_new_network(model: str) -> bool:
    """Whether a name has the form of a small network's, which is built with random weights, and is no file or folder.

    >>> is_new_network("mlp:100-100"), is_new_network("resnet18")
    (True, False)
    """
    kind, _, _ = model.partition(":")
    small = kind in BUILDERS or re.fullmatch(r"[\w-]+:\d+(-\d+)*", model)
    return bool(small) and not Path(model).exists()


def load_start_network(
    model: str, sequences: tuple[str, ...], shape: str, invocation: Invocation, run: Path | None = None
) -> Loaded | None:
    """Return the network with weights that a run trains, in float32; ``None`` if its name is that of a new one.

    ``shape`` is that of its input (empty: from the data of ``sequences``), and ``run`` the folder of a run that is
    continued, which may hold the network in ``before/``. Raises ModelError for code that the command line lacks.
    """
    code, progress = invocation.code, invocation.progress
    if is_new_network(model):
        check_code(model, False, code)
        return None
    data = (parse_sequence(spec)[1] for spec in sequences)
    sources = tuple(name if name == "digits" else f"data={name}" for name in data)
    spec = ModelSpec(model, "float32", input=shape, sources=sources)
    if run and (run / BEFORE / store.SHAPES).is_file():
        loaded = load_model(replace(spec, name=str(run / BEFORE)), progress, code)
        return replace(loaded, origin=replace(loaded.origin, name=Path(model).name))
    if run and names_function(model):
        check_code(model, True, code)
        return load_model(replace(spec, name=code), progress)
    return load_model(spec, progress, code)


def find_space_start(space: str, data: str, shape: str, invocation: Invocation) -> Loaded | None:
    """Return the network with weights that is searched, in float32; ``None`` if its name is that of a search space.

    ``data``: as ``--data`` takes it. Other arguments and errors are as for :func:`load_start_network`.
    """
    if not Path(space).exists() and ":" in space and not space.startswith("torchvision:"):
        check_code(space, False, invocation.code)
        return None
    return load_start_network(space, (data,), shape, invocation)


def _require_image_form(loaded: Loaded) -> tuple[int, ...]:
    """Return the shape ``[C, H, W]`` of a network's image inputs; InputError unless its input has 4 dimensions."""
    shape = find_input_shape(loaded)
    if len(shape) != 4:
        raise InputError(
            f"{loaded.origin.name or 'the network'} takes inputs of shape {list(shape)}, and the data are images; "
            "give a network of images, or use Python with data of your own"
        )
    return tuple(shape[1:])


def check_outputs(loaded: Loaded, task: Task, classes: int) -> None:
    """Raise InputError unless a network gives ``classes`` outputs or more on examples of a task; sets eval mode."""
    model = loaded.model.eval()
    with torch.no_grad():
        outputs = logits_in(run_network(model, first_examples(task.train, 2).inputs)).shape
    if len(outputs) != 2 or outputs[1] < classes:
        has = f"{outputs[1]} outputs" if len(outputs) == 2 else f"outputs of shape {list(outputs)}"
        raise InputError(
            f"{loaded.origin.name or 'the network'} has {has}, and the tasks have {classes} classes; "
            "give a model with an output for each class"
        )


def select_method_settings(entry: MethodEntry, settings: Mapping[str, object]) -> dict[str, object]:
    """Return those of the settings whose names are settings of a method."""
    return {field.name: settings[field.name] for field in fields(entry.settings) if field.name in settings}


def make_task_schedule(settings: object, objective: Objective) -> TaskSchedule:
    """Return a schedule of the objective, whose other fields are the attributes of the same names of ``settings``."""
    names = [field.name for field in fields(TaskSchedule) if hasattr(settings, field.name)]
    return TaskSchedule(**{name: getattr(settings, name) for name in names}, objective=objective)
