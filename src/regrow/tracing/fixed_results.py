"""Results that a recording holds fixed: answers to questions about data, and the order of sorted entries."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def cast_answer(asked: list[Tensor], answer: object) -> Any:
    """An answer in the precision of what was asked about; it may have been given in another."""
    kinds = {x.dtype for x in asked if is_floating(x)}
    return tree_map_only(Tensor, lambda x: x.to(*kinds) if is_floating(x) and len(kinds) == 1 else x, answer)


def reorder(x: Tensor, dim: int, found: Any, order: Tensor | None) -> Any:
    """What an operation that sorts gives, in a given order if that has the form of the one it found."""
    own = found if isinstance(found, Tensor) else found[1]
    if order is None or order.shape != own.shape:
        return found
    return order if isinstance(found, Tensor) else (x.gather(dim, order), order)


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
    """Whether a tensor holds floating-point numbers; a function, so that it can be mapped."""
    return x.is_floating_point()
