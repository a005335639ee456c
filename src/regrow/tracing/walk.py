"""Walk over a recorded graph once, and give every dimension of every tensor a symbolic expression."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch.fx import Node

from regrow.core.axes import Role
from regrow.tracing import dimensions as d
from regrow.tracing.capture import Capture
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import ALIASES, module_of, op_name, operand_of, shapes_of, whole, wholes

Dims = tuple[Expr, ...]
Value = Dims | list[Dims | None] | None
"""The dimensions of a tensor; a list of them for several values; ``None`` for what is no tensor."""


@dataclass(frozen=True)
class Reading:
    """A dimension that an operation sums, compares or normalises over, so that dropped units must be masked there.

    Args:
        node: The operation.
        operand: The node whose value is read.
        dim: The index of the dimension in it.
        fill: The value that a dropped unit counts as (0 or ±∞); ``None``: the operation runs over the kept units.
        weight: The name of the parameter it is multiplied with; empty if there is none.
        groups: The dimension of groups, where the operation runs inside each group; else ``None``.
    """

    node: Node
    operand: Node
    dim: int
    fill: float | None
    weight: str = ""
    groups: Expr | None = None


@dataclass(frozen=True)
class Literal:
    """A number that a module passed as a size, and the dimension it is the size of.

    Args:
        module: The path of the module.
        number: The number.
        expr: The dimension it was the size of.
        last: Whether it was the last number of a reshape (a width, not a number of heads).
    """

    module: str
    number: int
    expr: Expr
    last: bool = False


@dataclass
class Walk:
    """State and results of a walk over a recorded graph; only rules change it, through its methods and lists.

    Args:
        capture: The recording.
        dims: Node → the dimensions of its tensor, or a list of them for several tensors.
        roles: (name of a parameter or buffer, dimension) → its roles.
        readings: Dimensions that operations sum or compare over.
        work: (module, operation, dimensions) of each contraction.
        literals: Numbers that modules passed as sizes.
        groups: (module, dimension of groups) of grouped convolutions and norms.
        starts: Slice → the dimension that lies before it.
        picks: ``topk`` operation → the dimension it picks from.
        stacked: Tensor whose entries along its first dimension have different last dimensions → these.
        equal: Pairs of dimensions that must keep equally many units, and why.
        norms: (operation, kind) of each division by an axis size.
        weights: Names of the weights of contractions.
        tables: Names of embedding tables.
        notes: Remarks for the user on what could not be analysed.
        decided: Module → the operation by which its code got a data-dependent number.
        also: Dimensions that are read in training, and the name of the weight they are multiplied with.
        computed: Node → whether it is computed from parameters, buffers and constants alone.
    """

    capture: Capture
    dims: dict[Node, Value] = field(default_factory=dict)
    roles: dict[tuple[str, int], set[Role]] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    work: list[tuple[str, str, Dims]] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    groups: list[tuple[str, Expr]] = field(default_factory=list)
    starts: dict[Node, Expr] = field(default_factory=dict)
    picks: dict[Node, Expr] = field(default_factory=dict)
    stacked: dict[Node, list[Expr]] = field(default_factory=dict)
    equal: list[tuple[Expr, Expr, str]] = field(default_factory=list)
    norms: list[tuple[Node, str]] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    decided: dict[str, str] = field(default_factory=dict)
    also: list[tuple[Expr, str]] = field(default_factory=list)
    computed: dict[Node, bool] = field(default_factory=dict)

    def of(self, node: Node) -> Dims:
        """Return the dimensions of a node's value, which must be one tensor."""
        dims = self.dims[node]
        assert isinstance(dims, tuple)
        return dims

    def source(self, node: object) -> str:
        """Return the name of the parameter or buffer that a node is, possibly cast or transposed; empty if computed."""
        place = self.place(node, 0)
        return place[0] if place else ""

    def place(self, node: object, dim: int) -> tuple[str, int] | None:
        """Return the parameter or buffer, and its dimension, that a node's dimension is; ``None`` if it is computed.

        Args:
            node: A node of the graph, or any other argument.
            dim: The index of the dimension.
        """
        if not isinstance(node, Node):
            return None
        if node in self.capture.states:
            return self.capture.states[node], dim
        if node.op != "call_function":
            return None
        name = op_name(node)
        operand = node.args[0] if node.args else None
        if name in ALIASES:
            return self.place(operand, dim)
        rank = len(self.dims[node] or ())
        if name in ("mT", "mH", "adjoint"):
            return self.place(operand, {rank - 1: rank - 2, rank - 2: rank - 1}.get(dim, dim))
        if name in ("t", "numpy_T"):
            return self.place(operand, rank - 1 - dim)
        if name in ("transpose", "swapaxes"):
            a, b = (whole(node.args[i]) % rank for i in (1, 2))
            return self.place(operand, {a: b, b: a}.get(dim, dim))
        if name == "permute":
            return self.place(operand, wholes(node.args[1])[dim] % rank)
        return None

    def role(self, node: object, dim: int, role: Role) -> None:
        """Record the role of a parameter's dimension, if the node is a parameter or computed from some entry by entry.

        Args:
            node: The node; anything that is no parameter is ignored.
            dim: The index of the dimension.
            role: The role.
        """
        if not isinstance(node, Node):
            return
        if place := self.place(node, dim):
            self.roles.setdefault(place, set()).add(role)
        elif node.op == "call_function" and op_name(node) in _ENTRYWISE and self.of_states(node):
            for one in node.all_input_nodes:
                aligned = dim - len(self.of(node)) + len(self.of(one))
                if aligned >= 0 and d.size(self.of(one)[aligned]) == d.size(self.of(node)[dim]):
                    self.role(one, aligned, role)

    def of_states(self, node: Node) -> bool:
        """Whether a node's value is computed from parameters, buffers and constants alone."""
        if node not in self.computed:
            known = node in self.capture.states or node in self.capture.constants
            self.computed[node] = known or (
                node.op == "call_function"
                and bool(node.all_input_nodes)
                and all(map(self.of_states, node.all_input_nodes))
            )
        return self.computed[node]

    def reads(
        self,
        node: Node,
        operand: Node,
        dim: int,
        fill: float | None = 0.0,
        weight: str = "",
        groups: Expr | None = None,
    ) -> None:
        """Record that an operation sums or compares over a dimension of an operand, as in :class:`Reading`.

        Args:
            node: The operation.
            operand: The node whose value it reads.
            dim: The index of the dimension in it.
            fill: The value that a dropped unit counts as; ``None``: the operation runs over the kept units.
            weight: The name of the weight it meets there, if any.
            groups: The dimension of a group norm's groups.
        """
        self.readings.append(Reading(node, operand, dim, fill, weight, groups))

    def passed_on(self, node: Node) -> None:
        """Freeze what a module whose code depends on data passes to a node; values inside its children stay free."""
        for one in node.all_input_nodes:
            between = _around(module_of(one), module_of(node))
            if between in self.decided and one.op != "placeholder":
                where = between or "the model"
                for expr in all_dims(self.dims[one]):
                    d.freeze(expr, f"data decide what is done with it, by `{self.decided[between]}` in {where}")

    def why(self, node: Node, what: str) -> str:
        """Return the reason ``what`` with the operation and the module added, for reports of frozen axes."""
        module = module_of(node)
        return f"{what} ({op_name(node)} in {module or 'the model'})"

    def fresh(self, node: Node, what: str) -> Value:
        """Return new dimensions in the shape of the node's value, frozen for the reason ``what``."""
        shape = shapes_of(node)
        if isinstance(shape, list):
            return [None if s is None else tuple(d.frozen(n, what) for n in s) for s in shape]
        return None if shape is None else tuple(d.frozen(n, what) for n in shape)


