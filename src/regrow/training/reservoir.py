"""A memory of examples of earlier tasks that holds every example seen with the same probability."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regrow.axis_tensor import AxisTensor
from regrow.training.learner import Context


@dataclass(frozen=True)
class Reservoir:
    """A replay buffer.

    Args:
        rows: What is stored of each example, ``[size, ...]`` by name; the tensors are changed in place.
        seen: The number of examples that were offered.
        recalled: The number of times that examples were drawn.
    """

    rows: Mapping[str, AxisTensor] = field(default_factory=dict)
    seen: int = 0
    recalled: int = 0


def offer(memory: Reservoir, context: Context, size: int, rows: Mapping[str, Tensor]) -> Reservoir:
    """Offer a batch to the memory.

    Args:
        memory: The memory.
        context: Where training is; its seed decides which examples are stored.
        size: The number of examples that the memory holds.
        rows: What is stored of each example, ``[N, ...]`` by name.

    Source: Vitter's algorithm R (ACM TOMS 11, 1985).
    """
    held, seen = dict(memory.rows), memory.seen
    for name, like in rows.items():
        shape = (size, *like.shape[1:])
        if name not in held:
            held[name] = AxisTensor(torch.zeros(shape, dtype=like.dtype), shape)
    generator = context.generator(7, seen)
    for i in range(len(next(iter(rows.values())))):
        place = seen if seen < size else int(torch.randint(seen + 1, (), generator=generator))
        if place < size:
            for name, values in rows.items():
                held[name].values[place] = values[i]
        seen += 1
    return replace(memory, rows=held, seen=seen)


def draw(memory: Reservoir, context: Context, size: int, n: int) -> dict[str, Tensor]:
    """Draw examples with replacement; none before the second task.

    Args:
        memory: The memory; whoever uses what was drawn adds 1 to ``recalled``.
        context: Where training is.
        size: The number of examples that the memory holds.
        n: The largest number of examples to draw.

    Returns:
        What is stored of each example, by name; empty if there is none.
    """
    filled = min(memory.seen, size)
    if not filled or not context.number:
        return {}
    picked = torch.randint(filled, (min(n, filled),), generator=context.generator(6, memory.recalled + 1))
    return {name: one.values[picked] for name, one in memory.rows.items()}
