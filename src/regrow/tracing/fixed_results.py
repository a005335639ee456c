"""Replay fixed results in a recorded run: data-dependent decisions, and the order of sorted entries."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Sorted = Tensor | Sequence[Tensor]
"""The result of a sorting operation: the positions, or (values, positions)."""


def cast_answer(asked: list[Tensor], answer: object) -> object:
    """Return a replayed decision in the precision of the tensors it was taken on.

    Args:
        asked: The tensors of the operation.
        answer: The recorded result, possibly in another precision.
    """
    kinds = {x.dtype for x in asked if is_floating(x)}
    return tree_map_only(Tensor, lambda x: x.to(*kinds) if is_floating(x) and len(kinds) == 1 else x, answer)


def reorder(x: Tensor, dim: int, result: Sorted, order: Tensor | None) -> Sorted:
    """Return the result of a sorting operation in a given order, if that has the right shape.

    Args:
        x: The tensor that is sorted.
        dim: The dimension it is sorted along.
        result: The operation's own result: the positions, or (values, positions).
        order: The positions to use; ``None``: the result is unchanged.
    """
    own = result if isinstance(result, Tensor) else result[1]
    if order is None or order.shape != own.shape:
        return result
    return order if isinstance(result, Tensor) else (x.gather(dim, order), order)


ORDERS = frozenset(
    (
        torch.ops.aten.sort.default,
        torch.ops.aten.sort.stable,
        torch.ops.aten.topk.default,
        torch.ops.aten.argsort.default,
        torch.ops.aten.argsort.stable,
    )
)
"""Operations that put entries in order, with the positions as their only or second result."""


def is_floating(x: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers; a plain function, for ``map``."""
    return x.is_floating_point()
