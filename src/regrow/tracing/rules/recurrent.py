"""Rules for recurrent layers and cells (LSTM, GRU, RNN): ties gates, recurrent weights and states to the hidden units.

A hidden unit owns one row in each gate, and a column in whatever reads it: the layer's own recurrent weight, the next
layer, later operations. Its cell state and initial state are cut with it.
"""

from collections.abc import Iterator, Sequence

from torch.fx import Node

from regrow.core.axes import Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import ALIASES, op_name, operand_of, operands_in, uncast, whole
from regrow.tracing.walk import Dims, Rule, Value, Walk

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Operation → how many gates, blocks of hidden units, the rows of a weight consist of."""


def layers(w: Walk, node: Node) -> Value:
    """Rule for recurrent layers, of any number of layers and directions: freezes time, ties weights and states."""
    if getattr(node.target, "_overloadname", "") == "data":
        for operand in node.all_input_nodes:
            w.freeze(node, "a recurrent layer reads packed sequences", *w.of(operand))
        return w.fresh(node, w.why(node, "made of packed sequences"))
    assert len(node.args) == 9
    x, states, params = operand_of(node), operands_in(node.args[1]), operands_in(node.args[2])
    biased, many, both, batch_first = (whole(node.args[i]) for i in (3, 4, 7, 8))
    ways = 2 if both else 1
    each = len(params) // (many * ways)
    *lead, read = w.of(x)
    time, batch = lead[::-1] if batch_first else lead
    w.freeze(node, "a recurrent layer runs along it", time)
    w.unify(node, batch, w.of(states[0])[1], "a state has another form than the sequences")
    results: list[Expr] = []
    hidden: list[Expr] = []
    for layer in range(many):
        for way in range(ways):
            start = (layer * ways + way) * each
            weights = params[start : start + each]
            units, result = _tied(w, node, GATES[op_name(node)], weights, bool(biased), read, lead)
            hidden.append(units)
            results.append(result)
            operand, dim = (weights[0], 1) if layer else (x, len(lead))
            w.reads(node, operand, dim, weight=w.source(weights[0]))
        read = d.plus(*results[-ways:])
    parts = [results, hidden][: len(states)]
    why = w.why(node, "the layers and directions of a recurrent layer must keep equally many units")
    for units_of in parts:
        w.equal += [(units_of[0], other, why) for other in units_of[1:]]
    for state, units_of in zip(states, parts, strict=True):
        _begin(w, node, state, units_of)
    return [(*lead, read), *(_stacked(w, node, i, batch, units_of) for i, units_of in enumerate(parts, 1))]


def cell(w: Walk, node: Node) -> Value:
    """Rule for recurrent cells: one step of a layer."""
    _, state, *params = [*node.args, *node.kwargs.values()]
    x, states, weights = operand_of(node), operands_in(state), operands_in(params)
    batch, read = w.of(x)
    gates = GATES[op_name(node).removesuffix("_cell")]
    units, _ = _tied(w, node, gates, weights, len(weights) > 2, read, [batch])
    w.reads(node, x, 1, weight=w.source(weights[0]))
    out = (batch, units)
    for before in states:
        for expr, other in zip(w.of(before), out, strict=True):
            w.unify(node, expr, other, "a state has another form than the hidden units")
    return [out, out] if len(states) > 1 else out


def _tied(
    w: Walk, node: Node, gates: int, params: Sequence[Node], biased: bool, read: Expr, lead: Sequence[Expr]
) -> tuple[Expr, Expr]:
    """Tie the weights of a layer's direction to one another and its input; return its hidden units and its output."""
    inner, back, *rest = params
    biases, projection = rest[: 2 * biased], rest[2 * biased :]
    units = d.Leaf(d.size(w.of(inner)[0]) // gates)
    why = "the weights of a recurrent layer have no common form"
    rows = d.times(w.frozen(node, gates, "it is the number of gates"), units)
    for param in (inner, back, *biases):
        w.unify(node, w.of(param)[0], rows, why)
        w.role(param, 0, Role.SHIFTS if param in biases else Role.PRODUCES)
    result: Expr = units
    for param in projection:
        result = w.of(param)[0]
        w.unify(node, w.of(param)[1], units, why)
        w.role(param, 0, Role.PRODUCES)
        w.role(param, 1, Role.CONSUMES)
        w.reads(node, param, 1, weight=w.source(param))
    w.unify(node, w.of(inner)[1], read, "a recurrent layer reads another form than it is given")
    w.unify(node, w.of(back)[1], result, why)
    w.role(inner, 1, Role.CONSUMES)
    w.role(back, 1, Role.CONSUMES)
    # Reads inside the fused operation can only be masked in the weights.
    w.reads(node, back, 1, weight=w.source(back))
    weights = (inner, back, *projection)
    w.contracts(node, weights, *((*lead, *w.of(param)) for param in weights))
    return units, result


def _begin(w: Walk, node: Node, state: Node, parts: list[Expr]) -> None:
    """Tie an initial state ``[layers × directions, batch, units]`` to the units that start from it."""
    held = w.stacked.get(state)
    if held is None:
        made = uncast(state)
        held = [w.of(state)[-1]] * (1 if made.op == "call_function" and op_name(made) in _ALIKE else len(parts))
    for expr, part in zip(held, parts, strict=False):
        w.unify(node, expr, part, "a state has another form than the hidden units")


def _stacked(w: Walk, node: Node, position: int, batch: Expr, parts: list[Expr]) -> Dims:
    """Return the dimensions of a last state; units of several layers are tied unless each layer's is selected alone."""
    results = [user for user in node.users if user.args[1] == position]
    for result in results if len(parts) > 1 else ():
        if all(_picks(user, result) for user in result.users):
            w.stacked |= dict.fromkeys(_copies(result), parts)
        else:
            for other in parts[1:]:
                w.unify(node, parts[0], other, "states of several layers have no common form")
    return (w.frozen(node, len(parts), "it is the number of layers and directions"), batch, parts[0])


def _picks(user: Node, state: Node) -> bool:
    """Whether an operation (or those behind copies) selects one layer's state, or starts a layer from all of them."""
    if op_name(user) in ALIASES:
        return all(_picks(reader, user) for reader in user.users)
    if op_name(user) == "select":
        return bool(user.args[1] == 0)
    return op_name(user) in GATES and state in user.all_input_nodes and state is not user.args[0]


def _copies(state: Node) -> Iterator[Node]:
    yield state
    for user in state.users:
        if op_name(user) in ALIASES:
            yield from _copies(user)


_ALIKE = frozenset(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like"))
"""Operations that make constant tensors: as initial state they do not tie the units of different layers."""

RULES: dict[Rule, str] = {layers: " ".join(GATES), cell: " ".join(f"{name}_cell" for name in GATES)}
