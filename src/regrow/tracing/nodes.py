"""Read the nodes of a recorded graph: operation, module, shape and arguments."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

Shape = tuple[int, ...]
Shapes = Shape | list[Shape | None] | None
"""The shape of a tensor; a list of them for several values; ``None`` for what is no tensor."""

_CASTS = "to _to_copy clone contiguous alias detach detach_copy lift_fresh lift_fresh_copy type_as"
ALIASES = frozenset(_CASTS.split())
"""Operations that only cast or copy a tensor."""

_PASSING = (
    "neg abs relu relu6 gelu silu tanh hardswish leaky_relu elu selu celu mish dropout feature_dropout view reshape "
    "flatten unflatten _unsafe_view transpose swapaxes mT t permute movedim unsqueeze squeeze slice narrow split "
    "split_with_sizes chunk getitem expand"
)
ZERO_PRESERVING = frozenset(_PASSING.split())
"""Operations on one tensor whose result is 0 where the tensor is 0."""


def op_name(node: Node) -> str:
    """Return the plain name of an operation (``linear``, ``add``); in-place forms have the same name."""
    return _name_of(node.target)


@lru_cache(maxsize=4096)
def _name_of(target: object) -> str:
    name = (
        target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "")
    )
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def leaves_of(value: object) -> list[object]:
    """Return the leaves of nested lists, tuples and dicts, in order.

    Args:
        value: The arguments of a call.

    >>> leaves_of((1, [2, {"x": 3}]))
    [1, 2, 3]
    """
    result: list[object] = []
    _collect(value, result)
    return result


def _collect(value: object, result: list[object]) -> None:
    if isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            _collect(one, result)
    else:
        result.append(value)


def module_of(node: Node) -> str:
    """Return the dotted path of the innermost module in whose forward a node was recorded; empty: the model itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def shapes_of(node: Node) -> Shapes:
    """Return the shape of a node's value; a list of shapes for several values, ``None`` for no tensor."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(int(n) for n in value.shape)
    if isinstance(value, tuple | list):
        return [tuple(int(n) for n in v.shape) if isinstance(v, Tensor) else None for v in value]
    return None


def shape_of(node: Node) -> Shape:
    """Return the shape of a node's value, which must be one tensor."""
    shape = shapes_of(node)
    assert isinstance(shape, tuple)
    return shape


def result_shapes(node: Node) -> list[Shape]:
    """Return the shapes of a node's values, of which each must be a tensor; of a single value, that of it alone."""
    shapes, result = shapes_of(node), []
    for shape in shapes if isinstance(shapes, list) else [shapes]:
        assert shape is not None
        result.append(shape)
    return result


def uncast(node: Node) -> Node:
    """Return the node behind casts and copies."""
    while node.op == "call_function" and op_name(node) in ALIASES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def argument(node: Node, position: int, *names: str) -> Argument:
    """Return an argument of a call, given by position or by one of its names; ``None`` if it is left out.

    Args:
        node: The call.
        position: Its place among the positional arguments, from 0.
        names: The names under which it may be given.
    """
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def operand_of(node: Node, position: int = 0, *names: str) -> Node:
    """Return an argument of a call that is the result of another one.

    Args:
        node: The call.
        position: Its place among the positional arguments, from 0.
        names: The names under which it may be given.
    """
    value = argument(node, position, *names)
    assert isinstance(value, Node)
    return value


def operands_in(value: Argument) -> list[Node]:
    """Return the nodes in a list of arguments, or the argument itself if it is a node; others are left out.

    Args:
        value: An argument.
    """
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Node)]


def whole(value: Argument) -> int:
    """Return an argument that is a whole number.

    Args:
        value: An argument.
    """
    assert isinstance(value, int)
    return int(value)


def wholes(value: Argument) -> list[int]:
    """Return an argument that is a list of whole numbers, or one such number, as a list.

    Args:
        value: An argument.
    """
    return [whole(one) for one in (value if isinstance(value, list | tuple) else [value])]


def axis_of(node: Node, position: int, rank: int, default: int = 0) -> int:
    """Return which dimension an argument of a call names, as an index from 0.

    Args:
        node: The call.
        position: The place of the argument among the positional ones.
        rank: How many dimensions the tensor has.
        default: The dimension where the call names none.
    """
    value = argument(node, position, "dim")
    return (default if value is None else whole(value)) % max(rank, 1)
