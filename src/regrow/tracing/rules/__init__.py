"""Rules of operations: how the dimensions of a result follow from those of operands; and the walk that applies them.

There is one small function per operation, in one table. Each takes the walk and the operation's node, ties or freezes
the dimensions of the operands, notes which it sums over, and returns the dimensions of the result (a list of them for
several results).
"""

from collections.abc import Mapping

import torch
from torch.fx import Node

from regrow.tracing import dimensions as d
from regrow.tracing.capture import Capture
from regrow.tracing.nodes import as_int, as_list, module_of, op_name, operand_of, shapes_of
from regrow.tracing.rules import contract, picks, reduce, shapes
from regrow.tracing.walk import Dims, Rule, Value, Walk, all_dims

_TABLES = (reduce.RULES, contract.RULES, shapes.RULES, picks.RULES)
# Operation name → rule. Operations that torch tags as pointwise need no entry.
RULES: dict[str, Rule] = {name: rule for table in _TABLES for rule, names in table.items() for name in names.split()}


def walk(capture: Capture, cautious: bool = True, merged: Walk | None = None) -> Walk:
    """Walk over a recorded graph and give every dimension an expression, by the rules of its operations.

    ``cautious``: freeze dimensions in data-dependent code, which may run other operations on other data. ``merged``:
    an earlier walk over another recording of the network, into which this one is merged.
    """
    w = Walk(capture) if merged is None else merged.continue_on(capture)
    state_dims = {name: merged.of(node) for node, name in merged.capture.states.items()} if merged is not None else {}
    if capture.decisions is not None:
        refusal = capture.refusal or "data decide what the network does"
        w.notes.append(f"recorded from one run, since torch.export refuses: {refusal}; other decisions were not seen")
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            w.dims[node] = _placeholder(w, node, state_dims)
        elif node.op == "output":
            for expr in (expr for out in node.all_input_nodes for expr in all_dims(w.dims[out])):
                d.freeze(expr, "it is an output of the model")
        elif node.op == "call_function":
            w.dims[node] = _apply_rule(w, node)
        else:
            w.dims[node] = w.fresh(node)
        if cautious and w.decided:
            w.freeze_passed_values(node)
    return w


def _placeholder(w: Walk, node: Node, state_dims: Mapping[str, Dims]) -> Value:
    """Return the dimensions of a placeholder: for a parameter or buffer from ``state_dims`` or free; else frozen."""
    shape = shapes_of(node)
    if isinstance(shape, tuple) and node in w.capture.states:
        return state_dims.get(w.capture.states[node]) or tuple(d.ONE if n == 1 else d.Leaf(n) for n in shape)
    origin = "a tensor that is no parameter or buffer" if node in w.capture.constants else "the model's input"
    return w.fresh(node, f"it is a dimension of {origin}")


def _apply_rule(w: Walk, node: Node) -> Value:
    """Return the dimensions of an operation's result by its rule; without one, freeze all that it reads and note it."""
    name = op_name(node)
    if name == "getitem":
        value = w.dims[operand_of(node)]
        return value[as_int(node.args[1])] if isinstance(value, list) else None
    rule = RULES.get(name)
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = reduce.pointwise
    if rule is not None and shapes_of(node) is not None:
        try:
            dims = rule(w, node)
            _assert_sizes(node, dims)
            return dims
        except _MISFITS:
            pass  # a form of the operation that the rule does not know: it counts as one without a rule
    if name.startswith("_assert"):
        return None
    free = [expr for read in node.all_input_nodes for expr in all_dims(w.dims[read]) if d.is_free(expr)]
    if free:
        w.freeze(node, free)
        w.notes.append(f"no rule fits {node.target} in {module_of(node) or 'the model'}: what it reads is frozen")
    return w.fresh(node)


# What a rule raises for a form of its operation that it does not know
_MISFITS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)


def _assert_sizes(node: Node, dims: Value) -> None:
    """Raise AssertionError or ValueError unless dimensions have the sizes of the node's value."""
    shape = shapes_of(node)
    assert isinstance(dims, list) == isinstance(shape, list)
    for expected, value in zip(as_list(shape), as_list(dims), strict=True):
        sizes = None if value is None else tuple(map(d.size, value))
        assert expected is None or sizes == expected, f"{node.target}: dimensions {sizes} for shape {expected}"
