"""Rules for operations that multiply and sum: linear and recurrent layers, products, convolutions, attention."""

from collections.abc import Sequence

from torch.fx import Node
from torch.fx.node import Argument

from regrow.core.axes import Mark, Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import argument, as_int, module_of, op_name, operand_of, operands_in, uncast
from regrow.tracing.walk import Dims, Rule, Value, Walk

# Alignment in bytes of each row of an expert's matrix, as torch's grouped matrix product requires.
ALIGNED = 16


def linear(w: Walk, node: Node) -> Dims:
    """Rule for linear layers: ties the input's last dimension to ``W``'s second and the bias to its first."""
    x, weight = operand_of(node, 0, "input"), operand_of(node, 1, "weight")
    _tie_contraction(w, node, (x, len(w.of(x)) - 1), (weight, 1))
    w.add_role(weight, 0, Role.PRODUCES)
    out = (*w.of(x)[:-1], w.of(weight)[0])
    _add_bias(w, node, argument(node, 2, "bias"), out)
    w.add_contraction(node, (x, weight), (*out, w.of(x)[-1]))
    return out


def addmm(w: Walk, node: Node) -> Dims:
    """Rule for ``b + x W``, with ``W`` as [..., in, out]: ties as a matrix product does, and b to the result."""
    out = matmul(w, node, first=1)
    _add_bias(w, node, node.args[0], out)
    return out


def matmul(w: Walk, node: Node, first: int = 0) -> Dims:
    """Rule for ``a @ b``: ties summed dimensions, and batches by broadcasting; ``first``: which argument is ``a``."""
    a, b = operand_of(node, first), operand_of(node, first + 1)
    left, right = w.of(a), w.of(b)
    _tie_contraction(w, node, (a, len(left) - 1), (b, max(len(right) - 2, 0)))
    if len(right) > 1:
        w.add_role(b, len(right) - 1, Role.PRODUCES)
    out: list[Expr] = []
    batches = left[:-2], right[:-2]
    for i in range(-max(map(len, batches)), 0):
        pair = [batch[i] for batch in batches if len(batch) >= -i and d.size(batch[i]) != 1]
        if len(pair) == 2:
            w.unify(node, pair[0], pair[1])
        out.append(pair[0] if pair else d.ONE)
    out += left[-2:-1] if len(left) > 1 else ()
    out += right[-1:] if len(right) > 1 else ()
    w.add_contraction(node, (a, b), (*out, left[-1]))
    return tuple(out)


def einsum(w: Walk, node: Node) -> Dims:
    """Rule for ``einsum``: ties dimensions of the same letter; letters missing in the result are summed over."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, list | tuple)
    tensors = operands_in(operands)
    terms, result = _parse_equation(equation, [len(w.of(tensor)) for tensor in tensors])
    exprs: dict[str, Expr] = {}
    for tensor, term in zip(tensors, terms, strict=True):
        for letter, expr in zip(term, w.of(tensor), strict=True):
            if term.count(letter) > 1:
                w.freeze(node, [expr])
            if d.size(exprs.get(letter, d.ONE)) == 1:
                exprs[letter] = expr
            elif d.size(expr) > 1:
                w.unify(node, exprs[letter], expr)
    for letter, expr in exprs.items():
        holders = {i: tensor for i, tensor in enumerate(tensors) if letter in terms[i]}
        summed = letter not in result and d.size(expr) > 1
        # A letter of several operands that stays multiplies them entry by entry.
        role = Role.SCALES if len(holders) > 1 else Role.PRODUCES
        if summed:
            role = Role.CONSUMES
        for i, tensor in holders.items():
            w.add_role(tensor, terms[i].index(letter), role)
        if summed:
            first = min(holders, key=lambda i: bool(w.source(tensors[i])))  # a computed one, if there is one
            others = [w.source(tensor) for i, tensor in holders.items() if i != first]
            w.add_reading(node, tensors[first], terms[first].index(letter), weight=next(filter(None, others), ""))
    w.add_contraction(node, tensors if len(tensors) > 1 else (), tuple(exprs.values()))
    return tuple(exprs[letter] for letter in result)


def _parse_equation(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of each operand, and of the result; ``ranks``: dimensions of each, to fill an ellipsis."""
    assert "->" in equation  # without it, the letters of the result would follow from those of the operands
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = "".join(map(chr, range(0x391, 0x3A0)))  # capital Greek: no equation uses them
    covers = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    written = [term.replace("...", spare[max(covers) - n : max(covers)]) for term, n in zip(terms, covers, strict=True)]
    return written, right.replace("...", spare[: max(covers)])


