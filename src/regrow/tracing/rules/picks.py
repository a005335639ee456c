"""Rules for operations that pick entries by index: the dimension is frozen, since a cut would renumber its entries."""

from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.nodes import axis_of, op_name, operand_of, operands_in, result_shapes, shape_of, whole
from regrow.tracing.rules.entries import broadcast
from regrow.tracing.rules.shapes import frozen_whole
from regrow.tracing.walk import Value, Walk


def select(w: Walk, node: Node) -> Value:
    """Rule for ``select``: freezes the dimension, since the index of the entry matters, and removes it."""
    dims = w.of(operand_of(node))
    axis = axis_of(node, 1, len(dims))
    d.freeze(dims[axis], w.why(node, "one of its entries is picked by number"))
    if operand_of(node) in w.stacked and axis == 0:
        return (*dims[1:-1], w.stacked[operand_of(node)][whole(node.args[2])])
    return (*dims[:axis], *dims[axis + 1 :])


def unbind(w: Walk, node: Node) -> Value:
    """Rule for ``unbind``: freezes the dimension whose entries become separate tensors."""
    dims = w.of(operand_of(node))
    axis = axis_of(node, 1, len(dims))
    d.freeze(dims[axis], w.why(node, "its entries are picked one by one"))
    return [(*dims[:axis], *dims[axis + 1 :]) for _ in result_shapes(node)]


def index(w: Walk, node: Node) -> Value:
    """Rule for indexing by tensors: freezes the indexed dimensions, passes the others."""
    dims = w.of(operand_of(node))
    given = node.args[1]
    assert isinstance(given, list | tuple)
    picks, picked = operands_in(given), [i for i, pick in enumerate(given) if pick is not None]
    for i in picked:
        d.freeze(dims[i], w.why(node, "its entries are picked by a tensor of numbers"))
    if picked != list(range(picked[0], picked[-1] + 1)) or any(
        pick.meta["val"].dtype.is_floating_point for pick in picks
    ):
        return frozen_whole(w, node)
    made = broadcast(w, node, picks)
    if len(dims) - len(picked) + len(made) != len(shape_of(node)):
        return frozen_whole(w, node)
    return (*dims[: picked[0]], *made, *dims[picked[-1] + 1 :])


def pick(w: Walk, node: Node) -> Value:
    """Rule for ``index_select`` and ``gather``: freezes the dimension picked from."""
    dims = w.of(operand_of(node))
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
