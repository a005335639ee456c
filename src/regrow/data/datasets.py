"""Labelled examples in a user's data set, read while training; and tasks: pairs of training and test data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, default_collate

from regrow.core.errors import first_line
from regrow.core.objectives import IGNORED
from regrow.core.sources import Batch
from regrow.core.tasks import Examples, ExampleSet, ExamplesView, Task, batch_indices
from regrow.data import batch_forms, batch_streams
from regrow.data.batch_forms import DEFAULTS, ReadOptions, are_labels, check_input, check_labels, is_example_list
from regrow.data.batch_streams import BatchStream, explain_loader_errors
from regrow.data.batches import to_source
from regrow.data.halves import SourceError

HELD_OUT_FRACTION = 0.1  # of the training data of a task without test data, which are for testing


@dataclass(frozen=True)
class StreamedExamples:
    """The examples of a data set with ``len`` and indices, read and checked when they are needed."""

    dataset: Any  # entries are (input, label), with further parts ignored, or dicts that hold a label
    indices: Tensor | None = None  # the positions that belong to this set, ``[N]`` int64; ``None``: all
    workers: int = 0  # the number of processes that read ahead; 0: this one reads
    # (list of entries) → a batch, as :func:`regrow.data.batch_forms.to_batch` takes it; ``None``: torch's way
    collate: Callable[[list[Any]], Any] | None = None
    name: str = "data"  # what error messages call it
    reading: ReadOptions = DEFAULTS  # how batches are read

    def __len__(self) -> int:
        return len(self.dataset) if self.indices is None else len(self.indices)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Examples]:
        """Yield all examples in batches of ``size``, as :meth:`Examples.batches`; ``seed``: of order and workers."""
        loader = DataLoader(
            self.dataset,
            batch_sampler=[self._positions(part).tolist() for part in batch_indices(len(self), size, seed)],
            num_workers=self.workers,
            collate_fn=self._join,
            generator=torch.Generator().manual_seed(seed or 0),
        )
        for i, part in enumerate(explain_loader_errors(loader, self.name)):
            yield self._check(part, f"source {self.name!r}, batch {i}")

    def take(self, indices: Tensor) -> Examples:
        """Return the examples at ``indices``, in memory."""
        batches = [self._positions(indices).tolist()]
        # An iterable of one batch, so that errors of the data set's code are explained as they are for loaders.
        read = (self._join([self.dataset[i] for i in positions]) for positions in batches)
        return self._check(next(explain_loader_errors(read, self.name)), f"source {self.name!r}")

    def subset(self, indices: Tensor) -> "StreamedExamples":
        """Return the examples at ``indices`` as a set that is read in the same way."""
        return replace(self, indices=self._positions(indices))

    def labels_of(self) -> Tensor | None:
        """Return the labels of all examples from the data set's ``targets``; ``None`` if it has none."""
        labels = _find_targets(self.dataset)
        return labels if labels is None or self.indices is None else labels[self.indices]

    def _positions(self, indices: Tensor) -> Tensor:
        """Return the positions in the data set of the examples at ``indices`` of this set."""
        return indices if self.indices is None else self.indices[indices]

    def _join(self, entries: list[Any]) -> Examples:
        """Return entries of the data set as a batch of examples."""
        if self.collate is not None or isinstance(entries[0], dict):
            return batch_to_examples(
                batch_forms.to_batch((self.collate or default_collate)(entries), reading=self.reading)
            )
        inputs, labels = _stack_inputs([entry[0] for entry in entries]), _stack_labels([entry[1] for entry in entries])
        return Examples(inputs, batch_forms.to_next_tokens(inputs, labels, self.reading))

    def _check(self, examples: Examples, where: str) -> Examples:
        """Return examples as networks and losses take them, or raise SourceError; ``where`` names them in messages."""
        labels = check_labels(examples.labels, where, len(examples))
        return _make_examples(check_input(examples.inputs, where, self.reading.dtype), labels, where)


@dataclass(frozen=True)
class LoadedExamples:
    """The examples of batches without indices; their sizes and order are the loader's."""

    stream: Sequence[Batch]  # read anew in each pass

    def __len__(self) -> int:
        """Return the number of examples, which takes a pass over them."""
        return sum(len(batch_to_examples(batch)) for batch in self.stream)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Examples]:
        """Yield all examples in the loader's batches; ``size`` and ``seed`` have no effect."""
        return map(batch_to_examples, self.stream)

    def take(self, indices: Tensor) -> Examples:
        """Return the examples at ``indices``, in memory; reads as far as the last of them."""
        parts, needed = [], int(indices.max()) + 1
        for part in self.batches(0):
            parts.append(part)
            needed -= len(part)
            if needed <= 0:
                break
        return join_examples(parts).take(indices)

    subset = take

    def labels_of(self) -> None:
        """Return ``None``: labels are known only once the examples are read."""


