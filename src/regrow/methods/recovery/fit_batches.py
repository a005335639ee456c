"""The data of a refit in a few batches, small enough that what lies between two layers takes little memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.sources import Batch
from regrow.data.batch_streams import concatenate, form_of, is_joinable

ELEMENTS, BATCHES = 2048, 16
"""The fewest elements of inputs (tokens of text) that run together, unless there are fewer in all; and into how many
batches the data are divided at most."""
_OWN = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its parts."""


@dataclass(frozen=True)
class FitBatch:
    """Text or images that run through the networks together, and the parts of the data that they belong to.

    Args:
        batch: The inputs.
        parts: Per stretch of the batch, in order, the number of its part, and the number of its last example, from 1.
    """

    batch: Batch
    parts: tuple[tuple[int, int], ...]


def regroup(parts: Sequence[Sequence[Batch]], elements: int = ELEMENTS, most: int = BATCHES) -> list[FitBatch]:
    """Return the data in larger batches, which may hold the end of one part and the beginning of the next.

    Args:
        parts: The batches of each part of the data.
        elements: The fewest elements of their first inputs (tokens of text) in a batch.
        most: The largest number of batches; batches with other arguments (such as a mask) are more.

    >>> text = [Batch((torch.zeros(1, 4),))] * 3
    >>> [one.parts for one in regroup([text, text[:1]], elements=8)]
    [((0, 2),), ((0, 1), (1, 2))]

    Raises:
        ValueError: If inputs differ in a dimension other than the first.
    """
    plain = [(part, replace(batch, labels=None)) for part, batches in enumerate(parts) for batch in batches]
    every = [(part, batch, *_size(batch)) for part, batch in plain]
    check_lengths([batch for _, batch, _, _ in every])
    least = max(elements, -(-sum(count for *_, count in every) // most))
    groups: list[list[tuple[int, Batch, int, int]]] = []
    size, last, joined = 0, list[Any](), False
    for one in every:
        form, joins = form_of(one[1]), is_joinable(one[1])
        if size >= least or not joins or not joined or form != last:
            groups.append([])
            size, last, joined = 0, form, joins
        groups[-1].append(one)
        size += one[3]
    result = []
    for group in groups:
        counts = {part: sum(count for _, _, count, _ in own) for part, own in groupby(group, lambda one: one[0])}
        ends = tuple(zip(counts, accumulate(counts.values()), strict=True))
        result.append(FitBatch(concatenate([batch for _, batch, _, _ in group]), ends))
    return result


def join_all(parts: Sequence[Sequence[Batch]]) -> list[FitBatch]:
    """Return the data as a single batch, for a network that keeps tensors of a forward pass in its modules.

    Args:
        parts: The batches of each part of the data.

    Raises:
        ValueError: If they cannot be joined.
    """
    batches = regroup(parts, most=1)
    if len(batches) > 1:
        raise ValueError(
            f"this network keeps tensors in its modules, so that all data must run in one batch, and {len(batches)} of "
            "these cannot be joined; give batches with the same arguments, or recover by distil"
        )
    return batches


def _size(batch: Batch) -> tuple[int, int]:
    """Return how many examples and elements the first tensor of a batch has; 1 without a tensor."""
    inputs = [*batch.args, *batch.kwargs.values()]
    first = next((one for one in inputs if isinstance(one, Tensor) and one.dim()), torch.zeros(1))
    return len(first), first.numel()


def read_state(model: nn.Module) -> dict[str, object]:
    """Return the attributes of a network's modules that hold tensors, and its buffers, by name.

    Args:
        model: The network.
    """
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in (vars(module) | module._buffers).items()
        if name not in _OWN and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    }


def keeps_state(model: nn.Module, before: Mapping[str, object]) -> bool:
    """Whether a forward pass has put tensors into modules, which batches that run in turns would take from each other.

    Args:
        model: The network, after a forward pass.
        before: Its attributes before it (:func:`read_state`).
    """
    after = read_state(model)
    return after.keys() != before.keys() or any(value is not before[name] for name, value in after.items())


def check_lengths(batches: Iterable[Batch]) -> None:
    """Raise ValueError if inputs of batches differ in a dimension other than the first.

    Args:
        batches: The batches.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for batch in batches:
        for name, value in {**{str(i): one for i, one in enumerate(batch.args)}, **batch.kwargs}.items():
            if isinstance(value, Tensor):
                shapes.setdefault(name, set()).add(tuple(value.shape[1:]))
    for several in shapes.values():
        if len(several) > 1:
            raise ValueError(f"refit needs windows of one length, and these have {sorted(several)[:3]}; cut them alike")