def _around(a: str, b: str) -> str:
    """Return the path of the innermost module that contains both modules, or is one and contains the other."""
    common = takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False))
    return ".".join(one for one, _ in common)


_ENTRYWISE = frozenset(("add", "sub", "mul", "div", "where", "masked_fill"))
"""Operations that combine a weight with a mask, a scale or an update; the result has the weight's roles."""

Rule = Callable[[Walk, Node], Value]


def walk(
    capture: Capture,
    rules: Mapping[str, Rule],
    pointwise: Rule,
    cautious: bool = True,
    known: Mapping[str, Dims] | None = None,
) -> Walk:
    """Walk over a recorded graph and give every dimension an expression, by the rules of its operations.

    Args:
        capture: The recorded graph.
        rules: Operation name → its rule.
        pointwise: The rule of all operations that torch tags as entrywise.
        cautious: Whether to freeze dimensions in data-dependent code: on other data it may run other operations.
        known: Name of a parameter or buffer → its dimensions from an earlier walk; new ones unless given.
    """
    w = Walk(capture)
    if capture.decisions is not None:
        w.notes.append(_how(capture))
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            w.dims[node] = _placeholder(w, node, known or {})
        elif node.op == "output":
            for expr in (expr for out in node.all_input_nodes for expr in all_dims(w.dims[out])):
                d.freeze(expr, "it is an output of the model")
        elif node.op == "call_function":
            w.dims[node] = _call(w, node, rules, pointwise)
        else:
            w.dims[node] = w.fresh(node, f"made by {node.op}")
        if cautious and w.decided:
            w.passed_on(node)
    return w


