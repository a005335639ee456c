"""A memory of examples of earlier tasks: every example that went by is in it with the same chance."""

import torch
from torch import Tensor

from regrow.axis_tensor import AxisTensor
from regrow.learner import Learner, Stand


def offer(learner: Learner, at: Stand, size: int, **rows: Tensor) -> None:
    """Offer a batch to the memory.

    Args:
        learner: Whose memory it is; its tensors hold the rows, its values how many went by.
        at: Where the network stands.
        size: How many examples the memory holds.
        **rows: What is kept of an example, ``[N, ...]`` each.

    Source: Vitter's algorithm R (ACM TOMS 11, 1985).
    """
    seen = learner.values.setdefault("seen", 0)
    for name, like in rows.items():
        shape = (size, *like.shape[1:])
        learner.tensors.setdefault(name, AxisTensor(torch.zeros(shape, dtype=like.dtype), shape))
    generator = at.drawn(7, seen)
    for i in range(len(next(iter(rows.values())))):
        place = seen if seen < size else int(torch.randint(seen + 1, (), generator=generator))
        if place < size:
            for name, values in rows.items():
                learner.tensors[name].values[place] = values[i]
        seen += 1
    learner.values["seen"] = seen


def recall(learner: Learner, at: Stand, size: int, n: int, *names: str) -> tuple[Tensor, ...]:
    """What is kept of some examples, drawn with replacement; nothing before the second task.

    Args:
        learner: Whose memory it is.
        at: Where the network stands.
        size: How many examples the memory holds.
        n: How many are wanted at most.
        *names: What of each.
    """
    filled = min(learner.values.get("seen", 0), size)
    if not filled or not at.number:
        return ()
    turn = learner.values["recalled"] = learner.values.get("recalled", 0) + 1
    picked = torch.randint(filled, (min(n, filled),), generator=at.drawn(6, turn))
    return tuple(learner.tensors[name].values[picked] for name in names)
