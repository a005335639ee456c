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
    as_int,
    module_of,
    op_name,
    operand_of,
    operands_in,
    result_shapes,
    shape_of,
    uncast,
)
from regrow.tracing.rules.reduce import broadcast, ordered
from regrow.tracing.rules.shapes import freeze_operand, freeze_picked, replace_dim
from regrow.tracing.walk import Dims, Rule, Value, Walk


def select(w: Walk, node: Node) -> Value:
    """Rule for ``select``: freezes the dimension, since the index of the entry matters, and removes it."""
    dims, axis = w.along(node, 1)
    w.freeze(node, [dims[axis]])
    if operand_of(node) in w.stacked and axis == 0:
        return (*dims[1:-1], w.stacked[operand_of(node)][as_int(node.args[2])])
    return replace_dim(dims, axis)


def unbind(w: Walk, node: Node) -> Value:
    """Rule for ``unbind``: freezes the dimension whose entries become separate tensors."""
    dims, axis = w.along(node, 1)
    w.freeze(node, [dims[axis]])
    return [replace_dim(dims, axis) for _ in result_shapes(node)]


def index(w: Walk, node: Node) -> Value:
    """Rule for indexing by tensors: freezes the indexed dimensions, passes the others."""
    dims, entries = w.first(node), node.args[1]
    assert isinstance(entries, list | tuple)
    indices, picked = operands_in(entries), [i for i, entry in enumerate(entries) if entry is not None]
    w.freeze(node, (dims[i] for i in picked))
    apart = picked != list(range(picked[0], picked[-1] + 1))  # then the indexed dimensions move to the front
    if apart or any(entry.meta["val"].dtype.is_floating_point for entry in indices):
        return freeze_operand(w, node)
    indexed = broadcast(w, node, indices)
    if len(dims) - len(picked) + len(indexed) != len(shape_of(node)):
        return freeze_operand(w, node)
    return (*dims[: picked[0]], *indexed, *dims[picked[-1] + 1 :])


def index_select(w: Walk, node: Node) -> Value:
    """Rule for ``index_select`` and ``gather``: freezes the dimension picked from."""
    _, axis = w.along(node, 1)
    picked = freeze_picked(w, node, axis)
    return picked if op_name(node) == "index_select" else freeze_operand(w, node)


def index_put(w: Walk, node: Node) -> Dims:
    """Rule for ``index_put``: freezes the indexed dimensions and ties the others to those of the written values."""
    _, entries, values = node.args[:3]
    assert isinstance(entries, list | tuple)
    dims, written = w.first(node), w.of(values) if isinstance(values, Node) else ()
    indices = operands_in(entries)
    # a mask covers as many dimensions as it has
    extra = sum(len(w.of(index)) - 1 for index in indices if index.meta["val"].dtype in (torch.bool, torch.uint8))
    # With an entry of None (a slice before an index) all dimensions count as indexed.
    covered = len(entries) + extra if len(indices) == len(entries) else len(dims)
    tied = min(len(dims) - covered, len(written))
    index_dims = (expr for index in indices for expr in w.of(index))
    w.freeze(node, [*dims[:covered], *written[: len(written) - tied], *index_dims])
    for i in range(1, tied + 1):
        if d.size(written[-i]) > 1:
            w.unify(node, dims[-i], written[-i])
    return dims


def roi_pool(w: Walk, node: Node) -> Dims:
    """Rule for RoI pooling: passes the channels, freezes batch and space; regions are new dimensions."""
    batch, channels, *space = w.first(node)
    w.freeze(node, [batch, *space])
    count, _, *out = (w.frozen(node, n) for n in shape_of(node))
    return (count, channels, *out)


def data_decision(w: Walk, node: Node) -> Value:
    """Rule for data-dependent decisions: freezes what they read; notes the module whose code gets a number from one."""
    read = [w.of(operand) for operand in node.all_input_nodes]
    for expr in (expr for dims in read for expr in dims):
        d.freeze(expr, f"data decide on it, by `{node.meta['asks']}`")
    if node.meta["number"]:
        w.decided.setdefault(module_of(node), node.meta["asks"])
    return list(read)


def _pair_with_sizes(w: Walk, node: Node) -> list[tuple[Expr, int]]:
    """Return (dimension of the operand, its size in the result), with new dimensions of size 1 in front."""
    dims, shape = w.first(node), shape_of(node)
    return list(zip((*[d.ONE] * (len(shape) - len(dims)), *dims), shape, strict=True))


def expand(w: Walk, node: Node) -> Dims:
    """Rule for ``expand``: a repeated dimension is new, and free only if an attribute can set its size."""
    pairs, like = _pair_with_sizes(w, node), argument(node, 1)
    if isinstance(like, Node):
        return tuple(other if d.size(expr) == 1 else expr for (expr, _), other in zip(pairs, w.of(like), strict=True))
    out = []
    for expr, n in pairs:
        if d.size(expr) != n:
            expr = _new_repetition(w, node, n) if n else d.frozen(0, "it is empty")
        out.append(expr)
    return tuple(out)