def to_examples(data: Any, reading: ReadOptions = DEFAULTS, name: str = "data") -> ExampleSet:
    """Return a user's data as labelled examples, or raise SourceError; those that have indices are read when needed."""
    if isinstance(data, ExampleSet):
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        where = f"source {name!r}"
        size = batch_forms.count_examples([data[0]], where)
        labels = check_labels(batch_forms.to_next_tokens(*data, reading), where, size)
        return _make_examples(check_input(data[0], where, reading.dtype), labels, where)
    if isinstance(data, DataLoader) and _takes_each_once(data):
        collate = None if data.collate_fn is default_collate else data.collate_fn
        return StreamedExamples(data.dataset, None, data.num_workers, collate, name, reading)
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "column_names")
    is_batches = isinstance(data, Sequence | Tensor | np.ndarray | dict | DataLoader)
    if is_example_list(data) or (indexed and not is_batches):
        return StreamedExamples(data, name=name, reading=reading)
    source = to_source(data, name, reading)
    if isinstance(source.batches, BatchStream):
        return LoadedExamples(source.batches)
    return join_examples(map(batch_to_examples, source))


def fix_order(examples: ExampleSet) -> ExampleSet:
    """Return examples in the same order each time: those of a loader, which may shuffle, are read into memory."""
    if isinstance(examples, ExamplesView):
        return replace(examples, base=fix_order(examples.base))
    return join_examples(examples.batches(0)) if isinstance(examples, LoadedExamples) else examples


def batch_to_examples(batch: Batch) -> Examples:
    """Return a batch as examples: its tensors by name, or else its positional inputs; SourceError without labels."""
    if batch.labels is None:
        where = batch.where or "a batch"
        raise SourceError(f"learning needs labels, and {where} has none; give batches as (inputs, labels)")
    named = {name: value for name, value in batch.kwargs.items() if isinstance(value, Tensor)}
    inputs = named or (batch.args[0] if len(batch.args) == 1 else tuple(batch.args))
    return _make_examples(inputs, batch.labels, batch.where)


def join_examples(parts: Iterable[Examples]) -> Examples:
    """Return several sets of examples as one; SourceError unless their inputs have the same structure and shapes."""
    parts = list(parts)
    try:
        inputs, labels = tree_map(lambda *tensors: torch.cat(tensors), *((part.inputs, part.labels) for part in parts))
        return Examples(inputs, labels, parts[0].where.partition(", batch")[0])
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        odd = next((part for part in parts if _form(part) != _form(parts[0])), parts[-1])
        problem = f"is unlike the first batch, with which it is joined: {first_line(error)}"
        raise SourceError(f"{odd.where or 'a batch'} {problem}; give batches of one form") from error


def _form(examples: Examples) -> list[Any]:
    """Return what sets of examples must have in common (==) to be joined: the structure and shapes of their tensors."""
    leaves, structure = tree_flatten((examples.inputs, examples.labels))
    return [structure, *(getattr(leaf, "shape", ())[1:] for leaf in leaves)]


def _make_examples(inputs: Any, labels: Tensor, where: str) -> Examples:
    """Return inputs and labels as examples, or raise SourceError that says what does not fit."""
    try:
        return Examples(inputs, labels, where)
    except (ValueError, TypeError) as error:
        raise SourceError(f"{where or 'a batch'} holds {error}") from error


def _to_input(value: Any) -> Any:
    """Return an input as a tensor, dicts and tuples as they are; bytes become 0 to 1, PIL's images ``[C, H, W]``."""
    if isinstance(value, dict | tuple):
        return value
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.array(value))
        if value.dtype == torch.uint8 and value.dim() in (2, 3):
            value = value.unsqueeze(0) if value.dim() == 2 else value.movedim(-1, 0)
    return value.float() / 255 if value.dtype == torch.uint8 else value


def _stack_inputs(inputs: list[Any]) -> Any:
    """Return inputs as a batch: tensors and images by :func:`_to_input`, ``[N, ...]``; tuples and dicts by part."""
    # Tensors of one dtype are stacked first and converted in one go.
    if not all(isinstance(x, Tensor) for x in inputs) or len({x.dtype for x in inputs}) > 1:
        inputs = [_to_input(x) for x in inputs]
    stacked = default_collate(inputs)
    return _to_input(stacked) if isinstance(stacked, Tensor) else stacked


def _stack_labels(labels: list[Any]) -> Tensor:
    """Return labels as a batch, ``[N, ...]`` int64 or float32."""
    if all(isinstance(label, int | float) for label in labels):
        stacked = torch.tensor(labels)
    else:
        stacked = torch.stack([torch.as_tensor(label) for label in labels])
    return stacked.float() if stacked.is_floating_point() else stacked.long()


