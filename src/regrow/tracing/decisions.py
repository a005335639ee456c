"""Decisions that a run takes from data, and the values by which two runs are compared."""

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.tracing.fixed_results import is_floating


class DivergedError(RuntimeError):
    """Raised where a run reaches other data-dependent decisions than those it is to replay."""


def decision(*asked: Tensor) -> tuple[Tensor, ...]:
    """Mark a data-dependent decision in a graph: it takes the tensors that were read; the result is a constant.

    Args:
        *asked: The tensors on which the decision is based; they are returned.
    """
    return asked


def compared_operands(node: Node) -> list[Node]:
    """Return the floating-point operands from which an operation computes integers or booleans."""
    made = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
    if node.op != "call_function" or (node.target is not decision and all(map(is_floating, made))):
        return []
    read = [(one, one.meta["val"]) for one in node.all_input_nodes]
    return [one for one, value in read if isinstance(value, Tensor) and is_floating(value)]


def outputs(value: object) -> Iterator[object]:
    """Yield the leaves of a network's output: entries of lists, tuples and dicts, and fields of other objects.

    Args:
        value: What the network returned.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__"):
            yield leaf
        else:
            for part in vars(leaf).values():
                yield from outputs(part)
