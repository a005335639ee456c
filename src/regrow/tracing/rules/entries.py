"""Rules for entrywise operations, whose operands are broadcast: aligned from the right."""

from torch.fx import Node

from regrow.core.axes import Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import ALIASES, op_name, operand_of, shapes_of
from regrow.tracing.walk import Dims, Walk


def pointwise(w: Walk, node: Node) -> Dims:
    """Rule for entrywise operations: ties dimensions at the same place; one of size 1 takes the other's."""
    operands = [arg for arg in node.all_input_nodes if isinstance(shapes_of(arg), tuple)]
    return broadcast(w, node, operands)


def broadcast(w: Walk, node: Node, operands: list[Node]) -> Dims:
    """Tie the dimensions of operands aligned from the right, and return the dimensions of the broadcast result."""
    rank = max((len(w.of(arg)) for arg in operands), default=0)
    out: list[Expr] = [d.ONE] * rank
    for arg in operands:
        dims = w.of(arg)
        for i, expr in enumerate(dims):
            place = rank - len(dims) + i
            w.role(arg, i, Role.SHIFTS if op_name(node) in ("add", "sub") else Role.SCALES)
            if d.size(expr) == 1:
                continue
            if d.size(out[place]) == 1:
                out[place] = expr
            else:
                d.unify(out[place], expr, w.why(node, "two dimensions meet that have no common form"))
    return tuple(out)


def prelu(w: Walk, node: Node) -> Dims:
    """Rule for PReLU: ties the slopes to the channels, unless there is one slope for all."""
    x, slope = operand_of(node), operand_of(node, 1)
    dims, own = w.of(x), w.of(slope)
    if own and d.size(own[0]) > 1:
        w.role(slope, 0, Role.SCALES)
        d.unify(dims[min(1, len(dims) - 1)], own[0], w.why(node, "slopes have another form than the channels"))
    return dims


def identity(w: Walk, node: Node) -> Dims:
    """Rule for casts, dropout and the like: the result has the dimensions of the first operand."""
    return w.of(operand_of(node))


_IDENTITIES = (
    "dropout feature_dropout alpha_dropout native_dropout zeros_like ones_like empty_like full_like rand_like "
    "randn_like bernoulli"
)
_MORE_POINTWISE = (
    "hardswish hardsigmoid hardtanh relu6 mish selu celu elu leaky_relu softplus softshrink hardshrink tanhshrink "
    "log_sigmoid logsigmoid threshold where masked_fill"
)

RULES = {
    **dict.fromkeys((*ALIASES, *_IDENTITIES.split()), identity),
    **dict.fromkeys(_MORE_POINTWISE.split(), pointwise),
    "prelu": prelu,
    "_prelu_kernel": prelu,
}
