"""Rules for operations that repeat or pad entries."""

from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import argument, module_of, operand_of, shape_of
from regrow.tracing.rules.shapes import frozen_whole
from regrow.tracing.walk import Dims, Literal, Value, Walk


def expand(w: Walk, node: Node) -> Dims:
    """Rule for ``expand``: a repeated dimension is new, and free only if an attribute can set its size."""
    dims, shape = w.of(operand_of(node)), shape_of(node)
    dims = (*[d.ONE] * (len(shape) - len(dims)), *dims)
    other = argument(node, 1)
    if isinstance(other, Node):
        return tuple(own if d.size(expr) == 1 else expr for expr, own in zip(dims, w.of(other), strict=True))
    return tuple(
        expr if d.size(expr) == n else _repeated(w, node, n) if n else d.frozen(0, "it is empty")
        for expr, n in zip(dims, shape, strict=True)
    )


def repeat(w: Walk, node: Node) -> Dims:
    """Rule for ``repeat`` and ``tile``: multiplies a dimension by a new outer factor."""
    dims, shape = w.of(operand_of(node)), shape_of(node)
    dims = (*[d.ONE] * (len(shape) - len(dims)), *dims)
    return tuple(
        expr if d.size(expr) == n else d.times(_repeated(w, node, n // d.size(expr)), expr)
        for expr, n in zip(dims, shape, strict=True)
    )


def repeat_interleave(w: Walk, node: Node) -> Value:
    """Rule for ``repeat_interleave``: multiplies a dimension by a new inner factor."""
    dims, shape = w.of(operand_of(node)), shape_of(node)
    if len(dims) != len(shape) or isinstance(node.args[1], Node):
        return frozen_whole(w, node)
    return tuple(
        expr if d.size(expr) == n else d.times(expr, _repeated(w, node, n // d.size(expr)))
        for expr, n in zip(dims, shape, strict=True)
    )


def _repeated(w: Walk, node: Node, n: int) -> Expr:
    leaf = d.Leaf(n, integer=module_of(node) or ".")
    w.literals.append(Literal(module_of(node), n, leaf))
    return leaf


def pad(w: Walk, node: Node) -> Dims:
    """Rule for padding: freezes padded dimensions, passes the others."""
    dims, shape = w.of(operand_of(node)), shape_of(node)
    why = w.why(node, "it is padded")
    for expr, n in zip(dims, shape, strict=True):
        if d.size(expr) != n:
            d.freeze(expr, why)
    return tuple(expr if d.size(expr) == n else d.frozen(n, why) for expr, n in zip(dims, shape, strict=True))


RULES = {
    "expand": expand,
    "expand_as": expand,
    "broadcast_to": expand,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), pad),
}
