"""Read the nodes of a recorded graph: operation, module, shape and arguments."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

T = TypeVar("T")
Shape = tuple[int, ...]
# The shape of a tensor; a list of them for several values; ``None`` for what is no tensor.
Shapes = Shape | list[Shape | None] | None

_CASTS = "to _to_copy clone contiguous alias detach detach_copy lift_fresh lift_fresh_copy type_as"
# Operations that only cast or copy a tensor.
ALIASES = frozenset(_CASTS.split())

_PASSING = (
    "neg abs relu relu6 gelu silu tanh hardswish leaky_relu elu selu celu mish dropout feature_dropout view reshape "
    "flatten unflatten _unsafe_view transpose swapaxes mT t permute movedim unsqueeze squeeze slice narrow split "
    "split_with_sizes chunk getitem expand"
)
# Operations on one tensor whose result is 0 where the tensor is 0.
ZERO_PRESERVING = frozenset(_PASSING.split())


def op_name(node: Node) -> str:
    """Return the plain name of an operation (``add`` for ``add_`` too); empty for an input."""
    return _name_of(node.target)


@lru_cache(maxsize=4096)
def _name_of(target: object) -> str:
    """Return the plain name of ``Node.target``, such as an ATen overload; empty for a string, as inputs have."""
    named = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    name: str = getattr(named, "__name__", "")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def map_arguments(value: object, kind: type[T], change: Callable[[T], object]) -> Any:
    """Return an operation's nested arguments (lists, tuples, dicts) with ``change(x)`` for each ``x`` of type ``kind``.

    >>> map_arguments((1, [2, "x"], {"y": 3}), int, str)
    ('1', ['2', 'x'], {'y': '3'})
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list):
        return [map_arguments(part, kind, change) for part in value]
    if isinstance(value, tuple):
        return tuple([map_arguments(part, kind, change) for part in value])
    if isinstance(value, dict):
        return {name: map_arguments(part, kind, change) for name, part in value.items()}
    return value


def leaves_of(value: object) -> list[object]:
    """Return the leaves of nested lists, tuples and dicts (of these the values), in order; of another value, itself."""
    if isinstance(value, dict):
        return leaves_of([*value.values()])
    return [leaf for part in value for leaf in leaves_of(part)] if isinstance(value, list | tuple) else [value]


def operands_in(value: object) -> list[Node]:
    """Return the graph nodes in an argument, or in nested arguments, in order, with repetitions."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Node)]


def operands(node: Node) -> list[Node]:
    """Return the nodes that an operation takes, positional ones first; one that it takes twice is listed twice."""
    return operands_in((node.args, node.kwargs))


def schema_parameters(target: object) -> Sequence[Any]:
    """Return the parameters (``torch.Argument``) in an operation's schema; none if it has no schema."""
    return getattr(getattr(target, "_schema", None), "arguments", ())


def writes_in_place(node: Node) -> bool:
    """Whether an operation writes into a tensor that it takes (``add_``, or ``out=``)."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def modules_around(node: Node) -> list[tuple[str, type]]:
    """Return (path, class) of the modules in whose forward a node was recorded, innermost last; ``""`` is the model."""
    return list((node.meta.get("nn_module_stack") or {}).values())


def module_of(node: Node) -> str:
    """Return the dotted path of the innermost module in whose forward a node was recorded; empty: the model itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def shapes_of(node: Node) -> Shapes:
    """Return the shape of a node's value; a list for several values, ``None`` for no tensor; unknown sizes raise."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(map(int, value.shape))
    if isinstance(value, tuple | list):
        return [tuple(map(int, v.shape)) if isinstance(v, Tensor) else None for v in value]
    return None


def shape_of(node: Node) -> Shape:
    """Return the shape of a node's value; AssertionError if that is not one tensor."""
    shape = shapes_of(node)
    assert isinstance(shape, tuple)
    return shape


def as_list(value: T | list[T]) -> list[T]:
    """Return a list as it is, and a single value as a list of one."""
    return value if isinstance(value, list) else [value]


def result_shapes(node: Node) -> list[Shape]:
    """Return the shapes of a node's one or more values; AssertionError if one is no tensor."""
    shapes = [shape for shape in as_list(shapes_of(node)) if shape is not None]
    assert len(shapes) == len(as_list(shapes_of(node)))
    return shapes


def uncast(node: Node) -> Node:
    """Return the node behind casts and copies; the node itself if it is neither."""
    while op_name(node) in ALIASES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def argument(node: Node, position: int, *names: str) -> Argument:
    """Return an argument of a call, by position or one of its names; ``None`` if left out, whatever its default."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def operand_of(node: Node, position: int = 0, *names: str) -> Node:
    """Return the node that is an argument of a call, by position or name; AssertionError if it is none."""
    value = argument(node, position, *names)
    assert isinstance(value, Node)
    return value


def as_int(value: Argument) -> int:
    """Return an argument as a whole number; AssertionError if it is none."""
    assert isinstance(value, int)
    return int(value)


def as_ints(value: Argument) -> list[int]:
    """Return an argument that is one whole number or a list of them as a list; AssertionError if it is neither."""
    return list(map(as_int, value if isinstance(value, list | tuple) else [value]))


def dim_index(node: Node, position: int, rank: int, default: int = 0) -> int:
    """Return the index (from 0) of the dimension that argument ``dim`` names, or the argument at ``position``.

    ``rank``: how many dimensions the operand has; ``default``: the index if the argument is left out.
    """
    value = argument(node, position, "dim")
    return (default if value is None else as_int(value)) % max(rank, 1)


def permutation(node: Node, rank: int) -> list[int] | None:
    """Return, per dimension of a transposed result, that of the operand (of rank ``rank``); else ``None``."""
    order = list(range(rank))
    match op_name(node):  # ATen calls give dimensions by position
        case "mT" | "mH" | "adjoint":
            order[-2], order[-1] = order[-1], order[-2]
        case "t" | "numpy_T":
            order.reverse()
        case "transpose" | "swapaxes":
            a, b = dim_index(node, 1, rank), dim_index(node, 2, rank)
            order[a], order[b] = order[b], order[a]
        case "movedim":
            source = [i % rank for i in as_ints(node.args[1])]
            target = [i % rank for i in as_ints(node.args[2])]
            order = [i for i in order if i not in source]
            for position, i in sorted(zip(target, source, strict=True)):  # so that no insertion moves an earlier one
                order.insert(position, i)
        case "permute":
            order = [i % rank for i in as_ints(node.args[1])]
        case _:
            return None
    return order
