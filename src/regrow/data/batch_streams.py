"""Batches that are read when they are used: any iterable, checked and counted; and small batches joined to larger ones.

An iterable that can be read only once is kept in memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from regrow.core.errors import InputError, first_line
from regrow.core.limits import available_memory
from regrow.core.sources import Batch, Source, generators_of, preserve_random_state
from regrow.data.batch_forms import DEFAULTS, ReadOptions, check_batch, to_batch
from regrow.data.halves import SourceError

MAX_BATCHES = 10_000  # batches of an iterable without a length that are read before it is taken for endless
MAX_CLAIMED = 1_000_000  # batches that a loader may say it has, unless torch counts them


class LazyBatches(Sequence[Batch]):
    """Base class of batches that are read when they are asked for; subclasses have ``__iter__`` and ``__len__``."""

    def read(self, positions: range) -> Iterable[Batch]:
        """Return the batches at ``positions`` (indices from 0), in order; by default, those before are read too."""
        return islice(iter(self), positions.start, positions.stop, positions.step)

    def __getitem__(self, index: Any) -> Any:
        """Read a batch, or a list of batches for a slice."""
        if isinstance(index, slice):
            return list(self.read(range(*index.indices(len(self)))))
        position = range(len(self))[index]
        for batch in self.read(range(position, position + 1)):
            return batch
        raise IndexError(index)


@dataclass(frozen=True)
class BatchStream(LazyBatches):
    """The batches of a user's loader, read and checked anew each time, never all in memory.

    Raises SourceError if a batch cannot be read, or their number is not what it was.
    """

    loader: Iterable[Any]  # gives the batches in each pass
    name: str  # the source's, in messages
    reading: ReadOptions = DEFAULTS
    number: int | None = None  # of batches; ``None``: what the loader says
    checked: bool = False  # the loader is a list of batches that were checked

    def __iter__(self) -> Iterator[Batch]:
        if self.checked:
            yield from self.loader
            return
        first, i = None, -1
        for i, item in enumerate(explain_loader_errors(self.loader, self.name)):
            if i == self.number:
                raise self._count_error(f"more than {i}")
            where = f"source {self.name!r}, batch {i}"
            batch = check_batch(to_batch(item, where, self.reading), where, self.reading.dtype, first)
            first = first or batch
            if not isinstance(self.loader, list | tuple | DataLoader):  # which may use its tensors again
                args, kwargs, labels = tree_map_only(
                    Tensor, torch.clone, (batch.args, dict(batch.kwargs), batch.labels)
                )
                batch = Batch(args, kwargs, labels, where)
            yield batch
        if self.number is not None and i + 1 < self.number:
            raise self._count_error(str(i + 1))

    def __len__(self) -> int:
        """Return the number of batches; a loader that does not say is counted by reading it."""
        if self.number is not None:
            return self.number
        length = find_length(self.loader)
        return sum(1 for _ in self.loader) if length is None else length

    def _count_error(self, now: str) -> SourceError:
        """Return the error for a loader that gives another number of batches (``now``) than when it was first read."""
        counts = f"had {self.number} batches when it was first read, and has {now} now"
        return SourceError(f"source {self.name!r} {counts}; give the same number each time, or a list of batches")


def read_stream(data: Iterable[Any], name: str, reading: ReadOptions) -> BatchStream:
    """Return the batches of an iterable, after reading it once to count and check them; SourceError if it fails.

    Of a ``DataLoader`` that torch counts, only the first batch is read here. What can be read only once is kept.
    """
    claimed = find_length(data)
    if isinstance(data, DataLoader) and _is_counted(data):
        stream = BatchStream(data, name, reading, claimed)
        next(iter(stream), None)
        return stream
    stream = BatchStream(data, name, reading)
    if isinstance(data, list | tuple):
        return _hold_in_memory(list(stream), name)
    remedy = "give a part of it, as list(itertools.islice(loader, 1000)) does, or an iterable that ends and has a len()"
    if claimed is not None and claimed > MAX_CLAIMED:
        problem = f"says that it has {claimed:,} batches, of at most {MAX_CLAIMED:,}"
        raise SourceError(f"source {name!r} {problem}; {remedy}")
    limit, once = max(claimed or 0, MAX_BATCHES), isinstance(data, Iterator)
    # Batches are kept while half of the free memory has room: needed if they can be read only once.
    batches, free, number = list[Batch](), (available_memory() or 2**33) // 2, 0
    with nullcontext() if once else preserve_random_state(generators_of(data)):
        for number, batch in enumerate(stream, start=1):
            if number > limit:
                raise SourceError(f"source {name!r} does not end within {limit:,} batches; {remedy}")
            leaves = tree_leaves((batch.args, dict(batch.kwargs), batch.labels))
            free -= sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
            if free >= 0:
                batches.append(batch)
            else:
                batches.clear()
        if not once or free < 0:  # what gives nothing when it is read again can be read only once
            once = next(explain_loader_errors(data, name), None) is None
    if not once:
        return replace(stream, number=number)
    if free < 0:
        problem = f"can be read only once, and its {number} batches do not fit into half of the free memory"
        raise SourceError(f"source {name!r} {problem}; give a DataLoader, or an iterable that starts again")
    return _hold_in_memory(batches, name)


def _hold_in_memory(batches: list[Batch], name: str) -> BatchStream:
    """Return checked batches as a stream that does not check them again."""
    return BatchStream(batches, name, number=len(batches), checked=True)


def find_length(data: Any) -> int | None:
    """Return the ``len`` of an iterable; ``None`` if it has none, or raises an error."""
    try:
        return len(data)
    except Exception:  # whatever a user's __len__ raises
        return None


def explain_loader_errors(data: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the items of an iterable; an error of its own code becomes a SourceError with the number of the batch."""
    items: Iterator[Any] | None = None
    for i in count():
        try:
            items = iter(data) if items is None else items
            item = next(items)
        except StopIteration:
            return
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            if isinstance(error, InputError):
                problem = first_line(error)
            elif problem.count("Caught ") and len(lines := str(error).strip().splitlines()) > 1:
                problem = f"{lines[-1]:.200}"  # of the traceback of a worker
            raise SourceError(f"source {name!r}, batch {i} cannot be read: {problem}; mend the loader") from error
        yield item


