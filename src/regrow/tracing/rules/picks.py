"""Rules for operations that create, pick, repeat, pad or write entries: a picked dimension is frozen, mostly."""

from math import inf

import torch
from torch.fx import Node
from torch.fx.node import Argument

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import (
    ALIASES,
    argument,
    module_of,
    op_name,
    operand_of,
    operands_in,
    result_shapes,
    shape_of,
    uncast,
    whole,
)
from regrow.tracing.rules.reduce import broadcast, ordered
from regrow.tracing.rules.shapes import exchanged, frozen_whole, pick
from regrow.tracing.walk import Dims, Rule, Value, Walk


def select(w: Walk, node: Node) -> Value:
    """Rule for ``select``: freezes the dimension, since the index of the entry matters, and removes it."""
    dims, axis = w.along(node, 1)
    w.freeze(node, [dims[axis]])
    if operand_of(node) in w.stacked and axis == 0:
        return (*dims[1:-1], w.stacked[operand_of(node)][whole(node.args[2])])
    return exchanged(dims, axis)


def unbind(w: Walk, node: Node) -> Value:
    """Rule for ``unbind``: freezes the dimension whose entries become separate tensors."""
    dims, axis = w.along(node, 1)
    w.freeze(node, [dims[axis]])
    return [exchanged(dims, axis) for _ in result_shapes(node)]


def index(w: Walk, node: Node) -> Value:
    """Rule for indexing by tensors: freezes the indexed dimensions, passes the others."""
    dims, entries = w.first(node), node.args[1]
    assert isinstance(entries, list | tuple)
    picks, picked = operands_in(entries), [i for i, entry in enumerate(entries) if entry is not None]
    w.freeze(node, (dims[i] for i in picked))
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
    picked = pick(w, node, axis)
    return picked if op_name(node) == "index_select" else frozen_whole(w, node)


def put(w: Walk, node: Node) -> Dims:
    """Rule for ``index_put``: freezes the indexed dimensions and ties the others to those of the written values."""
    _, picks, values = node.args[:3]
    assert isinstance(picks, list | tuple)
    dims, written = w.first(node), w.of(values) if isinstance(values, Node) else ()
    named = operands_in(picks)
    masks = sum(len(w.of(entry)) - 1 for entry in named if entry.meta["val"].dtype in (torch.bool, torch.uint8))
    covered = len(picks) + masks if len(named) == len(picks) else len(dims)
    tied = min(len(dims) - covered, len(written))
    indices = (expr for entry in named for expr in w.of(entry))
    w.freeze(node, [*dims[:covered], *written[: len(written) - tied], *indices])
    for i in range(1, tied + 1):
        if d.size(written[-i]) > 1:
            w.unify(node, dims[-i], written[-i])
    return dims


def region(w: Walk, node: Node) -> Dims:
    """Rule for RoI pooling: passes the channels, freezes batch and space; regions are new dimensions."""
    batch, channels, *space = w.first(node)
    w.freeze(node, [batch, *space])
    count, _, *out = (w.frozen(node, n) for n in shape_of(node))
    return (count, channels, *out)


def decision(w: Walk, node: Node) -> Value:
    """Rule for data-dependent decisions: freezes what they read; a decided number is noted for the module using it."""
    read = [w.of(operand) for operand in node.all_input_nodes]
    for expr in (expr for dims in read for expr in dims):
        d.freeze(expr, f"data decide on it, by `{node.meta['asks']}`")
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