def _find_targets(dataset: Any) -> Tensor | None:
    """Return the labels in ``targets`` of a data set or, of a subset, those of its entries; ``None`` if it has none."""
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and indices is not None:
        labels = _find_targets(inner)
        return None if labels is None else labels[torch.as_tensor(indices)]
    targets = getattr(dataset, "targets", None)
    if targets is None or len(targets) != len(dataset) or not len(dataset):
        return None
    try:
        labels = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.dim() != 1 or labels.is_floating_point():
        return None
    changes = (dataset, getattr(dataset, "transforms", None))  # torchvision's change labels where they read an entry
    return None if any(getattr(one, "target_transform", None) for one in changes) else labels


def _takes_each_once(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives each entry of its data set once per pass, in order or shuffled, in batches of one size."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler or type(sampler) not in (RandomSampler, SequentialSampler):
        return False
    replaces = isinstance(sampler, RandomSampler) and sampler.replacement
    return not replaces and not loader.drop_last and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]


def to_tasks(tasks: Any, reading: ReadOptions = DEFAULTS) -> list[Task]:
    """Return a user's sequence of tasks: pairs of training and test data, or data of which a tenth is held out.

    Raises SourceError if there is none, or data cannot be read.

    >>> data = torch.eye(20), torch.arange(20) % 2
    >>> [(task.name, len(task.train), len(task.test)) for task in to_tasks([(data, data), data])]
    [('task-1', 20, 20), ('task-2', 18, 2)]
    """
    result = []
    for i, (name, task) in enumerate(_named_tasks(tasks)):
        match task:
            case Task():
                result.append(task)
            case [_, _] if isinstance(task, list) and not is_example_list(task):
                problem = f"{name}: a list of two may be inputs and labels, two batches, or training and test data"
                remedy = "a tuple (inputs, labels) or (training data, test data), or a DataLoader of the batches"
                raise SourceError(f"{problem}; give {remedy}")
            case (train, test) if isinstance(task, tuple) and not are_labels(test):
                result.append(_to_task(name, train, test, reading))
            case _:
                whole = fix_order(to_examples(task, reading, name))
                order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(i))
                held_out = max(1, round(HELD_OUT_FRACTION * len(whole)))
                test, train = (part.sort().values for part in order.split([held_out, len(whole) - held_out]))
                result.append(_to_task(name, whole.subset(train), whole.subset(test), reading))
    if not result:
        raise SourceError("there is no task to learn; give an iterable of (training data, test data)")
    return result


def _to_task(name: str, train: Any, test: Any, reading: ReadOptions) -> Task:
    """Return a task of a user's training and test data, with the classes of both; SourceError for negative labels."""
    learned = to_examples(train, reading, name)
    tested = to_examples(test, reading, f"{name} (test)")
    classes = sorted(_find_classes(learned) | _find_classes(tested))
    if classes and classes[0] < 0:
        raise SourceError(
            f"source {name!r}: label {classes[0]} is no class; give labels from 0, or {IGNORED} to ignore"
        )
    return Task(name, learned, tested, tuple(classes))


def _named_tasks(tasks: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the data of each task; SourceError if the data are those of a single task, or do not end."""
    match tasks:
        case {"train": _, "test": _}:
            raise SourceError("the tasks are a dict of one task; give a list of tasks: [(training data, test data)]")
        case Mapping():
            yield from ((str(name), task) for name, task in tasks.items())
            return
        case str() | Path() | DataLoader():
            single = True
        case tuple() if len(tasks) == 2:  # (inputs, labels), unless a part is a task
            single = not any(isinstance(part, tuple | list | Mapping | Task) for part in tasks)
        case _:
            single = not isinstance(tasks, Sequence | Iterator) and hasattr(tasks, "__getitem__")
    if single or not isinstance(tasks, Iterable):
        remedy = "give [(training data, test data)], or [data], of which a tenth is held out for testing"
        raise SourceError(f"the tasks must be a list of tasks, got one {type(tasks).__name__}; {remedy}")
    for i, task in enumerate(tasks):
        if i == batch_streams.MAX_BATCHES:
            raise SourceError(f"the tasks do not end within {i:,}; give a part, such as itertools.islice(tasks, 9)")
        yield f"task-{i + 1}", task


def _find_classes(examples: ExampleSet) -> set[int]:
    """Return the class labels of examples, which are read if need be; none if labels are values or one per token."""
    known, result = examples.labels_of(), set[int]()
    parts = (batch.labels for batch in examples.batches(256)) if known is None else [known]
    for labels in parts:
        if labels.is_floating_point() or labels.dim() != 1:
            return set()
        result |= set(labels.unique().tolist())
    return result - {IGNORED}
