"""Rules for operations that pick, repeat or pad entries: a picked dimension is frozen, as cuts renumber entries."""

import torch
from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import (
    argument,
    module_of,
    op_name,
    operand_of,
    operands_in,
    result_shapes,
    shape_of,
    whole,
)
from regrow.tracing.rules.reduce import broadcast
from regrow.tracing.rules.shapes import exchanged, frozen_whole, pick
from regrow.tracing.walk import Dims, Value, Walk

BY_TENSOR = "its entries are picked by a tensor of numbers"


def select(w: Walk, node: Node) -> Value:
    """Rule for ``select``: freezes the dimension, since the index of the entry matters, and removes it."""
    dims, axis = w.along(node, 1)
    w.freeze(node, "one of its entries is picked by number", dims[axis])
    if operand_of(node) in w.stacked and axis == 0:
        return (*dims[1:-1], w.stacked[operand_of(node)][whole(node.args[2])])
    return exchanged(dims, axis)


def unbind(w: Walk, node: Node) -> Value:
    """Rule for ``unbind``: freezes the dimension whose entries become separate tensors."""
    dims, axis = w.along(node, 1)
    w.freeze(node, "its entries are picked one by one", dims[axis])
    return [exchanged(dims, axis) for _ in result_shapes(node)]


def index(w: Walk, node: Node) -> Value:
    """Rule for indexing by tensors: freezes the indexed dimensions, passes the others."""
    dims = w.first(node)
    given = node.args[1]
    assert isinstance(given, list | tuple)
    picks, picked = operands_in(given), [i for i, entry in enumerate(given) if entry is not None]
    w.freeze(node, BY_TENSOR, *(dims[i] for i in picked))
    apart = picked != list(range(picked[0], picked[-1] + 1))
    if apart or any(entry.meta["val"].dtype.is_floating_point for entry in picks):
        return frozen_whole(w, node)
    made = broadcast(w, node, picks)
    if len(dims) - len(picked) + len(made) != len(shape_of(node)):
        return frozen_whole(w, node)
    return (*dims[: picked[0]], *made, *dims[picked[-1] + 1 :])


def pick_by_tensor(w: Walk, node: Node) -> Value:
    """Rule for ``index_select`` and ``gather``: freezes the dimension picked from."""
    _, axis = w.along(node, 1)
    picked = pick(w, node, axis, BY_TENSOR)
    return picked if op_name(node) == "index_select" else frozen_whole(w, node)


def put(w: Walk, node: Node) -> Dims:
    """Rule for ``index_put``: freezes the indexed dimensions and ties the others to those of the written values."""
    _, picks, values = node.args[:3]
    assert isinstance(picks, list | tuple)
    dims, given = w.first(node), w.of(values) if isinstance(values, Node) else ()
    named = operands_in(picks)
    masks = sum(len(w.of(entry)) - 1 for entry in named if entry.meta["val"].dtype in (torch.bool, torch.uint8))
    covered = len(picks) + masks if len(named) == len(picks) else len(dims)
    tied = min(len(dims) - covered, len(given))
    indices = (expr for entry in named for expr in w.of(entry))
    w.freeze(node, BY_TENSOR, *dims[:covered], *given[: len(given) - tied], *indices)
    for i in range(1, tied + 1):
        if d.size(given[-i]) > 1:
            w.unify(node, dims[-i], given[-i], "what is put has another form than where it is put")
    return dims


def region(w: Walk, node: Node) -> Dims:
    """Rule for RoI pooling: passes the channels, freezes batch and space; regions are new dimensions."""
    batch, channels, *space = w.first(node)
    w.freeze(node, "regions are taken from it", batch, *space)
    count, _, *out = (w.frozen(node, n, "made of regions") for n in shape_of(node))
    return (count, channels, *out)


def decision(w: Walk, node: Node) -> Value:
    """Rule for data-dependent decisions: freezes what they read; a decided number is noted for the module using it."""
    read = [w.of(operand) for operand in node.all_input_nodes]
    w.freeze(node, f"data decide on it, by `{node.meta['asks']}`", *(expr for dims in read for expr in dims))
    if node.meta["number"]:
        w.decided.setdefault(module_of(node), node.meta["asks"])
    return list(read)


def _resized(w: Walk, node: Node) -> list[tuple[Expr, int]]:
    """Return the dimensions of the operand, with new ones in front, and their sizes in the result."""
    dims, shape = w.first(node), shape_of(node)
    return list(zip((*[d.ONE] * (len(shape) - len(dims)), *dims), shape, strict=True))


def expand(w: Walk, node: Node) -> Dims:
    """Rule for ``expand``: a repeated dimension is new, and free only if an attribute can set its size."""
    pairs, like = _resized(w, node), argument(node, 1)
    if isinstance(like, Node):
        return tuple(other if d.size(expr) == 1 else expr for (expr, _), other in zip(pairs, w.of(like), strict=True))
    return tuple(
        expr if d.size(expr) == n else _repeated(w, node, n) if n else d.frozen(0, "it is empty") for expr, n in pairs
    )


def repeat(w: Walk, node: Node) -> Dims:
    """Rule for ``repeat`` and ``tile``: multiplies a dimension by a new outer factor."""
    return tuple(
        expr if d.size(expr) == n else d.times(_repeated(w, node, n // d.size(expr)), expr)
        for expr, n in _resized(w, node)
    )


def repeat_interleave(w: Walk, node: Node) -> Value:
    """Rule for ``repeat_interleave``: multiplies a dimension by a new inner factor."""
    if len(w.first(node)) != len(shape_of(node)) or isinstance(node.args[1], Node):
        return frozen_whole(w, node)
    return tuple(
        expr if d.size(expr) == n else d.times(expr, _repeated(w, node, n // d.size(expr)))
        for expr, n in _resized(w, node)
    )


def _repeated(w: Walk, node: Node, n: int) -> Expr:
    leaf = d.Leaf(n, integer=module_of(node) or ".")
    w.literal(node, n, leaf)
    return leaf


def pad(w: Walk, node: Node) -> Dims:
    """Rule for padding: freezes padded dimensions, passes the others."""
    padded = [(expr, n) for expr, n in zip(w.first(node), shape_of(node), strict=True)]
    w.freeze(node, "it is padded", *(expr for expr, n in padded if d.size(expr) != n))
    return tuple(expr if d.size(expr) == n else w.frozen(node, n, "it is padded") for expr, n in padded)


RULES = {
    "select": select,
    "unbind": unbind,
    "index": index,
    **dict.fromkeys(("index_select", "gather"), pick_by_tensor),
    **dict.fromkeys(("roi_align", "roi_pool"), region),
    **dict.fromkeys(("index_put", "_index_put_impl"), put),
    "decision": decision,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), pad),
}
