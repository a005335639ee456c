"""Decisions that a run takes from data, and the values by which two runs are compared."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.tracing.model_state import contents_of, find_tensors

Sorted = Tensor | Sequence[Tensor]
"""The result of a sorting operation: the positions, or (values, positions)."""


def cast_answer(asked: list[Tensor], answer: object) -> object:
    """Return a replayed decision in the precision of the tensors it was taken on."""
    dtypes = {x.dtype for x in asked if x.is_floating_point()}
    return tree_map_only(Tensor, lambda x: x.to(*dtypes) if x.is_floating_point() and len(dtypes) == 1 else x, answer)


def reorder(x: Tensor, dim: int, result: Sorted, order: Tensor | None) -> Sorted:
    """Return the result of a sorting operation in a given order, if that has the right shape."""
    positions = result if isinstance(result, Tensor) else result[1]
    if order is None or order.shape != positions.shape:
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


class OutputError(TypeError):
    """Raised for an output of a network in which not every tensor can be found."""


class DivergedError(RuntimeError):
    """Raised where a run reaches other data-dependent decisions than those it is to replay."""


def decision(*asked: Tensor) -> tuple[Tensor, ...]:
    """Mark a data-dependent decision in a graph: it takes the tensors that were read; the result is a constant."""
    return asked


def compared_operands(node: Node) -> list[Node]:
    """Return the floating-point operands from which an operation computes integers or booleans."""
    made = [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
    if node.op != "call_function" or (node.target is not decision and all(x.is_floating_point() for x in made)):
        return []
    read = [(operand, operand.meta["val"]) for operand in node.all_input_nodes]
    return [operand for operand, value in read if isinstance(value, Tensor) and value.is_floating_point()]


def output_tensors(value: object) -> list[Tensor]:
    """Return the tensors in a network's output: entries of any collection, and attributes and slots of other objects.

    >>> import dataclasses, torch
    >>> Pair = dataclasses.make_dataclass("Pair", ["first", "rest"], slots=True)
    >>> [len(x) for x in output_tensors(Pair(torch.ones(2), {"a": [torch.ones(3)]}))]
    [2, 3]
    """
    result: list[Tensor] = []
    _collect_tensors(value, result, set())
    if not result:
        raise OutputError(f"it returns no tensor (a {type(value).__name__}); return tensors, also inside of objects")
    return result


_WITHOUT = (str, bytes, bytearray, range, nn.Module, type)
"""Types of values that hold no outputs."""


def _collect_tensors(value: object, result: list[Tensor], visited: set[int]) -> None:
    if isinstance(value, Tensor):
        result.append(value)
        return
    if id(value) in visited or isinstance(value, _WITHOUT) or type(value).__module__ == "numpy":
        return
    visited.add(id(value))
    name = type(value).__name__
    parts: Iterable[object]
    if isinstance(value, Iterator):
        raise OutputError(f"it returns a {name}, which can be read only once; return a list or tuple")
    if isinstance(value, FunctionType | MethodType | partial):
        if [*find_tensors([contents_of(cell) for cell in getattr(value, "__closure__", None) or ()])]:
            raise OutputError("it returns a function that holds tensors; return the tensors")
        return
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, Collection):
        parts = value
        if isinstance(value, Set) and [*find_tensors([*value])]:
            raise OutputError(f"it returns a {name} of tensors, which has no order; return a list or tuple")
    else:
        names = [slot for kind in type(value).__mro__ for slot in _slots(kind)]
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, slot, None) for slot in names)]
    for part in parts:
        _collect_tensors(part, result, visited)


def _slots(kind: type) -> list[str]:
    """Return the names of the slots that a class itself declares."""
    declared = vars(kind).get("__slots__", ())
    names = [declared] if isinstance(declared, str) else [*declared]
    private = [f"_{kind.__name__.lstrip('_')}{x}" if x[:2] == "__" and x[-2:] != "__" else x for x in names]
    return [x for x in private if x not in ("__dict__", "__weakref__")]
