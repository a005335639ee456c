"""Rules for normalisations: batch, layer, root-mean-square and group norms."""

from torch.fx import Node

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import module_of, op_name, operand_of, whole, wholes
from regrow.tracing.walk import Dims, Literal, Walk


def batch_norm(w: Walk, node: Node) -> Dims:
    """Rule for batch and instance norm: ties gain, bias and running statistics to the channels.

    If statistics are taken from the entries, every dimension but the channels is frozen (a weight that is
    standardised).
    """
    dims = w.of(operand_of(node))
    if node.args[3] is None or node.args[5]:  # no running mean, or not used
        for expr in (*dims[:1], *dims[2:]):
            d.freeze(expr, w.why(node, f"`{op_name(node)}` takes mean and variance over it"))
    for place, arg in enumerate(node.args[1:5]):
        if isinstance(arg, Node):
            w.role(arg, 0, Role.SHIFTS if place in (1, 2) else Role.SCALES)  # the bias and the running mean
            d.unify(dims[1], w.of(arg)[0], w.why(node, "a norm's channels have another form than its input's"))
    return dims


def layer_norm(w: Walk, node: Node) -> Dims:
    """Rule for layer norm: marks the last dimensions as restated, since mean and variance are taken over kept units."""
    dims = _affine(w, node, Mark.RESTATED, "a layer norm runs over it")
    for i in range(len(dims) - _rank(node), len(dims)):
        w.reads(node, operand_of(node), i, None)
    return dims


def rms_norm(w: Walk, node: Node) -> Dims:
    """Rule for root-mean-square norm: marks the last dimensions as folded, since their size is a divisor."""
    dims = _affine(w, node, Mark.FOLDED, "a root-mean-square norm runs over it")
    for i in range(len(dims) - _rank(node), len(dims)):
        w.reads(node, operand_of(node), i)
    w.norms.append((node, "rms_norm"))
    return dims


def _rank(node: Node) -> int:
    """Return over how many of the last dimensions a norm runs."""
    return len(wholes(node.args[1]))


def _affine(w: Walk, node: Node, kind: Mark, what: str) -> Dims:
    dims, rank = w.of(operand_of(node)), _rank(node)
    over = dims[len(dims) - rank :]
    for place, arg in enumerate(node.args[2:4]):
        if isinstance(arg, Node):
            for i, (expr, own) in enumerate(zip(over, w.of(arg), strict=True)):
                w.role(arg, i, Role.SHIFTS if place else Role.SCALES)
                d.unify(expr, own, w.why(node, "a norm's gain has another form than its input"))
    if rank == 1:
        w.literals.append(Literal(module_of(node), d.size(over[0]), over[0], last=True))
    else:
        for expr in over:
            d.freeze(expr, w.why(node, "a norm runs over several dimensions at once"))
    for expr in over:
        d.mark(expr, kind, w.why(node, what))
    return dims


def group_norm(w: Walk, node: Node) -> Dims:
    """Rule for group norm: whole groups can be cut; inside a group the norm is taken over kept units (restated)."""
    x, groups = operand_of(node), whole(node.args[1])
    dims = w.of(x)
    group: Expr = d.Leaf(groups) if groups > 1 else d.ONE
    inner: Expr = d.Leaf(d.size(dims[1]) // groups) if d.size(dims[1]) > groups else d.ONE
    channels = d.times(group, inner)
    d.unify(dims[1], channels, w.why(node, "a norm's groups do not divide its input"))
    for place, arg in enumerate(node.args[2:4]):
        if isinstance(arg, Node):
            w.role(arg, 0, Role.SHIFTS if place else Role.SCALES)
            d.unify(channels, w.of(arg)[0], w.why(node, "a norm's gain has another form than its input"))
    d.mark(inner, Mark.RESTATED, w.why(node, "a group norm runs over it inside each group"))
    if groups > 1:
        w.groups.append((module_of(node), group))
    w.reads(node, x, 1, None, groups=group)
    return dims


RULES = {
    "batch_norm": batch_norm,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "instance_norm": batch_norm,
}