def _is_counted(loader: DataLoader[Any]) -> bool:
    """Whether torch itself counts the batches of a loader: those of its samplers over a data set with indices."""
    torch_counts = type(loader).__iter__ is DataLoader.__iter__ and type(loader).__len__ is DataLoader.__len__
    indexed = not isinstance(loader.dataset, IterableDataset) and type(loader.batch_sampler) is BatchSampler
    return torch_counts and indexed and type(loader.sampler).__module__.startswith("torch.utils.data")


def join_batches(source: Source, most: int, shards: int = 1) -> Source:
    """Return a source whose consecutive batches are joined to at most ``most`` examples each.

    Batches are joined where their inputs have the same shapes, but for the number of examples in the first dimension.
    ``shards``: the number of processes that take the batches in turn; batch ``i`` of the result joins batches of shard
    ``i % shards`` alone, so that each keeps its examples. Where they would join unevenly, the source stays as it is; as
    does a user's loader, which may not fit into memory.

    >>> source = Source("news", [Batch((torch.tensor([[i]]),)) for i in range(5)])
    >>> [batch.args[0].flatten().tolist() for batch in join_batches(source, 2, shards=2)]
    [[0, 2], [1, 3], [4]]
    """
    if most <= 1 or isinstance(source.batches, BatchStream):
        return source
    batches = list(source)
    parts = [list(_join_alike(batches[shard::shards], most)) for shard in range(shards)]
    sizes = [len(part) for part in parts]
    # Batches of several shapes join unevenly: dealt out by turns, they would come to other shards than their own.
    if sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:
        return source
    return replace(source, batches=[part[i] for i in range(sizes[0]) for part in parts if i < len(part)])


@dataclass(frozen=True)
class BatchChain(LazyBatches):
    """The batches of several sources, one source after the other, each read when its batches are asked for."""

    parts: tuple[Sequence[Batch], ...]  # the batches of each source

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, positions: range) -> Iterator[Batch]:
        """Yield the batches at ``positions`` (indices from 0), in order; of each source, only those needed are read."""
        begin = 0
        for part in self.parts:
            inside = [i - begin for i in positions if begin <= i < begin + len(part)]
            if inside:
                yield from part[inside[0] : inside[-1] + 1 : positions.step]
            begin += len(part)


def join_sources(sources: Iterable[Source], most: int) -> BatchChain:
    """Return the batches of several sources in turn; of those in memory, joined to at most ``most`` examples each.

    >>> first, second = (Source(name, [Batch((torch.tensor([[i]]),)) for i in range(3)]) for name in ("a", "b"))
    >>> [batch.args[0].flatten().tolist() for batch in join_sources([first, second], 2)]
    [[0, 1], [2], [0, 1], [2]]
    """
    parts = (
        join_batches(source, most).batches if isinstance(source.batches, list | tuple) else source.batches
        for source in sources
    )
    return BatchChain(tuple(parts))


def _join_alike(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Yield batches in order, consecutive ones of the same :func:`form_of` joined to at most ``most`` examples."""
    group: list[Batch] = []
    for batch in batches:
        size = sum(map(_count_rows, group)) + _count_rows(batch)
        alike = group and form_of(batch) == form_of(group[0]) and all(map(is_joinable, (batch, group[0])))
        if group and (size > most or not alike):
            yield concatenate_batches(group)
            group = []
        group.append(batch)
    if group:
        yield concatenate_batches(group)


def _row_counts(*values: object) -> list[int]:
    """Return the lengths of those values that are tensors with dimensions."""
    return [len(value) for value in values if isinstance(value, Tensor) and value.dim()]


def _count_rows(batch: Batch) -> int:
    """Return how many examples a batch has: the length of its first tensor; 1 without tensors."""
    return next(iter(_row_counts(*batch.args, *batch.kwargs.values())), 1)


def form_of(batch: Batch) -> list[Any]:
    """Return names, dtypes and shapes without the first dimension, which are equal if two batches can be joined."""
    result: list[Any] = []  # a new object() equals no other: batches with other inputs are not joined
    for key, value in [*enumerate(batch.args), *batch.kwargs.items(), ("labels", batch.labels)]:
        if isinstance(value, Tensor) and value.dim():
            result.append((key, value.dtype, value.shape[1:]))
        else:
            result.append((key, value if value is None or isinstance(value, bool | int | float | str) else object()))
    return result


def is_joinable(batch: Batch) -> bool:
    """Whether all tensors of a batch have its examples in their first dimension (position ids of all do not).

    >>> ids, positions = torch.zeros(2, 4), torch.arange(4)[None]
    >>> is_joinable(Batch((ids,))), is_joinable(Batch((ids,), {"position_ids": positions}))
    (True, False)
    """
    return len({*_row_counts(*batch.args, *batch.kwargs.values(), batch.labels)}) <= 1


def concatenate_batches(batches: Sequence[Batch]) -> Batch:
    """Return several batches of one form as one, with tensors concatenated; other values are those of the first."""
    if len(batches) == 1:
        return batches[0]

    def join(*values: Any) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

    args, kwargs, labels = tree_map(join, *((batch.args, dict(batch.kwargs), batch.labels) for batch in batches))
    return Batch(args, kwargs, labels, batches[0].where)
