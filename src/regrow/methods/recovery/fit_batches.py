"""The data of a refit in a few batches, small enough that what lies between two layers takes little memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from regrow.sources import Batch

ELEMENTS, BATCHES = 2048, 16
"""The fewest elements of inputs (tokens of text) that run together, unless there are fewer in all; and into how many
batches the data are divided at most."""


@dataclass(frozen=True)
class FitBatch:
    """Text or images that run through the networks together, and the parts of the data that they belong to.

    Args:
        batch: The inputs.
        parts: Per stretch of the batch, in order, the number of its part, and the fraction of the batch at which it
            ends.
    """

    batch: Batch
    parts: tuple[tuple[int, float], ...]


def split_parts(parts: Sequence[Sequence[Batch]], elements: int = ELEMENTS, most: int = BATCHES) -> list[FitBatch]:
    """Return the data in larger batches, which may hold the end of one part and the beginning of the next.

    Args:
        parts: The batches of each part of the data.
        elements: The fewest elements of their first inputs (tokens of text) in a batch.
        most: The largest number of batches.

    >>> text = [Batch((torch.zeros(1, 4),))] * 3
    >>> [one.parts for one in split_parts([text, text[:1]], elements=8)]
    [((0, 1.0),), ((0, 0.5), (1, 1.0))]

    Raises:
        ValueError: If inputs differ in a dimension other than the first.
    """
    every = [(part, batch) for part, batches in enumerate(parts) for batch in batches]
    check_lengths([batch for _, batch in every])
    sizes = [_size(batch) for _, batch in every]
    least = max(elements, -(-sum(count for _, count in sizes) // most))
    groups: list[list[int]] = [[]]
    for i in range(len(every)):
        if sum(sizes[j][1] for j in groups[-1]) >= least:
            groups.append([])
        groups[-1].append(i)
    result = []
    for group in groups:
        counts = {part: sum(sizes[i][0] for i in own) for part, own in groupby(group, lambda i: every[i][0])}
        ends = [end / sum(counts.values()) for end in accumulate(counts.values())]
        result.append(FitBatch(joined([every[i][1] for i in group]), tuple(zip(counts, ends, strict=True))))
    return result


def _size(batch: Batch) -> tuple[int, int]:
    """Return how many examples and elements the first tensor of a batch has; 1 without a tensor."""
    inputs = [*batch.args, *batch.kwargs.values()]
    first = next((one for one in inputs if isinstance(one, Tensor) and one.dim()), torch.zeros(1))
    return len(first), first.numel()


def joined(batches: Sequence[Batch]) -> Batch:
    """Concatenate several batches into one.

    Args:
        batches: The batches; their tensors may differ in the first dimension only.

    >>> joined([Batch((torch.zeros(1, 3),)), Batch((torch.ones(2, 3),))]).args[0].shape
    torch.Size([3, 3])

    Raises:
        ValueError: If their inputs differ in a dimension other than the first.
    """
    check_lengths(batches)

    def one(values: Sequence[Any]) -> Any:
        return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]

    first = batches[0]
    args = tuple(one([batch.args[i] for batch in batches]) for i in range(len(first.args)))
    return Batch(args, {key: one([batch.kwargs[key] for batch in batches]) for key in first.kwargs})


def check_lengths(batches: Sequence[Batch]) -> None:
    """Raise ValueError if inputs of batches differ in a dimension other than the first.

    Args:
        batches: The batches.
    """
    first = batches[0]
    every = [[batch.args[i] for batch in batches] for i in range(len(first.args))]
    every += [[batch.kwargs[key] for batch in batches] for key in first.kwargs]
    for values in every:
        shapes = {tuple(value.shape[1:]) for value in values if isinstance(value, Tensor)}
        if len(shapes) > 1:
            raise ValueError(f"refit needs windows of one length, and these have {sorted(shapes)[:3]}; cut them alike")
