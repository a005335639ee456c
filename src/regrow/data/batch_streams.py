"""Any iterable of batches, read anew each time: counted, checked, and kept in memory if it can be read only once."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, default_collate

from regrow.core.errors import first_line
from regrow.core.limits import available_memory
from regrow.core.sources import Batch, generators_of, preserve_random_state
from regrow.data.batch_forms import check_batch, is_entry, to_batch
from regrow.data.errors import SourceError

MOST = 10_000
"""How many batches of an iterable without a length are read before it is taken for endless."""
MOST_SAID = 1_000_000
"""The largest number of batches that a loader may say it has, unless torch counts them."""
FEW = 100
"""How many batches of an endless iterable are read, at least, where a command needs only some."""


@dataclass(frozen=True)
class BatchStream(Sequence[Batch]):
    """The batches of a user's loader, read anew each time and never all in memory.

    Args:
        loader: The iterable of batches, which starts again each time it is read.
        name: The name of the source.
        shift: As :attr:`regrow.data.batches.ReadOptions.shift`.
        dtype: The floating format to which inputs are cast; ``None``: they keep theirs.
        number: The number of batches; ``None``: what the loader says.
        checked: Whether the loader is a list of batches that were checked.

    Raises:
        SourceError: While it is read: if a batch cannot be used, or there are not ``number`` batches.
    """

    loader: Iterable[Any]
    name: str
    shift: bool = False
    dtype: torch.dtype | None = None
    number: int | None = None
    checked: bool = False

    def __iter__(self) -> Iterator[Batch]:
        if self.checked:
            yield from self.loader
            return
        first, i = None, -1
        for i, item in enumerate(guarded(self.loader, self.name)):
            if i == self.number:
                raise SourceError(self._miscounted(f"more than {i}"))
            where = f"source {self.name!r}, batch {i}"
            batch = check_batch(to_batch(item, where, self.shift), where, self.dtype, first)
            first = first or batch
            yield batch if isinstance(self.loader, list | tuple | DataLoader) else _copied(batch)
        if self.number is not None and i + 1 < self.number:
            raise SourceError(self._miscounted(str(i + 1)))

    def __len__(self) -> int:
        """Return the number of batches; a loader that does not say is counted by reading it."""
        if self.number is not None:
            return self.number
        known = length_of(self.loader)
        return sum(1 for _ in self.loader) if known is None else known

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Read up to one batch, or a list of batches for a slice."""
        if isinstance(index, slice):
            return list(islice(self, *index.indices(len(self))))
        place = range(len(self))[index] if index < 0 else index
        batch = next(islice(iter(self), place, None), None)
        if batch is None:
            raise IndexError(f"source {self.name!r} has no batch {index}")
        return batch

    def _miscounted(self, now: str) -> str:
        return (
            f"source {self.name!r} had {self.number} batches when it was first read, and has {now} now; give the same "
            "number each time, or a list of batches"
        )


def read_stream(
    data: Iterable[Any], name: str, size: int, shift: bool = False, dtype: torch.dtype | None = None, need: int = 0
) -> BatchStream:
    """Return the batches of an iterable, after reading it once to count and check them.

    Of a ``DataLoader`` that torch counts, only the first batch is read here. An iterable that can be read only once is
    kept in memory.

    Args:
        data: The iterable, of batches or of single examples.
        name: The name of the source.
        size: Examples per batch, where the iterable gives single examples.
        shift: As :attr:`regrow.data.batches.ReadOptions.shift`.
        dtype: The floating format to which inputs are cast; ``None``: they keep theirs.
        need: How many batches are needed, if the iterable does not end; 0: all.

    Raises:
        SourceError: If it is empty or endless, a batch cannot be used, or it can be read once and memory is too small.
    """
    said = length_of(data)
    if isinstance(data, DataLoader) and _is_counted(data):
        stream = BatchStream(data, name, shift, dtype, said)
        next(iter(stream), None)
        return stream
    if isinstance(data, IterableDataset):
        data = _EntryGroups(data, size)
    stream = BatchStream(data, name, shift, dtype)
    if isinstance(data, list | tuple):
        return _of_checked(list(stream), name)
    if said is not None and said > MOST_SAID:
        raise _endless(name, f"says that it has {said:,} batches, of at most {MOST_SAID:,}")
    most, once = max(said or 0, need, FEW) if need else max(said or 0, MOST), isinstance(data, Iterator)
    with nullcontext() if once else preserve_random_state(*generators_of(data)):
        kept, number = _read(stream, most, need)
        if number is not None and not (once and kept is not None):
            once = next(guarded(data, name), None) is None
    if number is None:
        if not need or kept is None:
            raise _endless(name, f"does not end within {most:,} batches")
        warnings.warn(f"source {name!r} does not end: its first {len(kept)} batches are used", stacklevel=2)
    elif not once:
        return replace(stream, number=number)
    elif kept is None:
        raise SourceError(
            f"source {name!r} can be read only once, and its {number} batches do not fit into half of the free memory; "
            "give a DataLoader, or an iterable that starts again"
        )
    return _of_checked(kept, name)


