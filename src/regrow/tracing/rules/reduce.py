"""Rules for entrywise operations, and for those that sum, compare, order or normalise the entries of a dimension."""

from math import inf

from torch.fx import Node

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import (
    ALIASES,
    argument,
    as_int,
    as_ints,
    as_list,
    module_of,
    op_name,
    operand_of,
    result_shapes,
    shapes_of,
)
from regrow.tracing.walk import Dims, Rule, Value, Walk


def pointwise(w: Walk, node: Node) -> Dims:
    """Rule for entrywise operations: ties dimensions at the same place; one of size 1 takes the other's."""
    return broadcast(w, node, [arg for arg in node.all_input_nodes if isinstance(shapes_of(arg), tuple)])


def broadcast(w: Walk, node: Node, operands: list[Node]) -> Dims:
    """Tie the dimensions of operands aligned from the right, and return the dimensions of the broadcast result."""
    rank = max((len(w.of(arg)) for arg in operands), default=0)
    role = Role.SHIFTS if op_name(node) in ("add", "sub") else Role.SCALES
    out: list[Expr] = [d.ONE] * rank
    for arg in operands:
        dims = w.of(arg)
        for i, expr in enumerate(dims):
            index = rank - len(dims) + i
            w.add_role(arg, i, role)
            if d.size(out[index]) == 1:
                out[index] = expr
            elif d.size(expr) > 1:
                w.unify(node, out[index], expr)
    return tuple(out)


def prelu(w: Walk, node: Node) -> Dims:
    """Rule for PReLU: ties the slopes to the channels, unless there is one slope for all."""
    slope, dims = operand_of(node, 1), w.first(node)
    slopes = w.of(slope)
    if slopes and d.size(slopes[0]) > 1:
        w.add_role(slope, 0, Role.SCALES)
        w.unify(node, dims[min(1, len(dims) - 1)], slopes[0])
    return dims


def _reduced_dims(w: Walk, node: Node, position: int = 1) -> list[int]:
    """Return the indices of dimensions that ``dim`` or the argument at ``position`` names; all if it names none."""
    rank = len(w.first(node))
    over = argument(node, position, "dim", "dims")
    return list(range(rank)) if over is None or over == [] else [axis % rank for axis in as_ints(over)]


def _result_dims(w: Walk, node: Node, over: list[int]) -> Dims:
    """Return the dimensions of a reduction's result: without those in ``over``, or with size 1 there (``keepdim``)."""
    dims = w.first(node)
    keepdim = len(result_shapes(node)[0]) == len(dims)
    return tuple(d.ONE if i in over else expr for i, expr in enumerate(dims) if keepdim or i not in over)


def total(w: Walk, node: Node) -> Dims:
    """Rule for sums and means: dropped units count as 0; a mean's divisor needs a fold (found later)."""
    over = _reduced_dims(w, node)
    free = [i for i in over if d.is_free(w.first(node)[i])]
    for i in free:
        w.add_reading(node, operand_of(node), i)
    if free and op_name(node) == "mean":
        w.norms.append((node, "mean"))
    return _result_dims(w, node, over)


def _read_by_norm(w: Walk, node: Node, over: list[int]) -> None:
    """Record that a vector norm reads dimensions ``over``: at orders 1, 2 dropped units are 0; others freeze them."""
    order = node.args[1] if len(node.args) > 1 else 2
    for i in over:
        if order in (1, 2):
            w.add_reading(node, operand_of(node), i)
        else:
            w.freeze(node, [w.first(node)[i]])


def vector_norm(w: Walk, node: Node) -> Dims:
    """Rule for vector norms: of orders 1 and 2 dropped units count as 0; others freeze the dimensions."""
    over = _reduced_dims(w, node, 2)
    _read_by_norm(w, node, over)
    return _result_dims(w, node, over)


def renorm(w: Walk, node: Node) -> Dims:
    """Rule for ``renorm``, which scales each slice by its norm: reads the other dimensions as a vector norm does."""
    dims, along = w.first(node), _reduced_dims(w, node, 2)
    _read_by_norm(w, node, [i for i in range(len(dims)) if i not in along])
    return dims


def softmax(w: Walk, node: Node) -> Dims:
    """Rule for softmax: marks the dimension as competed; dropped units count as −∞."""
    for i in _reduced_dims(w, node):
        d.strengthen_mark(w.first(node)[i], Mark.COMPETED, w.why(node))
        w.add_reading(node, operand_of(node), i, -inf)
    return w.first(node)


def extreme(w: Walk, node: Node) -> Value:
    """Rule for maxima, minima and logsumexp: dropped units count as ∓∞; freezes the dimension if positions are used."""
    if len(node.args) > 1 and isinstance(node.args[1], Node):  # max(x, y) of two tensors
        return pointwise(w, node)
    over, dims = _reduced_dims(w, node), w.first(node)
    fill = inf if op_name(node) in ("amin", "min") else -inf
    several = isinstance(shapes_of(node), list)  # values, and their positions
    if several and any(user.args[1] == 1 and user.users for user in node.users):
        w.freeze(node, (dims[i] for i in over))
    for i in over:
        d.strengthen_mark(dims[i], Mark.COMPETED, w.why(node))
        w.add_reading(node, operand_of(node), i, fill)
    left = _result_dims(w, node, over)
    return [left, left] if several else left


