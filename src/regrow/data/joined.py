"""Join small batches of a source into larger ones, which networks compute faster."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, overload

import torch
from torch import Tensor

from regrow.core.sources import Batch, Source


def join_batches(source: Source, most: int, shards: int = 1) -> Source:
    """Return a source whose consecutive batches are joined to at most ``most`` examples each.

    Batches are joined where their inputs have the same shapes, but for the number of examples in the first dimension.
    With several shards, batch ``i`` of the result holds batches of shard ``i % shards`` alone, so that the shards hold
    the same examples.

    Args:
        source: The source, read in whole.
        most: The most examples in a batch; larger batches stay as they are.
        shards: Into how many parts the source will be split.

    >>> one = Source("news", [Batch((torch.tensor([[i]]),)) for i in range(5)])
    >>> [batch.args[0].flatten().tolist() for batch in join_batches(one, 2, shards=2)]
    [[0, 2], [1, 3], [4]]
    """
    if most <= 1:
        return source
    batches = list(source)
    parts = [list(_joined(batches[shard::shards], most)) for shard in range(shards)]
    sizes = [len(part) for part in parts]
    if sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:  # batches of several shapes
        return source
    return replace(source, batches=[part[i] for i in range(sizes[0]) for part in parts if i < len(part)])


@dataclass(frozen=True)
class BatchChain(Sequence[Batch]):
    """The batches of several sources in turn; those of a user's loader are read anew each time, never all in memory.

    Args:
        parts: The batches of each source.
    """

    parts: tuple[Sequence[Batch], ...]

    def __iter__(self) -> Iterator[Batch]:
        return chain.from_iterable(self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return list(islice(self, *index.indices(len(self))))
        place = range(len(self))[index]
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(index)


def join_sources(sources: Iterable[Source], most: int) -> BatchChain:
    """Return the batches of several sources in turn, joined as by :func:`join_batches` where they are in memory.

    Args:
        sources: The sources.
        most: The most examples in a joined batch.

    >>> one, other = (Source(name, [Batch((torch.tensor([[i]]),)) for i in range(3)]) for name in ("a", "b"))
    >>> [batch.args[0].flatten().tolist() for batch in join_sources([one, other], 2)]
    [[0, 1], [2], [0, 1], [2]]
    """
    return BatchChain(
        tuple(
            join_batches(source, most).batches if isinstance(source.batches, list | tuple) else source.batches
            for source in sources
        )
    )


def _joined(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    own: list[Batch] = []
    for batch in batches:
        size = sum(map(count_examples, own)) + count_examples(batch)
        if own and (size > most or form_of(batch) != form_of(own[0]) or not all(map(is_joinable, (batch, own[0])))):
            yield concatenate(own)
            own = []
        own.append(batch)
    if own:
        yield concatenate(own)


def count_examples(batch: Batch) -> int:
    """Return how many examples a batch has: the length of its first tensor.

    Args:
        batch: The batch.
    """
    return next((len(one) for one in (*batch.args, *batch.kwargs.values()) if isinstance(one, Tensor) and one.dim()), 1)


def form_of(batch: Batch) -> list[Any]:
    """Return what batches must have in common to be joined; those with inputs other than tensors and numbers never do.

    Args:
        batch: The batch.
    """
    values = [*enumerate(batch.args), *batch.kwargs.items(), ("labels", batch.labels)]
    return [(key, _kind(one)) for key, one in values]


def _kind(value: object) -> object:
    """Return what inputs must have in common to be joined; an object of its own for those that cannot be."""
    if isinstance(value, Tensor) and value.dim():
        return value.dtype, value.shape[1:]
    return value if value is None or isinstance(value, bool | int | float | str) else object()


def is_joinable(batch: Batch) -> bool:
    """Whether all tensors of a batch have its examples in their first dimension (position ids of all do not).

    Args:
        batch: The batch.

    >>> ids, positions = torch.zeros(2, 4), torch.arange(4)[None]
    >>> is_joinable(Batch((ids,))), is_joinable(Batch((ids,), {"position_ids": positions}))
    (True, False)
    """
    values = (*batch.args, *batch.kwargs.values(), batch.labels)
    return len({len(one) for one in values if isinstance(one, Tensor) and one.dim()}) <= 1


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return several batches as one; what is no tensor is that of the first.

    Args:
        batches: The batches, of the same inputs; their tensors differ in the first dimension alone.
    """
    first = batches[0]
    if len(batches) == 1:
        return first

    def joined(values: Sequence[Any]) -> Any:
        return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]

    args = tuple(map(joined, zip(*(one.args for one in batches), strict=True)))
    kwargs = {key: joined([one.kwargs[key] for one in batches]) for key in first.kwargs}
    return Batch(args, kwargs, joined([one.labels for one in batches]), first.where)
