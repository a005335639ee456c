"""What a change of an axis' size does besides cutting: divisors that a fold compensates, and new units that start at 0.

A new unit of a neutral axis has no effect where only weights read it, since these can be 0. On a folded axis, over
which a norm runs, its value itself must be 0 wherever it is read; that is followed here from operation to operation,
up to one that is not known to map 0 to 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import Argument

from regrow.core.axes import Fold, Mark, Role
from regrow.tracing import attributes
from regrow.tracing import dimensions as d
from regrow.tracing.nodes import (
    ALIASES,
    ZERO_PRESERVING,
    argument,
    as_ints,
    module_of,
    op_name,
    operand_of,
    operands_in,
    shapes_of,
    uncast,
    writes_in_place,
)
from regrow.tracing.walk import Dims, Reading, Value, Walk, all_dims


def find_folds(model: nn.Module, w: Walk) -> list[tuple[Dims, Fold]]:
    """Return (dimensions divided by, fold without ``over``) of each division by an axis size in ``w.norms``.

    In place, marks these dimensions as folded, and freezes those of divisions without a fold.
    """
    result: list[tuple[Dims, Fold]] = []
    weights: set[str] = set()
    for node, kind in w.norms:
        over = find_divisor_dims(w, node, kind)
        if not any(map(d.is_free, over)):
            continue
        candidates = _FOLDS[kind](model, w, node, over)
        if candidates and weights.isdisjoint(fold.weight for fold in candidates):  # a weight takes one fold
            for expr in over:
                d.strengthen_mark(expr, Mark.FOLDED, w.why(node))
            result += [(over, fold) for fold in candidates]
            weights |= {fold.weight for fold in candidates}
        else:
            w.freeze(node, over)
    return result


def find_divisor_dims(w: Walk, node: Node, kind: str) -> Dims:
    """Return the dimensions by whose size an operation divides; ``kind``: "mean", "rms_norm" or attention "scale"."""
    dims = w.first(node)
    if kind == "scale":
        return dims[-1:]
    if kind == "rms_norm":
        return dims[len(dims) - len(as_ints(node.args[1])) :]
    return tuple(dims[i % len(dims)] for i in as_ints(node.args[1])) if len(node.args) > 1 else dims


def _fold_fused_norm(model: nn.Module, w: Walk, node: Node, over: Dims) -> list[Fold]:
    """Return the fold of a ``rms_norm`` into its gain, if that is a weight and an attribute holds epsilon; else [].

    ``over``: the dimensions that the operation ``node`` divides by, here and in the other functions of this form.
    """
    value, weight = argument(node, 3), w.source(argument(node, 2))
    if not weight or not isinstance(value, int | float | None) or len(over) != 1:
        return []
    epsilon = attributes.find_epsilon(model, module_of(node), value)
    value = torch.finfo(node.meta["val"].dtype).eps if value is None else value
    return [Fold((), weight, epsilon=epsilon, value=float(value))] if epsilon else []


def _fold_written_norm(model: nn.Module, w: Walk, node: Node, over: Dims) -> list[Fold]:
    """Return the fold of a norm ``x · rsqrt(mean(x²) + ε) · γ``, or ``· (1 + γ)``, whose mean is ``node``; else []."""
    squared = operand_of(node)
    if len(over) != 1 or not _is_square(squared):
        return []
    added = _only_user(node, "add")
    root, power = _only_user(added, "rsqrt"), _only_user(added, "pow")
    if power is not None and power.args[1] == -0.5:
        root = power
    scaled = _only_user(root, "mul")
    gained = _only_user(scaled, "mul")
    value = added.args[1] if added is not None else None
    if scaled is None or gained is None or not isinstance(value, float):
        return []
    epsilon = attributes.find_epsilon(model, module_of(node), value)
    if not epsilon or _behind_casts(squared.args[0]) not in map(_behind_casts, scaled.args):
        return []
    gain = next((arg for arg in gained.all_input_nodes if _behind_casts(arg) is not scaled), None)
    weight, plus = _find_gain(w, gain)
    return [Fold((), weight, plus=plus, epsilon=epsilon, value=value)] if weight else []


def _fold_scale(model: nn.Module, w: Walk, node: Node, over: Dims) -> list[Fold]:
    """Return folds of the weight and bias of the layer that makes the query, if it makes nothing else; else []."""
    layer = node.args[0]
    while isinstance(layer, Node) and op_name(layer) in _RESHAPES and len(layer.users) == 1:
        layer = layer.args[0]
    if not isinstance(layer, Node) or op_name(layer) != "linear" or len(layer.users) != 1:
        return []
    states = operands_in(layer.args[1:])
    if any(state not in w.capture.states or len(state.users) != 1 for state in states):
        return []
    return [Fold((), w.capture.states[state], kind="scale") for state in states]


_RESHAPES = frozenset(("view", "reshape", "unflatten", "transpose", "permute", "contiguous", "clone"))

# Kind of division by a size → the function that finds its folds.
_FOLDS = {"mean": _fold_written_norm, "rms_norm": _fold_fused_norm, "scale": _fold_scale}


def _find_gain(w: Walk, node: Node | None) -> tuple[str, float]:
    """Return the weight γ and the number p of a gain ``γ + p`` (``node``); an empty name if there is no weight."""
    bare = _behind_casts(node)
    if not w.source(node) and bare is not None and op_name(bare) == "add":
        numbers = [arg for arg in bare.args if isinstance(arg, int | float)]
        operands = operands_in(bare.args)
        if len(operands) == len(numbers) == 1:
            return w.source(operands[0]), float(numbers[0])
    return w.source(node), 0.0


def _is_square(node: Node) -> bool:
    """Whether an operation squares its first operand."""
    name = op_name(node)
    power = name == "pow" and node.args[1] == 2
    return bool(power or name == "square" or (name == "mul" and node.args[0] is node.args[1]))


def _behind_casts(value: Argument) -> Node | None:
    """Return the node behind casts and copies; ``None`` for what is no node."""
    return uncast(value) if isinstance(value, Node) else None


def _only_user(node: Node | None, name: str) -> Node | None:
    """Return the only user of a node's value, through casts, if it is an operation of that name; else ``None``."""
    users = [user for user in node.users if op_name(user) != "_assert_tensor_metadata"] if node is not None else []
    if len(users) != 1:
        return None
    if op_name(users[0]) in ALIASES:
        return _only_user(users[0], name)
    return users[0] if op_name(users[0]) == name else None