def _how(capture: Capture) -> str:
    places = Counter((one.op, one.module or "the model") for one in capture.decisions or ())
    ways = ", ".join(f"{op} in {module} ({n}×)" for (op, module), n in places.most_common(4))
    more = f" and in {len(places) - 4} more ways" if len(places) > 4 else ""
    return (
        f"recorded from one run, since torch.export refuses: {capture.refusal or 'data decide what the network does'}. "
        f"What it does where data decide otherwise than by {ways or 'none'}{more} was not seen"
    )


def _placeholder(w: Walk, node: Node, known: Mapping[str, Dims]) -> Dims | None:
    shape = shapes_of(node)
    if shape is None or isinstance(shape, list):
        return None
    if node in w.capture.states:
        return known.get(w.capture.states[node]) or tuple(d.ONE if n == 1 else d.Leaf(n) for n in shape)
    held = node in w.capture.constants
    why = (
        "it is a dimension of a tensor that is no parameter or buffer"
        if held
        else "it is a dimension of the model's input"
    )
    return tuple(d.frozen(n, why) for n in shape)


def _call(w: Walk, node: Node, rules: Mapping[str, Rule], pointwise: Rule) -> Value:
    name = op_name(node)
    if name == "getitem":
        value = w.dims[operand_of(node)]
        return value[whole(node.args[1])] if isinstance(value, list) else None
    rule = rules.get(name)
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    if rule is not None and shapes_of(node) is not None:
        try:
            dims = rule(w, node)
            _assert_sizes(node, dims)
            return dims
        except _MISFITS:
            pass  # a form of the operation that the rule does not know: it counts as one without a rule
    if name.startswith("_assert"):
        return None
    free = [expr for one in node.all_input_nodes for expr in all_dims(w.dims[one]) if d.is_free(expr)]
    if free:
        reason = w.why(node, "an operation without a rule reads it")
        for expr in free:
            d.freeze(expr, reason)
        w.notes.append(f"no rule fits {node.target} in {module_of(node) or 'the model'}: what it reads is frozen")
    return w.fresh(node, f"made by {name}")


_MISFITS = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)


def all_dims(dims: Value) -> list[Expr]:
    """Return every dimension of a node's value, or of all of its values."""
    return [expr for one in (dims if isinstance(dims, list) else [dims]) for expr in one or ()]


def _assert_sizes(node: Node, dims: Value) -> None:
    shape = shapes_of(node)
    assert isinstance(dims, list) == isinstance(shape, list)
    shapes = shape if isinstance(shape, list) else [shape]
    for expected, value in zip(shapes, dims if isinstance(dims, list) else [dims], strict=True):
        sizes = None if value is None else tuple(map(d.size, value))
        assert expected is None or sizes == expected, f"{node.target}: dimensions {sizes} for shape {expected}"
