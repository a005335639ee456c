"""Decisions that a run takes from data, and the values by which two runs are compared."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from functools import partial
from types import FunctionType, MethodType

from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.tracing.fixed_results import is_floating
from regrow.tracing.model_state import find_tensors
from regrow.tracing.reachable import contents_of


class OutputError(TypeError):
    """Raised for an output of a network in which not every tensor can be found."""


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


def output_tensors(value: object) -> list[Tensor]:
    """Return the tensors in a network's output: entries of any collection, and attributes and slots of other objects.

    Args:
        value: What the network returned.

    Raises:
        OutputError: If it has no tensor, or one in a part without order, that is read only once, or in a function.

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
