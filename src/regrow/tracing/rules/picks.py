"""Rules for operations that pick entries by index: the dimension is frozen, since a cut would renumber its entries."""

from typing import Any

from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.capture import shape_of
from regrow.tracing.rules.entries import broadcast
from regrow.tracing.rules.shapes import axis_of, frozen_whole, operand
from regrow.tracing.walk import Dims, Walk, arg, op_name


def select(w: Walk, node: Node) -> Dims:
    """Rule for ``select``: freezes the dimension, since the index of the entry matters, and removes it."""
    dims = w.of(operand(node))
    axis = axis_of(node, 1, len(dims))
    d.freeze(dims[axis], w.why(node, "one of its entries is picked by number"))
    if operand(node) in w.stacked and axis == 0:
        return (*dims[1:-1], w.stacked[operand(node)][int(arg(node, 2))])
    return (*dims[:axis], *dims[axis + 1 :])


def unbind(w: Walk, node: Node) -> Any:
    """Rule for ``unbind``: freezes the dimension whose entries become separate tensors."""
    dims = w.of(operand(node))
    axis = axis_of(node, 1, len(dims))
    d.freeze(dims[axis], w.why(node, "its entries are picked one by one"))
    return [(*dims[:axis], *dims[axis + 1 :]) for _ in shape_of(node)]


def index(w: Walk, node: Node) -> Any:
    """Rule for indexing by tensors: freezes the indexed dimensions, passes the others."""
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
    """Rule for ``index_select`` and ``gather``: freezes the dimension picked from."""
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