def _tie_contraction(w: Walk, node: Node, *summed: tuple[Node, int]) -> None:
    """Tie the two dimensions (operand, index) that are summed over; the first operand reads it, both consume it."""
    (x, i), (other, k) = summed
    w.unify(node, w.of(x)[i], w.of(other)[k])
    w.add_reading(node, x, i, weight=w.source(other))
    for operand, dim in summed:
        w.add_role(operand, dim, Role.CONSUMES)


def _tie_broadcast(w: Walk, node: Node, operand: Node, dims: Dims) -> None:
    """Tie an operand to the last of ``dims``, except for its dimensions of size 1, which are broadcast."""
    shape = w.of(operand)
    for expr, other in zip(shape, dims[len(dims) - len(shape) :], strict=True):
        if d.size(expr) > 1:
            w.unify(node, other, expr)


def _add_bias(w: Walk, node: Node, bias: Argument, out: Dims) -> None:
    """Tie a bias, if there is one, to the last dimensions of the result."""
    if isinstance(bias, Node):
        for i in range(len(w.of(bias))):
            w.add_role(bias, i, Role.SHIFTS)
        _tie_broadcast(w, node, bias, out)


def convolution(w: Walk, node: Node) -> Dims:
    """Rule for convolutions: ties input channels to ``W``'s second dimension (of one group) and output to its first."""
    x, weight = operand_of(node, 0, "input"), operand_of(node, 1, "weight")
    dims, kernel = w.of(x), w.of(weight)
    space = len(kernel) - 2
    *batch, channels = dims[: len(dims) - space]
    for expr in kernel[2:]:
        d.freeze(expr, "it is a kernel's extent")
    w.freeze(node, dims[len(dims) - space :])
    transposed = "transpose" in op_name(node)
    groups = as_int(argument(node, 6, "groups") or 1)
    out_channels = _tie_channels(w, node, channels, kernel, groups, transposed)
    w.add_role(weight, 0, Role.CONSUMES if transposed and groups == 1 else Role.PRODUCES)
    w.add_role(weight, 1, Role.PRODUCES if transposed else Role.CONSUMES)
    is_depthwise = groups > 1 and d.size(kernel[1]) == 1 and d.size(kernel[0]) == groups
    if not is_depthwise:
        w.add_reading(node, x, len(dims) - space - 1, weight=w.source(weight))
    out = (*batch, out_channels, *(w.frozen(node, n) for n in node.meta["val"].shape[-space:]))
    _add_bias(w, node, argument(node, 2, "bias"), (out_channels,))
    w.add_contraction(node, (weight,), (*out, kernel[0] if transposed else kernel[1], *kernel[2:]))
    return out