def repeat(w: Walk, node: Node) -> Value:
    """Rule for repetitions: multiplies a dimension by a new factor, outer for ``repeat``, inner if interleaved."""
    inner = op_name(node) == "repeat_interleave"
    if inner and (len(w.first(node)) != len(shape_of(node)) or isinstance(node.args[1], Node)):
        return frozen_whole(w, node)
    out = []
    for expr, n in _resized(w, node):
        if d.size(expr) != n:
            times = _repeated(w, node, n // d.size(expr))
            expr = d.times(expr, times) if inner else d.times(times, expr)
        out.append(expr)
    return tuple(out)


def _repeated(w: Walk, node: Node, n: int) -> Expr:
    leaf = d.Leaf(n, integer=module_of(node) or ".")
    w.literal(node, n, leaf)
    return leaf


def pad(w: Walk, node: Node) -> Dims:
    """Rule for padding: freezes padded dimensions, passes the others."""
    padded = [(expr, n) for expr, n in zip(w.first(node), shape_of(node), strict=True)]
    w.freeze(node, (expr for expr, n in padded if d.size(expr) != n))
    return tuple(expr if d.size(expr) == n else w.frozen(node, n) for expr, n in padded)


def constant(w: Walk, node: Node) -> Dims:
    """Rule for constant tensors (``zeros``, ``full``): every dimension is new, and takes on whatever it is tied to."""
    made = tuple(d.new(n) if n else d.frozen(n, "it is empty") for n in shape_of(node))
    for expr in made:
        if d.size(expr) > 1:
            w.literal(node, d.size(expr), expr)
    return made


def weight_norm(w: Walk, node: Node) -> Dims:
    """Rule for weight normalisation ``g · v / ‖v‖``: ties g to one dimension of v and freezes the others."""
    v, g = operand_of(node), operand_of(node, 1)
    along = whole(node.args[2]) if len(node.args) > 2 else 0
    for i, expr in enumerate(w.of(v)):  # along = -1: one gain for the whole weight
        if i == along:
            w.unify(node, expr, w.of(g)[i])
            w.role(v, i, Role.PRODUCES)
            w.role(g, i, Role.SCALES)
        else:
            w.freeze(node, [expr])
    return w.of(v)


def topk(w: Walk, node: Node) -> Value:
    """Rule for ``topk``: dropped units count as −∞; freezes the dimension if positions are not only counted."""
    dims, axis = w.along(node, 2, -1)
    leaf, k = d.resolve(dims[axis]), whole(node.args[1])
    used = [user for user in node.users if user.args[1] == 1]
    if not isinstance(leaf, d.Leaf) or argument(node, 3) is False or not all(map(_only_counted, used)):
        w.freeze(node, [dims[axis]])
    else:
        leaf.least = max(leaf.least, k)
        d.mark(leaf, Mark.COMPETED, w.why(node))
        w.reads(node, operand_of(node), axis, -inf)
        w.picks[node] = dims[axis]
    out = exchanged(dims, axis, w.frozen(node, k))
    return [out, out]


def _only_counted(positions: Node) -> bool:
    """Whether positions are only counted and used to order rows, so that renumbering them does no harm."""
    for user in positions.users:
        name = op_name(user)
        if name == "sort":
            sound = all(_only_counted(result) for result in user.users if result.args[1] == 0)
        elif name in _RESHAPES:
            sound = _only_counted(user)
        else:
            sound = name in _COUNTS or name.startswith("_assert")
        if not sound:
            return False
    return True


def running_total(w: Walk, node: Node) -> Value:
    """Rule for ``cumsum``: freezes the dimension, unless it counts picks, where unpicked units add 0."""
    return w.first(node) if op_name(uncast(operand_of(node))) in _COUNTS else ordered(w, node)


def histogram(w: Walk, node: Node) -> Dims:
    """Rule for histograms: over positions of ``topk`` the bins are the dimension picked from; other bins are frozen."""
    bins = shape_of(node)[0]
    picked = _picked(w, node.args[0])
    if picked is None or d.size(picked) != bins:
        return constant(w, node) if bins == 1 else (w.frozen(node, bins),)
    w.literal(node, bins, picked)
    return (picked,)


def _picked(w: Walk, node: Argument) -> Expr | None:
    """Return the dimension whose positions a node holds, if they come from ``topk``; else ``None``."""
    while isinstance(node, Node) and node.op == "call_function":
        source = node.args[0]
        if op_name(node) == "getitem" and isinstance(source, Node) and source in w.picks:
            return w.picks[source] if node.args[1] == 1 else None
        if op_name(node) not in _RESHAPES | {"sort", "getitem"}:
            return None
        node = source
    return None


_COUNTS = ("histc", "bincount")
_RESHAPES = ALIASES | {"reshape", "view", "flatten"}

RULES: dict[Rule, str] = {
    select: "select",
    unbind: "unbind",
    index: "index",
    pick_by_tensor: "index_select gather",
    region: "roi_align roi_pool",
    put: "index_put _index_put_impl",
    decision: "decision",
    expand: "expand expand_as broadcast_to",
    repeat: "repeat tile repeat_interleave",
    pad: "pad constant_pad_nd reflection_pad2d replication_pad2d",
    constant: "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor",
    weight_norm: "_weight_norm",
    topk: "topk",
    histogram: "histc bincount",
    running_total: "cumsum",
}
