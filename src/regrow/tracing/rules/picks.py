"""Operations that pick entries by number: what is picked from is frozen, for a cut would number its entries anew."""

from typing import Any

from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.capture import shape_of
from regrow.tracing.rules.entries import broadcast
from regrow.tracing.rules.shapes import axis_of, frozen_whole, operand
from regrow.tracing.walk import Dims, Walk, arg, op_name


def select(w: Walk, node: Node) -> Dims:
    """One entry of a dimension: which one it is counts, so the dimension is frozen."""
    dims = w.of(operand(node))
    axis = axis_of(node, 1, len(dims))
    d.freeze(dims[axis], w.why(node, "one of its entries is picked by number"))
    if operand(node) in w.stacked and axis == 0:
        return (*dims[1:-1], w.stacked[operand(node)][int(arg(node, 2))])
    return (*dims[:axis], *dims[axis + 1 :])


def unbind(w: Walk, node: Node) -> Any:
    """All entries of a dimension, one by one."""
    dims = w.of(operand(node))
    axis = axis_of(node, 1, len(dims))
    d.freeze(dims[axis], w.why(node, "its entries are picked one by one"))
    return [(*dims[:axis], *dims[axis + 1 :]) for _ in shape_of(node)]


def index(w: Walk, node: Node) -> Any:
    """Entries picked by a tensor of numbers: the dimensions picked from are frozen, the others pass."""
    dims = w.of(operand(node))
    picks: list[Any] = list(arg(node, 1))
    picked = [i for i, pick in enumerate(picks) if pick is not None]
    for i in picked:
        d.freeze(dims[i], w.why(node, "its entries are picked by a tensor of numbers"))
    if picked != list(range(picked[0], picked[-1] + 1)) or any(
        pick.meta["val"].dtype.is_floating_point for pick in picks if pick
    ):
        return frozen_whole(w, node)
    made = broadcast(w, node, [picks[i] for i in picked])
    if len(dims) - len(picked) + len(made) != len(shape_of(node)):
        return frozen_whole(w, node)
    return (*dims[: picked[0]], *made, *dims[picked[-1] + 1 :])


def pick(w: Walk, node: Node) -> Dims:
    """``index_select`` and ``gather``: the dimension picked from is frozen."""
    dims = w.of(operand(node))
    axis = axis_of(node, 1, len(dims))
    why = w.why(node, "its entries are picked by a tensor of numbers")
    d.freeze(dims[axis], why)
    if op_name(node) == "index_select":
        return (*dims[:axis], d.frozen(shape_of(node)[axis], why), *dims[axis + 1 :])
    return frozen_whole(w, node)


RULES = {
    "select": select,
    "unbind": unbind,
    "index": index,
    "index_select": pick,
    "gather": pick,
}
