"""Rules for recurrent layers and cells (LSTM, GRU, RNN): ties gates, recurrent weights and states to the hidden units.

A hidden unit owns one row in each gate, and a column in whatever reads it: the layer's own recurrent weight, the next
layer, later operations. Its cell state and initial state are cut with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from regrow.core.axes import Role
from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import ALIASES, module_of, op_name, operand_of, operands_in, uncast, whole
from regrow.tracing.walk import Dims, Value, Walk

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Operation → how many gates, blocks of hidden units, the rows of a weight consist of."""


@dataclass(frozen=True)
class _Made:
    """The hidden units of one direction of one layer, and its output (a projection of them, or they themselves)."""

    units: Expr
    handed: Expr


def layers(w: Walk, node: Node) -> Value:
    """Rule for recurrent layers, of any number of layers and directions: freezes time, ties weights and states."""
    if getattr(node.target, "_overloadname", "") == "data":
        return _packed(w, node)
    assert len(node.args) == 9
    x, states, params = operand_of(node), operands_in(node.args[1]), operands_in(node.args[2])
    biased, many, both, batch_first = (whole(node.args[i]) for i in (3, 4, 7, 8))
    ways = 2 if both else 1
    each = len(params) // (many * ways)
    *lead, given = w.of(x)
    time, batch = lead[::-1] if batch_first else lead
    d.freeze(time, w.why(node, "a recurrent layer runs along it"))
    d.unify(batch, w.of(states[0])[1], w.why(node, "a state has another form than the sequences"))
    rows: list[_Made] = []
    for layer in range(many):
        directions: list[_Made] = []
        for way in range(ways):
            start = (layer * ways + way) * each
            directions.append(_tied(w, node, GATES[op_name(node)], params[start : start + each], bool(biased), given))
            if not layer:
                w.reads(node, x, len(lead), weight=w.source(params[start]))
            else:
                w.reads(node, params[start], 1, weight=w.source(params[start]))
            _count(w, node, params[start : start + each], lead)
        given = d.plus(*(one.handed for one in directions))
        rows += directions
    parts = [[one.handed for one in rows], [one.units for one in rows]][: len(states)]
    why = w.why(node, "the layers and directions of a recurrent layer must keep equally many units")
    for kind in parts:
        w.equal += [(kind[0], other, why) for other in kind[1:]]
    for one, kind in zip(states, parts, strict=True):
        _begin(w, node, one, kind)
    return [(*lead, given), *(_stacked(w, node, i, batch, kind) for i, kind in enumerate(parts, 1))]


def _packed(w: Walk, node: Node) -> Value:
    """Freeze everything that a recurrent layer reads from packed sequences, whose layout depends on data."""
    for one in node.all_input_nodes:
        for expr in w.of(one):
            d.freeze(expr, w.why(node, "a recurrent layer reads packed sequences"))
    return w.fresh(node, w.why(node, "made of packed sequences"))


def cell(w: Walk, node: Node) -> Value:
    """Rule for recurrent cells: one step of a layer."""
    _, state, *params = [*node.args, *node.kwargs.values()]
    x, states, own = operand_of(node), operands_in(state), [one for one in params if isinstance(one, Node)]
    batch, given = w.of(x)
    gates = GATES[op_name(node).removesuffix("_cell")]
    made = _tied(w, node, gates, own, len(own) > 2, given)
    w.reads(node, x, 1, weight=w.source(own[0]))
    _count(w, node, own, [batch])
    for one in states:
        for held, expr in zip(w.of(one), (batch, made.units), strict=True):
            d.unify(held, expr, w.why(node, "a state has another form than the hidden units"))
    out = (batch, made.units)
    return [out, out] if len(states) > 1 else out


def _tied(w: Walk, node: Node, gates: int, params: Sequence[Node], biased: bool, given: Expr) -> _Made:
    """Tie the weights of one direction of one layer to one another and to its input."""
    inner, back, *rest = params
    biases, projection = rest[: 2 * biased], rest[2 * biased :]
    units = d.Leaf(d.size(w.of(inner)[0]) // gates)
    why = w.why(node, "the weights of a recurrent layer have no common form")
    rows = d.times(d.frozen(gates, w.why(node, "it is the number of gates")), units)
    for one in (inner, back, *biases):
        d.unify(w.of(one)[0], rows, why)
        w.role(one, 0, Role.SHIFTS if one in biases else Role.PRODUCES)
    handed: Expr = units
    for one in projection:
        handed = w.of(one)[0]
        d.unify(w.of(one)[1], units, why)
        w.role(one, 0, Role.PRODUCES)
        w.role(one, 1, Role.CONSUMES)
        w.reads(node, one, 1, weight=w.source(one))
    d.unify(w.of(inner)[1], given, w.why(node, "a recurrent layer reads another form than it is given"))
    d.unify(w.of(back)[1], handed, why)
    w.role(inner, 1, Role.CONSUMES)
    w.role(back, 1, Role.CONSUMES)
    # Reads inside the fused operation can only be masked in the weights.
    w.reads(node, back, 1, weight=w.source(back))
    w.weights += [name for one in (inner, back, *projection) if (name := w.source(one)) and name not in w.weights]
    return _Made(units, handed)


def _count(w: Walk, node: Node, params: Sequence[Node], lead: Sequence[Expr]) -> None:
    for one in params:
        if len(w.of(one)) > 1:
            w.work.append((module_of(node), op_name(node), (*lead, *w.of(one))))


def _begin(w: Walk, node: Node, state: Node, parts: list[Expr]) -> None:
    """Tie an initial state ``[layers × directions, batch, units]`` to the units that start from it."""
    why = w.why(node, "a state has another form than the hidden units")
    held = w.stacked.get(state)
    if held is None:
        made = uncast(state)
        held = [w.of(state)[-1]] * (1 if made.op == "call_function" and op_name(made) in _ALIKE else len(parts))
    for own, part in zip(held, parts, strict=False):
        d.unify(own, part, why)


def _stacked(w: Walk, node: Node, place: int, batch: Expr, parts: list[Expr]) -> Dims:
    """Return the dimensions of a last state; units of several layers are tied unless each layer's is selected alone."""
    results = [user for user in node.users if user.args[1] == place]
    for result in results if len(parts) > 1 else ():
        if all(_picks(user, result) for user in result.users):
            w.stacked |= dict.fromkeys(_copies(result), parts)
        else:
            for other in parts[1:]:
                d.unify(parts[0], other, w.why(node, "states of several layers have no common form"))
    return (d.frozen(len(parts), w.why(node, "it is the number of layers and directions")), batch, parts[0])


def _picks(user: Node, state: Node) -> bool:
    """Whether an operation (or those behind copies) selects one layer's state, or starts a layer from all of them."""
    if op_name(user) in ALIASES:
        return all(_picks(one, user) for one in user.users)
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

RULES = {
    **dict.fromkeys(GATES, layers),
    **dict.fromkeys((f"{name}_cell" for name in GATES), cell),
}
