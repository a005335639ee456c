"""Find the axes whose new units can be zero-initialised, so that they do not change the network's output at first.

A new unit of a neutral axis has no effect where only weights read it, since these can be 0. On a folded axis, over
which a norm runs, its value itself must be 0 wherever it is read; that is followed here from operation to operation,
up to one that is not known to map 0 to 0.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Node

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.nodes import ALIASES, ZERO_PRESERVING, op_name, operand_of, shapes_of
from regrow.tracing.walk import Reading, Value, Walk, all_dims


def not_zero_initialisable(w: Walk, tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Return leaf number → why its new units would change the output or could never learn; others can be widened.

    Args:
        w: A finished walk.
        tensors: The network's parameters and buffers by name.
    """
    zeros = _zeros(w)
    result: dict[int, str] = {}
    for one in w.readings:
        for leaf in d.leaves(w.of(one.operand)[one.dim]):
            if reason := _reason(w, one, leaf, zeros):
                result.setdefault(leaf.number, reason)
    for expr, weight in w.also:
        for leaf in d.leaves(expr) if not weight else ():
            result.setdefault(leaf.number, "in training it is read with no weight that could be 0")
    for node, name in w.capture.states.items():
        if name in tensors and not tensors[name].is_floating_point():
            for expr in w.of(node):
                for leaf in d.leaves(expr):
                    result.setdefault(leaf.number, f"{name} does not hold real numbers, of which some could be 0")
    return result


def _reason(w: Walk, one: Reading, leaf: d.Leaf, zeros: Mapping[Node, frozenset[int]]) -> str:
    if one.groups is not None and leaf in d.leaves(one.groups):
        return ""  # a new group is normed by itself
    if one.fill != 0:
        return w.why(one.node, "it would be taken over new units too")
    meeting = op_name(one.node) in _MEETINGS
    if meeting and not one.weight:
        return w.why(one.node, "its units meet units there, not weights")
    if meeting and w.source(one.operand):
        return w.why(one.node, "weights meet weights there, and neither makes its units")
    if leaf.mark is Mark.FOLDED and leaf.number not in zeros[one.operand]:
        return w.why(one.node, "new units are not known to be 0 there")
    if leaf.mark is not Mark.FOLDED and not one.weight:
        return w.why(one.node, "it reads new units with no weight that could be 0")
    return ""


def _zeros(w: Walk) -> dict[Node, frozenset[int]]:
    """Return node → the leaves on which its value is 0 if the weights that make and shift new units are 0."""
    zeros: dict[Node, frozenset[int]] = {}
    spoiled: set[int] = set()  # written into in place: whoever else sees the same memory is not 0 there either
    for node in w.capture.graph.nodes:
        dims = w.dims.get(node)
        carried = _carried(dims)
        zeros[node] = frozenset(carried & _known(w, node, zeros)) if carried else frozenset()
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            spoiled |= carried - zeros[node]
    return {node: known - spoiled for node, known in zeros.items()}


def _carried(dims: Value) -> set[int]:
    return {leaf.number for expr in all_dims(dims) for leaf in d.leaves(expr)}


def _known(w: Walk, node: Node, zeros: Mapping[Node, frozenset[int]]) -> set[int]:
    if node in w.capture.states:
        name = w.capture.states[node]
        return {
            leaf.number
            for dim, expr in enumerate(w.of(node))
            if w.roles.get((name, dim), set()) & {Role.PRODUCES, Role.SHIFTS}
            for leaf in d.leaves(expr)
        }
    if node.op != "call_function":
        return set()
    name = op_name(node)
    operands = [one for one in node.all_input_nodes if isinstance(shapes_of(one), tuple | list)]
    common = set.intersection(*({*zeros[one]} for one in operands)) if operands else set()
    match name:
        case "mul":
            return set().union(*(zeros[one] for one in operands))
        case "add" | "sub":
            numbers = [value for value in node.args[:2] if isinstance(value, int | float)]
            return set() if any(numbers) else common
        case "div":
            return {*zeros[operands[0]]} if len(operands) == 1 and operands[0] is node.args[0] else set()
        case "pow":
            exponent = node.args[1]
            return common if isinstance(exponent, int | float) and exponent > 0 else set()
        case "linear" | "conv1d" | "conv2d" | "conv3d":
            # A unit is 0 for any input if its weights and its bias are 0.
            made = [one for one in node.args[1:3] if isinstance(one, Node)]
            return set.intersection(*({*zeros[one]} for one in made)) & _carried((w.of(made[0])[0],))
        case "zeros_like":
            return _carried(w.of(node))
        case "batch_norm":
            shifts = [one for i in (0, 2, 3) if isinstance(one := node.args[i], Node)]
            return set.intersection(*({*zeros[one]} for one in shifts))
        case "embedding" | "rms_norm":
            return {*zeros[operand_of(node)]}
    return common if name in ZERO_PRESERVING | _SUMS | ALIASES else set()


_MEETINGS = frozenset(
    ("matmul", "mm", "bmm", "baddbmm", "addmm", "linear", "mv", "dot", "scaled_dot_product_attention")
)

_MORE = "square cat concat sum mean avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d"
_SUMS = frozenset(_MORE.split())
"""Further operations whose result is 0 where all operands are 0."""
