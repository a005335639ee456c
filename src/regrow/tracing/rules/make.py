"""Rules for operations that create constant tensors, write into tensors, or select and weight experts."""

from math import inf

from torch.fx import Node
from torch.fx.node import Argument

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import ALIASES, argument, op_name, operand_of, shape_of, uncast, whole
from regrow.tracing.rules.reduce import ordered, pointwise
from regrow.tracing.walk import Dims, Value, Walk

ALIGNED = 16
"""Alignment in bytes of each row of an expert's matrix, as torch's grouped matrix product requires."""


def constant(w: Walk, node: Node) -> Dims:
    """Rule for constant tensors (``zeros``, ``full``): every dimension is new, and takes on whatever it is tied to."""
    made = tuple(d.new(n) if n else d.frozen(n, "it is empty") for n in shape_of(node))
    for expr in made:
        if d.size(expr) > 1:
            w.literal(node, d.size(expr), expr)
    return made


def overwrite(w: Walk, node: Node) -> Dims:
    """Rule for ``copy_``, ``fill_``, ``zero_``: ties the written value to the tensor by broadcasting."""
    pointwise(w, node)
    return w.first(node)


def weight_norm(w: Walk, node: Node) -> Dims:
    """Rule for weight normalisation ``g · v / ‖v‖``: ties g to one dimension of v and freezes the others."""
    v, g = operand_of(node), operand_of(node, 1)
    along = whole(node.args[2]) if len(node.args) > 2 else 0
    for i, expr in enumerate(w.of(v)):  # along = -1: one gain for the whole weight
        if i == along:
            w.unify(node, expr, w.of(g)[i], "a weight's gain has another form than the weight")
            w.role(v, i, Role.PRODUCES)
            w.role(g, i, Role.SCALES)
        else:
            w.freeze(node, "a weight is normalised over it", expr)
    return w.of(v)


def topk(w: Walk, node: Node) -> Value:
    """Rule for ``topk``: dropped units count as −∞; freezes the dimension if positions are not only counted."""
    dims, axis = w.along(node, 2, -1)
    why = w.why(node, "its largest entries are picked")
    leaf, k = d.resolve(dims[axis]), whole(node.args[1])
    used = [user for user in node.users if user.args[1] == 1]
    if not isinstance(leaf, d.Leaf) or argument(node, 3) is False or not all(map(_only_counted, used)):
        d.freeze(dims[axis], why)
    else:
        leaf.least = max(leaf.least, k)
        d.mark(leaf, Mark.COMPETED, why)
        w.reads(node, operand_of(node), axis, -inf)
        w.picks[node] = dims[axis]
    out = (*dims[:axis], d.frozen(k, why), *dims[axis + 1 :])
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
        return constant(w, node) if bins == 1 else (w.frozen(node, bins, "it counts how often values occur"),)
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


def grouped_product(w: Walk, node: Node) -> Dims:
    """Rule for the grouped matrix product ``y[s] = x[s] W[e(s)]`` of experts, with ``W`` as [experts, in, out]."""
    x, weight, ends = (operand_of(node, i) for i in range(3))
    rows, kernel = w.of(x), w.of(weight)
    w.unify(node, rows[1], kernel[1], "the two sides of a sum have no common form")
    w.unify(node, kernel[0], w.of(ends)[0], "experts and their rows have no common form")
    w.reads(node, x, 1, weight=w.source(weight))
    for expr in kernel[1:]:
        d.in_multiples(expr, max(1, ALIGNED // node.meta["val"].itemsize))
    for dim, role in enumerate((Role.SCALES, Role.CONSUMES, Role.PRODUCES)):
        w.role(weight, dim, role)
    w.contracts(node, (weight,), (rows[0], *kernel[1:]))
    return (rows[0], kernel[2])


_COUNTS = ("histc", "bincount")
_RESHAPES = ALIASES | {"reshape", "view", "flatten"}
_CONSTANT = "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor"

RULES = {
    **dict.fromkeys(_CONSTANT.split(), constant),
    **dict.fromkeys(("copy", "fill", "zero"), overwrite),
    "_weight_norm": weight_norm,
    "topk": topk,
    **dict.fromkeys(_COUNTS, histogram),
    "cumsum": running_total,
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), grouped_product),
}