def _tie_channels(w: Walk, node: Node, channels: Expr, kernel: Dims, groups: int, transposed: bool) -> Expr:
    """Tie the input channels to the dimensions of a kernel, per group, and return the output channels."""
    first, second = (kernel[1], kernel[0]) if transposed else (kernel[0], kernel[1])
    if groups == 1:
        w.unify(node, channels, second)
        return first
    if transposed:
        w.freeze(node, [channels, *kernel[:2]])
        return w.frozen(node, d.size(kernel[1]) * groups)
    group = d.Leaf(groups)
    inner, outer = d.new(d.size(channels) // groups), d.new(d.size(first) // groups)
    w.unify(node, channels, d.times(group, inner))
    w.unify(node, first, d.times(group, outer))
    w.unify(node, inner, second)
    w.groups.append((module_of(node), group))
    return first


def attention(w: Walk, node: Node) -> Dims:
    """Rule for fused attention: ties query, key and value per head, and freezes the sequence that is attended over."""
    query = operand_of(node)
    q, k, v = w.of(query), w.of(operand_of(node, 1)), w.of(operand_of(node, 2))
    w.unify(node, q[-1], k[-1])
    w.unify(node, k[-2], v[-2])
    d.strengthen_mark(k[-2], Mark.COMPETED, w.why(node))
    w.freeze(node, [k[-2]])
    grouped = bool(argument(node, 7, "enable_gqa"))
    for i in range(len(q) - 2):
        w.unify(node, k[i], v[i])
        heads = k[i]
        if grouped and i == len(q) - 3 and d.size(q[i]) != d.size(heads):  # each key serves several queries
            heads = d.times(heads, d.Leaf(d.size(q[i]) // d.size(heads)))
        w.unify(node, q[i], heads)
    out = (*q[:-1], v[-1])
    if isinstance(mask := argument(node, 3), Node):
        _tie_broadcast(w, node, mask, (*q[:-1], k[-2]))
    w.add_reading(node, query, len(q) - 1)
    if argument(node, 6, "scale") is None:
        w.norms.append((node, "scale"))
    w.add_contraction(node, (), (*q, k[-2]), (*out, k[-2]))
    return out


def embedding(w: Walk, node: Node) -> Dims:
    """Rule for embeddings: freezes the vocabulary, and appends ``W``'s second dimension to the index's."""
    table, index = operand_of(node), operand_of(node, 1)
    w.freeze(node, [w.of(table)[0]])
    w.add_role(table, 1, Role.PRODUCES)
    if name := w.source(table):
        w.tables.append(name)
    return (*w.of(index), *w.of(table)[1:])


def grouped_product(w: Walk, node: Node) -> Dims:
    """Rule for the grouped product of experts, ``y[s] = x[s] W[e(s)]`` for row s, with ``W`` as [experts, in, out]."""
    x, weight, ends = (operand_of(node, i) for i in range(3))
    rows, kernel = w.of(x), w.of(weight)
    _tie_contraction(w, node, (x, 1), (weight, 1))
    w.unify(node, kernel[0], w.of(ends)[0])
    for expr in kernel[1:]:
        d.require_multiple(expr, max(1, ALIGNED // node.meta["val"].itemsize))
    w.add_role(weight, 0, Role.SCALES)
    w.add_role(weight, 2, Role.PRODUCES)
    w.add_contraction(node, (weight,), (rows[0], *kernel[1:]))
    return (rows[0], kernel[2])


# --- recurrent layers and cells: a hidden unit owns one row in each gate, and a column in whatever reads it -----------

# Operation → how many gates, blocks of hidden units, the rows of a weight consist of.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(w: Walk, node: Node) -> Value:
    """Rule for recurrent layers: freezes time, ties weights and states; returns output, last h and, of an LSTM, c."""
    assert getattr(node.target, "_overloadname", "") != "data" and len(node.args) == 9  # not for packed sequences
    x, states, params = operand_of(node), operands_in(node.args[1]), operands_in(node.args[2])
    biased, count, bidirectional, batch_first = (as_int(node.args[i]) for i in (3, 4, 7, 8))
    directions = 2 if bidirectional else 1
    each = len(params) // (count * directions)  # parameters per layer and direction
    *lead, read = w.of(x)
    time, batch = lead[::-1] if batch_first else lead
    w.freeze(node, [time])
    w.unify(node, batch, w.of(states[0])[1])
    results: list[Expr] = []
    hidden: list[Expr] = []
    for i in range(count * directions):
        weights = params[i * each : (i + 1) * each]
        units, result = _tie_direction(w, node, GATES[op_name(node)], weights, bool(biased), read, lead)
        hidden.append(units)
        results.append(result)
        # The input of later layers is no tensor of the graph: it can only be masked in the weight.
        operand, dim = (weights[0], 1) if i >= directions else (x, len(lead))
        w.add_reading(node, operand, dim, weight=w.source(weights[0]))
        if (i + 1) % directions == 0:
            read = d.plus(*results[-directions:])
    parts = [results, hidden][: len(states)]  # of h and, in an LSTM, c
    for units_of in parts:
        w.equal += [(units_of[0], other, w.why(node)) for other in units_of[1:]]
    for state, units_of in zip(states, parts, strict=True):
        _tie_initial_state(w, node, state, units_of)
    return [(*lead, read), *(_final_state(w, node, i, batch, units_of) for i, units_of in enumerate(parts, 1))]


def recurrent_cell(w: Walk, node: Node) -> Value:
    """Rule for recurrent cells, one step of a layer: ties weights and states; returns h and, of an LSTM, c."""
    _, state, *params = [*node.args, *node.kwargs.values()]
    x, states, weights = operand_of(node), operands_in(state), operands_in(params)
    batch, read = w.of(x)
    gates = GATES[op_name(node).removesuffix("_cell")]
    units, _ = _tie_direction(w, node, gates, weights, len(weights) > 2, read, [batch])
    w.add_reading(node, x, 1, weight=w.source(weights[0]))
    out = (batch, units)
    for before in states:
        for expr, other in zip(w.of(before), out, strict=True):
            w.unify(node, expr, other)
    return [out, out] if len(states) > 1 else out


def _tie_direction(
    w: Walk, node: Node, gates: int, params: Sequence[Node], biased: bool, read: Expr, lead: Sequence[Expr]
) -> tuple[Expr, Expr]:
    """Tie the weights of a layer's direction to its input ``read``; return its hidden units and its output.

    ``gates``: how many blocks of hidden units the rows of a weight have; ``params``: weights for input and state, their
    biases if ``biased``, and a projection, if any; ``lead``: the input's dimensions (time, batch) before ``read``.
    """
    weight_ih, weight_hh, *rest = params
    biases, projection = rest[: 2 * biased], rest[2 * biased :]
    units = d.Leaf(d.size(w.of(weight_ih)[0]) // gates)
    rows = d.times(w.frozen(node, gates), units)
    for param in (weight_ih, weight_hh, *biases):
        w.unify(node, w.of(param)[0], rows)
        w.add_role(param, 0, Role.SHIFTS if param in biases else Role.PRODUCES)
    result: Expr = units
    for param in projection:
        result = w.of(param)[0]
        w.unify(node, w.of(param)[1], units)
        w.add_role(param, 0, Role.PRODUCES)
        w.add_role(param, 1, Role.CONSUMES)
        w.add_reading(node, param, 1, weight=w.source(param))
    w.unify(node, w.of(weight_ih)[1], read)
    w.unify(node, w.of(weight_hh)[1], result)
    w.add_role(weight_ih, 1, Role.CONSUMES)
    w.add_role(weight_hh, 1, Role.CONSUMES)
    # Reads inside the fused operation can only be masked in the weights.
    w.add_reading(node, weight_hh, 1, weight=w.source(weight_hh))
    weights = (weight_ih, weight_hh, *projection)
    w.add_contraction(node, weights, *((*lead, *w.of(param)) for param in weights))
    return units, result


def _tie_initial_state(w: Walk, node: Node, state: Node, parts: list[Expr]) -> None:
    """Tie an initial state [layers × directions, batch, units] to ``parts``, the units of each layer and direction."""
    units = w.stacked.get(state)
    if units is None:
        units = [w.of(state)[-1]] * (1 if op_name(uncast(state)) in _ALIKE else len(parts))
    for expr, part in zip(units, parts, strict=False):
        w.unify(node, expr, part)


def _final_state(w: Walk, node: Node, position: int, batch: Expr, parts: list[Expr]) -> Dims:
    """Return the dimensions of a last state, result ``position``; ``parts``: the units of each layer and direction.

    Units of several layers are tied unless each layer's state is selected alone.
    """
    results = [user for user in node.users if user.args[1] == position]
    for result in results if len(parts) > 1 else ():
        if all(_is_per_layer(user, result) for user in result.users):
            w.stacked[result] = parts
        else:
            for other in parts[1:]:
                w.unify(node, parts[0], other)
    return (w.frozen(node, len(parts)), batch, parts[0])


def _is_per_layer(user: Node, state: Node) -> bool:
    """Whether ``user`` selects one layer's part of a state, or starts a recurrent layer from all of them."""
    if op_name(user) == "select":
        return as_int(user.args[1]) == 0
    return op_name(user) in GATES and state in user.all_input_nodes and state is not user.args[0]


# Operations that make constant tensors: as initial state they do not tie the units of different layers.
_ALIKE = frozenset(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like"))

RULES: dict[Rule, str] = {
    linear: "linear",
    addmm: "addmm baddbmm",
    matmul: "matmul mm bmm mv dot",
    convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    attention: "scaled_dot_product_attention",
    embedding: "embedding",
    einsum: "einsum",
    grouped_product: "_grouped_mm grouped_mm_fallback",
    recurrent: " ".join(GATES),
    recurrent_cell: " ".join(f"{name}_cell" for name in GATES),
}