def _of_checked(batches: list[Batch], name: str) -> BatchStream:
    return BatchStream(batches, name, number=len(batches), checked=True)


def _endless(name: str, problem: str) -> SourceError:
    remedy = "give a part of it, for example list(itertools.islice(loader, 1000))"
    return SourceError(f"source {name!r} {problem}; {remedy}, or an iterable that ends and has a len()")


def length_of(data: Any) -> int | None:
    """Return what ``len`` says of an iterable; ``None`` if it cannot.

    Args:
        data: The iterable.
    """
    try:
        return len(data)
    except Exception:  # whatever a user's __len__ raises
        return None


def guarded(data: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the items of an iterable; an error of its own code names the batch.

    Args:
        data: The iterable.
        name: The name of the source.

    Raises:
        SourceError: If an item cannot be read.
    """
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
            problem = f"{type(error).__name__}: {first_line(error):.200}"
            if isinstance(error, SourceError):
                problem = first_line(error)
            elif problem.count("Caught ") and len(lines := str(error).strip().splitlines()) > 1:
                problem = f"{lines[-1]:.200}"  # of the traceback of a worker
            raise SourceError(f"source {name!r}, batch {i} cannot be read: {problem}; mend the loader") from error
        yield item


def _read(stream: BatchStream, most: int, need: int) -> tuple[list[Batch] | None, int | None]:
    """Read an iterable once.

    Returns:
        Its batches, unless they take more than half of the free memory; and their number, unless there are more than
        ``most``, or than ``need`` that fill the memory.
    """
    kept: list[Batch] | None = []
    free, number = (available_memory() or 2**33) // 2, 0
    for batch in stream:
        if number == most:
            return kept, None
        number += 1
        if kept is not None:
            kept.append(batch)
            free -= sum(leaf.nbytes for leaf in _tensors(batch))
            if free < 0 and need and number >= need:
                return kept, None
            kept = kept if free >= 0 else None
    return kept, number


def _tensors(batch: Batch) -> list[Tensor]:
    leaves = tree_leaves((batch.args, dict(batch.kwargs), batch.labels))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _copied(batch: Batch) -> Batch:
    """Return a batch with copies of its tensors, which a loader may use again for the next batch."""
    return replace(batch, args=_copy(batch.args), kwargs=_copy(batch.kwargs), labels=_copy(batch.labels))


def _copy(value: Any) -> Any:
    match value:
        case Tensor():
            return value.clone()
        case dict():
            return {key: _copy(part) for key, part in value.items()}
        case list() | tuple() if not hasattr(value, "_fields"):
            return type(value)(map(_copy, value))
    return value


@dataclass(frozen=True)
class _EntryGroups:
    """The single examples of an iterable data set as batches; what gives batches is left as it is."""

    items: Iterable[Any]
    size: int

    def __iter__(self) -> Iterator[Any]:
        items = iter(self.items)
        for first in items:
            if not is_entry(first):
                yield first
                continue
            yield default_collate([first, *islice(items, self.size - 1)])


def _is_counted(loader: DataLoader[Any]) -> bool:
    """Whether torch itself counts the batches of a loader: those of its samplers over a data set with indices."""
    plain = type(loader).__iter__ is DataLoader.__iter__ and type(loader).__len__ is DataLoader.__len__
    indexed = not isinstance(loader.dataset, IterableDataset) and type(loader.batch_sampler) is BatchSampler
    return plain and indexed and type(loader.sampler).__module__.startswith("torch.utils.data")
