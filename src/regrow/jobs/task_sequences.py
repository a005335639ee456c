"""The sequences of tasks that a network learns: parsed, read with their data, and recorded in ``run.json``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

from regrow.core.tasks import Task, input_shape
from regrow.data import Half, MissingError, SourceError, streams, text, windows
from regrow.data.datasets import LoadedExamples, join_examples, to_examples_of_batch
from regrow.store.errors import StoreError

MOST_INPUTS, MOST_CLASSES = 2**24, 2**20
"""The largest number of values in an example, and of classes, that a file may claim."""


@dataclass(frozen=True)
class TaskSpecs:
    """The sequences of tasks of a run, and how much of their data is used.

    Args:
        sequences: ``permuted:DATA:N``, ``rotated:DATA:N``, ``split:DATA:N``, or ``DATA`` for a single task.
        train: The number of training examples of each data set; 0: all.
        test: The number of test examples; 0: all.
        scenario: ``domain``, ``class`` or ``task``; split tasks are relabelled in the first.
        seed: Seed of permutations and of the choice of examples.
        shape: The shape ``[C, H, W]`` that images are converted to; empty: that of the first task's images.
        normalised: Whether the network takes normalised images (``Origin.normalised_images``).
        tokenizer: The tokenizer of a language model, whose tasks are text domains; ``None``: tasks are of images.
        seq_len: Tokens per window of text.
    """

    sequences: tuple[str, ...]
    train: int = 0
    test: int = 0
    scenario: str = "domain"
    seed: int = 0
    shape: tuple[int, ...] = ()
    normalised: bool = False
    tokenizer: Any = None
    seq_len: int = 256


def read_tasks(specs: TaskSpecs, recorded: object = None) -> list[Task]:
    """Return the tasks of a run, with their data.

    Args:
        specs: The sequences, and how much of their data.
        recorded: The record of each sequence's tasks in ``run.json``, which replaces data that are missing; ``None``:
            all data must be there.

    Raises:
        SourceError: If a sequence is misspelled, or its data are missing.
        StoreError: If the record of a sequence is invalid.
    """
    tasks: list[Task] = []
    for i, spec in enumerate(specs.sequences):
        try:
            tasks += read_sequence(spec, specs)
        except MissingError:
            if not isinstance(recorded, list) or i >= len(recorded):
                raise
            tasks += _read_recorded(recorded[i], parse_sequence(spec)[2])
    return fit_tasks(tasks, specs)


def fit_tasks(tasks: Sequence[Task], specs: TaskSpecs) -> list[Task]:
    """Return the tasks with all images in the shape that the network takes; tasks of text as they are.

    Args:
        tasks: The tasks.
        specs: The shape, and whether they are text.
    """
    return list(tasks) if specs.tokenizer is not None else streams.alike(tasks, specs.shape)


def read_sequence(spec: str, specs: TaskSpecs) -> list[Task]:
    """Return the tasks of one sequence, with their data.

    Args:
        spec: The sequence, as ``TaskSpecs.sequences``.
        specs: How much of its data is used, the scenario and the seed.

    Raises:
        SourceError: If it is misspelled, or its data are missing.
    """
    if specs.tokenizer is not None:
        return [read_text(spec, specs)]
    kind, data, n = parse_sequence(spec)
    base = streams.of(data, specs.train, specs.test, specs.seed, size=specs.shape[1:], normalised=specs.normalised)
    if n < 1:
        raise SourceError(f"{spec}: a sequence has at least one task")
    match kind:
        case "":
            return [base]
        case "permuted":
            return streams.permuted_tasks(base, n, specs.seed)
        case "rotated":
            return streams.rotated_tasks(base, n)
    return streams.split(base, n, relabel=specs.scenario == "domain")


def parse_sequence(spec: str) -> tuple[str, str, int]:
    """Return the transformation, the data's name and the number of tasks of a sequence.

    Args:
        spec: The sequence, as ``TaskSpecs.sequences``.

    >>> parse_sequence("permuted:digits:5"), parse_sequence("digits")
    (('permuted', 'digits', 5), ('', 'digits', 1))
    """
    fit = re.fullmatch(r"(permuted|rotated|split):(.+?):(\d{1,3})", spec)
    return (fit[1], fit[2], int(fit[3])) if fit else ("", spec, 1)


def record_tasks(sequences: Sequence[str], tasks: Sequence[Task]) -> list[list[dict[str, object]]]:
    """Return the record of each sequence that is needed once its data are missing, as JSON data.

    Args:
        sequences: The sequences.
        tasks: The tasks of all of them, in order.
    """
    rest = iter(tasks)
    return [
        [
            {"name": task.name, "inputs": list(input_shape(task.train)), "classes": list(task.classes)}
            for task in islice(rest, parse_sequence(spec)[2])
        ]
        for spec in sequences
    ]


def read_text(spec: str, specs: TaskSpecs) -> Task:
    """Return a text domain as a task: windows of its calibration half to train on, of its other half to test on.

    Args:
        spec: The domain, ``NAME`` or ``NAME=PATH``.
        specs: The tokenizer, and how much of it is used.

    Raises:
        SourceError: If there is no such text, or too little of it.
    """
    domain = text(spec)
    train, test = (
        windows(domain, specs.tokenizer, n=n or None, seq_len=specs.seq_len, seed=specs.seed, half=half)
        for n, half in ((specs.train, Half.CALIBRATION), (specs.test, Half.EVALUATION))
    )
    return Task(domain.name, join_examples(map(to_examples_of_batch, train)), LoadedExamples(test.batches), ())


def _read_recorded(record: object, many: int) -> list[Task]:
    """Return the tasks of a sequence from an untrusted ``run.json``, without data."""
    tasks = []
    for one in record if isinstance(record, list) else []:
        match one:
            case {"name": str(name), "inputs": [int(), int(), int()] as inputs, "classes": [int(), *_] as classes}:
                if (
                    min(inputs) > 0
                    and prod(inputs) <= MOST_INPUTS
                    and all(type(c) is int and 0 <= c < MOST_CLASSES for c in classes)
                ):
                    tasks.append(Task.of_gone(name, tuple(inputs), tuple(classes)))
    if len(tasks) != many:
        raise StoreError(f"run.json tells of {many} tasks what cannot be ({str(record)[:80]}); restore it")
    return tasks