def repeat(w: Walk, node: Node) -> Value:
    """Rule for repetitions: multiplies a dimension by a new factor, outer for ``repeat``, inner if interleaved."""
    inner = op_name(node) == "repeat_interleave"
    if inner and (len(w.first(node)) != len(shape_of(node)) or isinstance(node.args[1], Node)):
        return freeze_operand(w, node)
    out = []
    for expr, n in _pair_with_sizes(w, node):
        if d.size(expr) != n:
            times = _new_repetition(w, node, n // d.size(expr))
            expr = d.times(expr, times) if inner else d.times(times, expr)
        out.append(expr)
    return tuple(out)


def _new_repetition(w: Walk, node: Node, n: int) -> Expr:
    """Return a new dimension of ``n`` repetitions, which an attribute of the operation's module must hold."""
    leaf = d.Leaf(n, integer=module_of(node) or ".")
    w.add_literal(node, n, leaf)
    return leaf


def pad(w: Walk, node: Node) -> Dims:
    """Rule for padding: freezes padded dimensions, passes the others."""
    padded = [(expr, n) for expr, n in zip(w.first(node), shape_of(node), strict=True)]
    w.freeze(node, (expr for expr, n in padded if d.size(expr) != n))
    return tuple(expr if d.size(expr) == n else w.frozen(node, n) for expr, n in padded)


def constant(w: Walk, node: Node) -> Dims:
    """Rule for constant tensors (``zeros``, ``full``): every dimension is new, and takes on whatever it is tied to."""
    dims = tuple(d.new(n) if n else d.frozen(n, "it is empty") for n in shape_of(node))
    for expr in dims:
        if d.size(expr) > 1:
            w.add_literal(node, d.size(expr), expr)
    return dims


def weight_norm(w: Walk, node: Node) -> Dims:
    """Rule for weight normalisation ``g · v / ‖v‖``: ties g to one dimension of v and freezes the others."""
    v, g = operand_of(node), operand_of(node, 1)
    along = as_int(node.args[2]) if len(node.args) > 2 else 0
    for i, expr in enumerate(w.of(v)):  # along = -1: one gain for the whole weight
        if i == along:
            w.unify(node, expr, w.of(g)[i])
            w.add_role(v, i, Role.PRODUCES)
            w.add_role(g, i, Role.SCALES)
        else:
            w.freeze(node, [expr])
    return w.of(v)


def topk(w: Walk, node: Node) -> Value:
    """Rule for ``topk``: dropped units count as −∞; freezes the dimension unless its positions are only counted."""
    dims, axis = w.along(node, 2, -1)
    leaf, k = d.resolve(dims[axis]), as_int(node.args[1])
    positions = [user for user in node.users if user.args[1] == 1]
    takes_smallest = argument(node, 3) is False
    if not isinstance(leaf, d.Leaf) or takes_smallest or not all(map(_only_counted, positions)):
        w.freeze(node, [dims[axis]])
    else:
        leaf.least = max(leaf.least, k)
        d.strengthen_mark(leaf, Mark.COMPETED, w.why(node))
        w.add_reading(node, operand_of(node), axis, -inf)
        w.picks[node] = dims[axis]
    out = replace_dim(dims, axis, w.frozen(node, k))
    return [out, out]


def _only_counted(positions: Node) -> bool:
    """Whether positions (a node) are only counted and used to order rows, so that renumbering them does no harm."""
    for user in positions.users:
        name = op_name(user)
        if name == "sort":
            # Result 0 are the sorted positions; 1, their order, only orders rows.
            is_harmless = all(_only_counted(result) for result in user.users if result.args[1] == 0)
        elif name in _RESHAPES:
            is_harmless = _only_counted(user)
        else:
            is_harmless = name in _COUNTS or name.startswith("_assert")
        if not is_harmless:
            return False
    return True


def cumulative_sum(w: Walk, node: Node) -> Value:
    """Rule for ``cumsum``: freezes the dimension, unless it counts picks, where unpicked units add 0."""
    return w.first(node) if op_name(uncast(operand_of(node))) in _COUNTS else ordered(w, node)


def histogram(w: Walk, node: Node) -> Dims:
    """Rule for histograms: over positions of ``topk`` the bins are the dimension picked from; other bins are frozen."""
    bins = shape_of(node)[0]
    picked = _picked_dim(w, node.args[0])
    if picked is None or d.size(picked) != bins:
        return constant(w, node) if bins == 1 else (w.frozen(node, bins),)
    w.add_literal(node, bins, picked)
    return (picked,)


def _picked_dim(w: Walk, node: Argument) -> Expr | None:
    """Return the dimension whose positions a node holds, if they come from ``topk``; else ``None``."""
    while isinstance(node, Node) and node.op == "call_function":
        source = node.args[0]
        if op_name(node) == "getitem" and isinstance(source, Node) and source in w.picks:
            return w.picks[source] if node.args[1] == 1 else None
        if op_name(node) not in _RESHAPES | {"sort", "getitem"}:
            return None
        node = source
    return None


_COUNTS = ("histc", "bincount")  # operations that count how often each position occurs
_RESHAPES = ALIASES | {"reshape", "view", "flatten"}  # whose results hold the same positions as their operands

RULES: dict[Rule, str] = {
    select: "select",
    unbind: "unbind",
    index: "index",
    index_select: "index_select gather",
    roi_pool: "roi_align roi_pool",
    index_put: "index_put _index_put_impl",
    data_decision: "decision",
    expand: "expand expand_as broadcast_to",
    repeat: "repeat tile repeat_interleave",
    pad: "pad constant_pad_nd reflection_pad2d replication_pad2d",
    constant: "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor",
    weight_norm: "_weight_norm",
    topk: "topk",
    histogram: "histc bincount",
    cumulative_sum: "cumsum",
}
