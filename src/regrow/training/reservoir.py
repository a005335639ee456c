"""Reservoir sampling: a replay memory that holds every example seen with the same probability."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.training.learner import Context


@dataclass(frozen=True)
class Reservoir:
    """A replay memory of examples, and counters for its sampling.

    Args:
        rows: The stored tensors of all examples by name, ``[size, ...]``; changed in place.
        seen: The number of examples that were offered.
        recalled: The number of times that examples were drawn.
    """

    rows: Mapping[str, AxisTensor] = field(default_factory=dict)
    seen: int = 0
    recalled: int = 0


def offer(memory: Reservoir, context: Context, size: int, rows: Mapping[str, Tensor]) -> Reservoir:
    """Offer a batch to the memory by reservoir sampling, and return the updated memory.

    Args:
        memory: The memory.
        context: Gives the seed that decides which examples are stored.
        size: The number of examples that the memory can hold.
        rows: The tensors of the offered examples by name, ``[N, ...]``.

    Source: Vitter's algorithm R (ACM TOMS 11, 1985).
    """
    held, seen = dict(memory.rows), memory.seen
    for name, like in rows.items():
        shape = (size, *like.shape[1:])
        if name not in held:
            held[name] = AxisTensor(torch.zeros(shape, dtype=like.dtype, device=like.device), shape)
    generator = context.generator(7, seen)
    chosen: dict[int, int] = {}
    for i in range(len(next(iter(rows.values())))):
        place = seen if seen < size else int(torch.randint(seen + 1, (), generator=generator))
        if place < size:
            chosen[place] = i
        seen += 1
    if chosen:
        places, taken = (torch.tensor([*each]) for each in (chosen.keys(), chosen.values()))
        for name, values in rows.items():
            held[name].values[places.to(values.device)] = values[taken.to(values.device)]
    return replace(memory, rows=held, seen=seen)


def draw(memory: Reservoir, context: Context, size: int, n: int) -> dict[str, Tensor]:
    """Draw stored examples with replacement; returns none during the first task.

    Args:
        memory: The memory; a caller that uses the drawn examples adds 1 to ``recalled``.
        context: Gives the seed and the number of the task.
        size: The number of examples that the memory can hold.
        n: The largest number of examples to draw.

    Returns:
        The tensors of the drawn examples, by name; empty if there are none.
    """
    filled = min(memory.seen, size)
    if not filled or not context.number:
        return {}
    picked = torch.randint(filled, (min(n, filled),), generator=context.generator(6, memory.recalled + 1))
    return {name: one.values[picked.to(one.values.device)] for name, one in memory.rows.items()}
