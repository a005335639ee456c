"""Rules for operations that sum, compare or order the entries of a dimension."""

from dataclasses import replace
from math import inf

from torch.fx import Node

from regrow.core.axes import Mark
from regrow.tracing import dimensions as d
from regrow.tracing.nodes import argument, op_name, operand_of, result_shapes, shapes_of, wholes
from regrow.tracing.rules.entries import pointwise
from regrow.tracing.walk import Dims, Value, Walk


def _over(w: Walk, node: Node, position: int = 1) -> list[int]:
    """Return the dimensions that an operation runs over; all of them if it names none."""
    rank = len(w.of(operand_of(node)))
    given = argument(node, position, "dim", "dims")
    if given is None or given == []:
        return list(range(rank))
    return [axis % rank for axis in wholes(given)]


def _left(w: Walk, node: Node, over: list[int]) -> Dims:
    dims = w.of(operand_of(node))
    kept = len(result_shapes(node)[0]) == len(dims)
    return tuple(d.ONE if i in over else expr for i, expr in enumerate(dims) if kept or i not in over)


def total(w: Walk, node: Node) -> Dims:
    """Rule for sums: dropped units count as 0."""
    over = _over(w, node)
    for i in over:
        w.reads(node, operand_of(node), i)
    return _left(w, node, over)


def vector_norm(w: Walk, node: Node) -> Dims:
    """Rule for vector norms: for orders 1 and 2 dropped units count as 0; other orders freeze the dimension."""
    order = node.args[1] if len(node.args) > 1 else 2
    over = _over(w, node, 2)
    for i in over:
        if order in (1, 2):
            w.reads(node, operand_of(node), i)
        else:
            d.freeze(w.of(operand_of(node))[i], w.why(node, f"a norm of order {order} runs over it"))
    return _left(w, node, over)


def renorm(w: Walk, node: Node) -> Dims:
    """Rule for ``renorm``, which scales each slice by its norm: reads the other dimensions as a vector norm does."""
    order, along = node.args[1], _over(w, node, 2)
    for i, expr in enumerate(w.of(operand_of(node))):
        if i not in along and order in (1, 2):
            w.reads(node, operand_of(node), i)
        elif i not in along:
            d.freeze(expr, w.why(node, f"a norm of order {order} runs over it"))
    return w.of(operand_of(node))


def mean(w: Walk, node: Node) -> Dims:
    """Rule for means: dropped units count as 0; since the size is a divisor, a fold must compensate (found later)."""
    over = _over(w, node)
    free = [i for i in over if d.is_free(w.of(operand_of(node))[i])]
    for i in free:
        w.reads(node, operand_of(node), i)
    if free:
        w.norms.append((node, "mean"))
    return _left(w, node, over)


def softmax(w: Walk, node: Node) -> Dims:
    """Rule for softmax: marks the dimension as competed; dropped units count as −∞."""
    over = _over(w, node)
    for i in over:
        d.mark(w.of(operand_of(node))[i], Mark.COMPETED, w.why(node, "a softmax runs over it"))
        w.reads(node, operand_of(node), i, -inf)
    return w.of(operand_of(node))


def largest(w: Walk, node: Node) -> Value:
    """Rule for maxima: dropped units count as −∞; the dimension is frozen if the position of the maximum is used."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):
        return pointwise(w, node)
    over = _over(w, node)
    several = isinstance(shapes_of(node), list)
    named = several and any(user.args[1] == 1 and user.users for user in node.users)
    dims = w.of(operand_of(node))
    for i in over:
        if named:
            d.freeze(dims[i], w.why(node, "the position of the maximum in it is used"))
        d.mark(dims[i], Mark.COMPETED, w.why(node, "a maximum is taken over it"))
        w.reads(node, operand_of(node), i, -inf)
    left = _left(w, node, over)
    return [left, left] if several else left


def smallest(w: Walk, node: Node) -> Value:
    """Rule for minima: as for maxima, but dropped units count as +∞."""
    before = len(w.readings)
    out = largest(w, node)
    for i in range(before, len(w.readings)):
        w.readings[i] = replace(w.readings[i], fill=inf)
    return out


def ordered(w: Walk, node: Node) -> Value:
    """Rule for operations that depend on the order or number of entries (sort, var, flip): freezes the dimension."""
    dims = w.of(operand_of(node))
    position = {"kthvalue": 2, "roll": 2, "diff": 2}.get(op_name(node), 1)
    named = len(node.args) > position or {"dim", "dims"} & node.kwargs.keys()
    over = _over(w, node, position) if named or op_name(node) not in _LAST else [len(dims) - 1]
    for i in over:
        d.freeze(dims[i], w.why(node, f"`{op_name(node)}` runs along it"))
    shapes = shapes_of(node)
    if (shapes[0] if isinstance(shapes, list) else shapes) != tuple(map(d.size, dims)):
        return w.fresh(node, w.why(node, "made by an ordering"))
    return [dims for _ in shapes] if isinstance(shapes, list) else dims


_LAST = frozenset(["sort", "argsort", "kthvalue", "median", "mode"])
_ORDERED = (
    "cumprod logcumsumexp cummax cummin flip roll sort argsort kthvalue median mode var std var_mean "
    "std_mean argmax argmin prod any all nanmean diff"
)

RULES = {
    "sum": total,
    "linalg_vector_norm": vector_norm,
    "norm": vector_norm,
    "mean": mean,
    "renorm": renorm,
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), softmax),
    **dict.fromkeys(("amax", "max", "logsumexp"), largest),
    **dict.fromkeys(("amin", "min"), smallest),
    **dict.fromkeys(_ORDERED.split(), ordered),
}
