"""A user's sequence of tasks: pairs of training and test data, or a benchmark shaped like those of Avalanche."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from regrow.core.objectives import IGNORED
from regrow.core.sources import Batch
from regrow.core.tasks import ExampleSet, Task
from regrow.data import batch_streams
from regrow.data.batch_forms import are_labels
from regrow.data.batches import ReadOptions, is_entries
from regrow.data.datasets import fix_order, to_examples
from regrow.data.halves import SourceError


def to_tasks(tasks: Any, reading: ReadOptions = ReadOptions(), share: float = 0.1) -> list[Task]:  # noqa: B008
    """Return a user's sequence of tasks.

    >>> data = torch.eye(20), torch.arange(20) % 2
    >>> [(task.name, len(task.train), len(task.test)) for task in to_tasks([(data, data), data])]
    [('task-1', 20, 20), ('task-2', 18, 2)]
    """
    result = []
    for i, (name, task) in enumerate(_named(tasks)):
        match task:
            case Task():
                result.append(task)
            case {"train": train, "test": test}:
                result.append(_to_task(str(task.get("name", name)), train, test, reading))
            case list() if len(task) == 2 and _is_ambiguous(*task):
                raise SourceError(
                    f"{name}: a list of two may be inputs and labels, two batches, or training and test data; give a "
                    "tuple (inputs, labels) or (training data, test data), or a DataLoader of the batches"
                )
            case (train, test) if not are_labels(test) and not is_entries(task):
                result.append(_to_task(name, train, test, reading))
            case _:
                data, untransformed = _dataset_of(task, "train"), _dataset_of(task, "eval")
                whole = fix_order(to_examples(data, reading, name))
                tested = whole if untransformed is data else to_examples(untransformed, reading, name)
                order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(i))
                test, train = order.split([n := max(1, round(share * len(whole))), len(whole) - n])
                result.append(_to_task(name, whole.subset(train.sort()[0]), tested.subset(test.sort()[0]), reading))
    if not result:
        raise SourceError("there is no task to learn; give an iterable of (training data, test data)")
    return result


def _is_ambiguous(first: Any, second: Any) -> bool:
    """Whether a list of two may be inputs and labels, or two batches, and not only training and test data."""
    if are_labels(second):
        return isinstance(first, Tensor | np.ndarray)
    return all(isinstance(part, Batch | Mapping) or _is_labelled_batch(part) for part in (first, second))


def _is_labelled_batch(data: Any) -> bool:
    labels = data[-1] if isinstance(data, tuple | list) and data else None
    return isinstance(labels, Tensor) and labels.dim() > 0


def _to_task(name: str, train: Any, test: Any, reading: ReadOptions) -> Task:
    """Return a task from training and test data, or experiences with a ``dataset``."""
    learned = to_examples(_dataset_of(train, "train"), reading, name)
    tested = to_examples(_dataset_of(test, "eval"), reading, f"{name} (test)")
    classes = getattr(train, "classes_in_this_experience", None)
    if classes is None:
        classes = _classes(learned) | _classes(tested)
    if (least := min(classes, default=0)) < 0:
        raise SourceError(f"source {name!r}: label {least} is no class; give labels from 0, or {IGNORED} to ignore")
    return Task(name, learned, tested, tuple(sorted(map(int, classes))))


def _named(tasks: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the data of each task."""
    single = not isinstance(tasks, Sequence | Iterator) and hasattr(tasks, "__getitem__")
    match tasks:
        case {"train": _, "test": _}:
            raise SourceError("the tasks are a dict of one task; give a list of tasks: [task]")
        case Mapping():
            yield from ((str(name), task) for name, task in tasks.items())
            return
        case str() | Path() | DataLoader():
            single = True
        case tuple() if len(tasks) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in tasks):
            single = True
        case tuple() if len(tasks) == 2 and not any(isinstance(part, tuple | list | Mapping | Task) for part in tasks):
            raise SourceError(
                "the tasks are a tuple of two sets of data; for one task give [(training data, test data)], for two "
                "tasks a list: [first, second]"
            )
        case _ if single:  # unless indices give experiences, as those of a benchmark's stream do, and not examples
            single = not hasattr(next(iter(tasks), None), "dataset")
    if single or not (isinstance(tasks, Iterable) or hasattr(tasks, "train_stream")):
        raise SourceError(
            f"the tasks must be a list of tasks, got one {type(tasks).__name__}; give [(training data, test data)], or "
            "[data], of which a tenth is held out for testing"
        )
    every = _pair_streams(tasks) if hasattr(tasks, "train_stream") else tasks
    yield from ((f"task-{i + 1}", task) for i, task in enumerate([*_bounded(every)]))


def _bounded(tasks: Iterable[Any]) -> Iterator[Any]:
    """Yield the tasks of an iterable, which must end."""
    for i, task in enumerate(tasks):
        if i == batch_streams.MOST:
            raise SourceError(f"the tasks do not end within {i:,}; give a part, such as itertools.islice(tasks, 9)")
        yield task


def _pair_streams(benchmark: Any) -> list[Any]:
    """Return the (training, test) experiences of a benchmark; a single test experience is that of every task."""
    train, test = list(_bounded(benchmark.train_stream)), list(_bounded(getattr(benchmark, "test_stream", ())))
    if not test:
        return train
    if len(test) not in (1, len(train)):
        raise SourceError(
            f"the benchmark has {len(train)} training and {len(test)} test experiences; "
            "give a list of pairs (training experience, test experience)"
        )
    return [*zip(train, test * len(train) if len(test) == 1 else test, strict=True)]


def _dataset_of(data: Any, group: str) -> Any:
    """Return the data set of an Avalanche-shaped experience, with its transforms of a group; other data as they are."""
    inner = getattr(data, "dataset", None)
    if inner is not None and not isinstance(data, DataLoader | ExampleSet) and not hasattr(data, "__getitem__"):
        data = inner
    switches = all(callable(getattr(data, name, None)) for name in ("train", "eval"))
    return getattr(data, group)() if switches else data


def _classes(examples: ExampleSet) -> set[int]:
    """Return the class labels of examples, which are read if need be; none if labels are values or one per token."""
    known, result = examples.labels_of(), set[int]()
    for labels in [known] if known is not None else (batch.labels for batch in examples.batches(256)):
        if labels.is_floating_point() or labels.dim() != 1:
            return set()
        result |= set(labels.unique().tolist())
    return result - {IGNORED}