def not_zero_initialisable(w: Walk, tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """Return leaf number → why its axis cannot be widened: new units would change the output, or never learn.

    ``tensors``: name → parameter or buffer; those that are not floating-point have no zeros to start from.
    """
    zeros = _propagate_zeros(w)
    result: dict[int, str] = {}
    for reading in w.readings:
        for leaf in d.leaves(w.of(reading.operand)[reading.dim]):
            if _is_disturbing(w, reading, leaf, zeros):
                result.setdefault(leaf.number, w.why(reading.node))
    for expr, weight in w.training_reads:
        for number in () if weight else _leaf_numbers((expr,)):
            result.setdefault(number, "in training it is read with no weight that could be 0")
    for node, name in w.capture.states.items():
        if name in tensors and not tensors[name].is_floating_point():
            for number in _leaf_numbers(w.of(node)):
                result.setdefault(number, f"{name} does not hold real numbers, of which some could be 0")
    return result


def _is_disturbing(w: Walk, reading: Reading, leaf: d.Leaf, zeros: Mapping[Node, frozenset[int]]) -> bool:
    """Whether new units of a leaf would change what an operation that reads them computes, or never learn there.

    ``zeros``: as :func:`_propagate_zeros` returns it.
    """
    if reading.groups is not None and leaf in d.leaves(reading.groups):
        return False  # a new group is normed by itself
    # Units are multiplied by units there, not by weights; or weights by weights, neither of which makes the units.
    is_unclear = op_name(reading.node) in _PRODUCTS and (not reading.weight or bool(w.source(reading.operand)))
    if reading.fill != 0 or is_unclear:
        return True
    if leaf.mark is Mark.FOLDED:  # its value itself must be 0: a norm runs over it
        return leaf.number not in zeros[reading.operand]
    return not reading.weight


def _propagate_zeros(w: Walk) -> dict[Node, frozenset[int]]:
    """Return node → numbers of the leaves at whose new units it is 0, if the weights that make these are 0."""
    zeros: dict[Node, frozenset[int]] = {}
    spoiled: set[int] = set()  # written into in place: whoever else sees the same memory is not 0 there either
    for node in w.capture.graph.nodes:
        inside = _leaf_numbers(w.dims.get(node))
        zeros[node] = inside & _zero_leaves(w, node, zeros) if inside else inside
        if writes_in_place(node):
            spoiled |= inside - zeros[node]
    return {node: leaves - spoiled for node, leaves in zeros.items()}


def _leaf_numbers(dims: Value) -> frozenset[int]:
    """Return the numbers of the leaves in a node's dimensions."""
    return frozenset(leaf.number for expr in all_dims(dims) for leaf in d.leaves(expr))


def _zero_leaves(w: Walk, node: Node, zeros: Mapping[Node, frozenset[int]]) -> frozenset[int]:
    """Return the numbers of the leaves at whose new units a node is 0, given those (``zeros``) of its operands."""
    none: frozenset[int] = frozenset()
    if node in w.capture.states:
        name, makes = w.capture.states[node], {Role.PRODUCES, Role.SHIFTS}
        return _leaf_numbers(tuple(expr for i, expr in enumerate(w.of(node)) if w.roles.get((name, i), set()) & makes))
    if node.op != "call_function":
        return none
    name = op_name(node)
    operands = [operand for operand in node.all_input_nodes if shapes_of(operand) is not None]
    common = _intersect_zeros(operands, zeros)
    match name:
        case "mul":
            return none.union(*(zeros[operand] for operand in operands))
        case "add" | "sub":
            return none if any(isinstance(x, int | float) and x for x in node.args[:2]) else common
        case "div":
            return common if len(operands) == 1 and operands[0] is node.args[0] else none
        case "pow":
            exponent = node.args[1]
            return common if isinstance(exponent, int | float) and exponent > 0 else none
        case "linear" | "conv1d" | "conv2d" | "conv3d":
            # A unit is 0 for any input if its weights and its bias are 0.
            states = operands_in(node.args[1:3])
            return _intersect_zeros(states, zeros) & _leaf_numbers(w.of(states[0])[:1])
        case "zeros_like":
            return _leaf_numbers(w.of(node))
        case "batch_norm":
            return _intersect_zeros(operands_in([node.args[i] for i in (0, 2, 3)]), zeros)
        case "embedding" | "rms_norm":
            return zeros[operand_of(node)]
    return common if name in ZERO_PRESERVING | _SUMS | ALIASES else none


def _intersect_zeros(nodes: list[Node], zeros: Mapping[Node, frozenset[int]]) -> frozenset[int]:
    """Return the numbers of the leaves at whose new units all nodes are 0; of no nodes, none."""
    return frozenset.intersection(*(zeros[node] for node in nodes)) if nodes else frozenset()


_PRODUCTS = frozenset(
    ("matmul", "mm", "bmm", "baddbmm", "addmm", "linear", "mv", "dot", "scaled_dot_product_attention")
)

_SUMMING = "square cat concat sum mean avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d"
# Further operations whose result is 0 where all operands are 0.
_SUMS = frozenset(_SUMMING.split())