def ordered(w: Walk, node: Node) -> Value:
    """Rule for operations that depend on the order or number of entries (sort, var, flip): freezes the dimension."""
    dims, name = w.first(node), op_name(node)
    position = 2 if name in ("kthvalue", "roll", "diff") else 1  # of the argument that names the dimension
    named = len(node.args) > position or {"dim", "dims"} & node.kwargs.keys()
    last = name in ("sort", "argsort", "kthvalue", "median", "mode") and not named
    over = [len(dims) - 1] if last else _reduced_dims(w, node, position)
    w.freeze(node, (dims[i] for i in over))
    shapes = as_list(shapes_of(node))
    if shapes[0] != tuple(map(d.size, dims)):
        return w.fresh(node)
    return [dims for _ in shapes] if isinstance(shapes_of(node), list) else dims


def batch_norm(w: Walk, node: Node) -> Dims:
    """Rule for batch and instance norm: ties gain, bias and running statistics to the channels."""
    dims = w.first(node)
    if node.args[3] is None or node.args[5]:  # statistics are taken from the entries, of a weight, say
        w.freeze(node, [*dims[:1], *dims[2:]])
    roles = (Role.SCALES, Role.SHIFTS, Role.SHIFTS, Role.SCALES)  # gain, bias, running mean and variance
    for role, arg in zip(roles, node.args[1:5], strict=False):
        if isinstance(arg, Node):
            w.add_role(arg, 0, role)
            w.unify(node, dims[1], w.of(arg)[0])
    return dims


def norm(w: Walk, node: Node) -> Dims:
    """Rule for layer norm, taken over the kept units (restated), and root-mean-square norm, divided by their number."""
    dims, rank, root = w.first(node), len(as_ints(node.args[1])), op_name(node) == "rms_norm"
    over = dims[len(dims) - rank :]
    _tie_affine(w, node, over)
    if rank == 1:
        w.add_literal(node, d.size(over[0]), over[0], last=True)
    else:
        w.freeze(node, over)
    for i, expr in enumerate(over, len(dims) - rank):
        d.strengthen_mark(expr, Mark.FOLDED if root else Mark.RESTATED, w.why(node))
        w.add_reading(node, operand_of(node), i, 0.0 if root else None)
    if root:
        w.norms.append((node, "rms_norm"))
    return dims


def _tie_affine(w: Walk, node: Node, over: Dims) -> None:
    """Tie a norm's gain and bias to the dimensions that it runs over."""
    for arg, role in zip(node.args[2:4], (Role.SCALES, Role.SHIFTS), strict=False):
        if isinstance(arg, Node):
            for i, (expr, gain) in enumerate(zip(over, w.of(arg), strict=True)):
                w.add_role(arg, i, role)
                w.unify(node, expr, gain)


def group_norm(w: Walk, node: Node) -> Dims:
    """Rule for group norm: whole groups can be cut; inside a group the norm is taken over kept units (restated)."""
    groups, dims = as_int(node.args[1]), w.first(node)
    group, inner = d.new(groups), d.new(d.size(dims[1]) // groups)
    channels = d.times(group, inner)
    w.unify(node, dims[1], channels)
    _tie_affine(w, node, (channels,))
    d.strengthen_mark(inner, Mark.RESTATED, w.why(node))
    if groups > 1:
        w.groups.append((module_of(node), group))
    w.add_reading(node, operand_of(node), 1, None, groups=group)
    return dims


RULES: dict[Rule, str] = {
    Walk.first: (
        "dropout feature_dropout alpha_dropout native_dropout zeros_like ones_like empty_like full_like rand_like "
        f"randn_like bernoulli {' '.join(ALIASES)}"
    ),
    pointwise: (
        "hardswish hardsigmoid hardtanh relu6 mish selu celu elu leaky_relu softplus softshrink hardshrink tanhshrink "
        "log_sigmoid logsigmoid threshold where masked_fill copy fill zero"
    ),
    prelu: "prelu _prelu_kernel",
    total: "sum mean",
    vector_norm: "linalg_vector_norm norm",
    renorm: "renorm",
    softmax: "softmax log_softmax _softmax _log_softmax",
    extreme: "amax max logsumexp amin min",
    ordered: (
        "cumprod logcumsumexp cummax cummin flip roll sort argsort kthvalue median mode var std var_mean std_mean "
        "argmax argmin prod any all nanmean diff"
    ),
    batch_norm: "batch_norm instance_norm",
    norm: "layer_norm rms_norm",
    group_norm: "group_norm",
}
