"""State of a walk over a recorded graph, in which every dimension of every tensor gets a symbolic expression."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile

from torch.fx import Node

from regrow.core.axes import Role
from regrow.tracing import dimensions as d
from regrow.tracing.capture import Capture
from regrow.tracing.dimensions import Expr
from regrow.tracing.nodes import ALIASES, as_list, dim_index, module_of, op_name, operand_of, permutation, shapes_of

Dims = tuple[Expr, ...]
# The dimensions of a tensor; a list of them for several values; ``None`` for what is no tensor.
Value = Dims | list[Dims | None] | None


@dataclass(frozen=True)
class Reading:
    """A dimension that an operation sums, compares or normalises over, so that dropped units must be masked there."""

    node: Node  # the operation
    operand: Node  # the tensor that it reads
    dim: int  # the index of the dimension in that tensor
    fill: float | None  # what a dropped unit counts as (0 or ±∞); None: the operation runs over the kept units
    weight: str = ""  # the parameter it is multiplied with; empty if there is none
    groups: Expr | None = None  # the dimension of groups, where the operation runs inside each group


@dataclass(frozen=True)
class Literal:
    """A number that a module passed as a size, and the dimension it is the size of."""

    module: str  # its path
    number: int
    expr: Expr  # the dimension
    last: bool = False  # whether it was the last number of a reshape (a width, not a number of heads)


@dataclass
class Walk:
    """State and results of a walk over a recorded graph; only rules change it, through its methods and lists."""

    capture: Capture
    dims: dict[Node, Value] = field(default_factory=dict)  # node → the dimensions of its value
    roles: dict[tuple[str, int], set[Role]] = field(default_factory=dict)  # (parameter or buffer, dimension) → roles
    readings: list[Reading] = field(default_factory=list)
    work: list[tuple[str, str, Dims]] = field(default_factory=list)  # (module, operation, dimensions) of contractions
    literals: list[Literal] = field(default_factory=list)
    groups: list[tuple[str, Expr]] = field(default_factory=list)  # (module, groups) of convolutions and norms
    starts: dict[Node, Expr] = field(default_factory=dict)  # slice → the dimension before it
    picks: dict[Node, Expr] = field(default_factory=dict)  # topk → the dimension it picks from
    stacked: dict[Node, list[Expr]] = field(default_factory=dict)  # states of layers → last dimension per layer
    equal: list[tuple[Expr, Expr, str]] = field(default_factory=list)  # must keep equally many units, and why
    norms: list[tuple[Node, str]] = field(default_factory=list)  # (operation, kind) of each division by an axis size
    weights: dict[str, None] = field(default_factory=dict)  # names of the weights of contractions, in order
    tables: list[str] = field(default_factory=list)  # names of embedding tables
    notes: list[str] = field(default_factory=list)  # for the user, on what could not be analysed
    decided: dict[str, str] = field(default_factory=dict)  # module → what gave its code a data-dependent number
    training_reads: list[tuple[Expr, str]] = field(default_factory=list)  # (dimension, weight multiplied with)
    computed: dict[Node, bool] = field(default_factory=dict)  # node → what is_constant returned

    def continue_on(self, capture: Capture) -> "Walk":
        """Return a walk over another recording of the network, which adds to the results of this one, in place.

        Both have the roles, ties and weights; readings, norms and work are those of one recording alone.
        """
        return replace(
            self, capture=capture, readings=[], work=[], norms=[], dims={}, starts={}, picks={}, stacked={}, computed={}
        )

    def of(self, node: Node) -> Dims:
        """Return the dimensions of a node's value; AssertionError unless that is one tensor."""
        dims = self.dims[node]
        assert isinstance(dims, tuple)
        return dims

    def first(self, node: Node) -> Dims:
        """Return the dimensions of an operation's first operand; also the rule of casts, dropout and the like."""
        return self.of(operand_of(node))

    def along(self, node: Node, position: int, default: int = 0) -> tuple[Dims, int]:
        """Return the first operand's dimensions, and the index of the one that ``dim`` names (:func:`dim_index`)."""
        dims = self.first(node)
        return dims, dim_index(node, position, len(dims), default)

    def source(self, node: object) -> str:
        """Return the name of the parameter or buffer that a node is, possibly cast or transposed; empty if computed."""
        origin = self._origin(node, 0)
        return origin[0] if origin else ""

    def _origin(self, node: object, dim: int) -> tuple[str, int] | None:
        """Return (parameter or buffer, its dimension) that dimension ``dim`` of a node is; ``None``: it is computed."""
        if not isinstance(node, Node):
            return None
        if node in self.capture.states:
            return self.capture.states[node], dim
        if node.op != "call_function" or not node.args:
            return None
        if op_name(node) in ALIASES:
            return self._origin(node.args[0], dim)
        order = permutation(node, len(self.dims[node] or ()))
        return self._origin(node.args[0], order[dim]) if order is not None and dim < len(order) else None

    def add_role(self, node: object, dim: int, role: Role) -> None:
        """Record a role for the dimension of the parameter or buffer that dimension ``dim`` of a node comes from.

        The node may be cast, transposed, or combined with others entry by entry (a mask on a weight).
        """
        if not isinstance(node, Node):
            return
        if origin := self._origin(node, dim):
            self.roles.setdefault(origin, set()).add(role)
        elif op_name(node) in _ENTRYWISE and self.is_constant(node):
            for operand in node.all_input_nodes:
                aligned = dim - len(self.of(node)) + len(self.of(operand))
                if aligned >= 0 and d.size(self.of(operand)[aligned]) == d.size(self.of(node)[dim]):
                    self.add_role(operand, aligned, role)

    def is_constant(self, node: Node) -> bool:
        """Whether a node's value is computed from parameters, buffers and constants alone."""
        if node not in self.computed:
            inputs = node.all_input_nodes if node.op == "call_function" else []
            is_state = node in self.capture.states or node in self.capture.constants
            self.computed[node] = is_state or (bool(inputs) and all(map(self.is_constant, inputs)))
        return self.computed[node]

    def add_reading(
        self,
        node: Node,
        operand: Node,
        dim: int,
        fill: float | None = 0.0,
        weight: str = "",
        groups: Expr | None = None,
    ) -> None:
        """Record that an operation sums or compares over a dimension of an operand, as in :class:`Reading`."""
        self.readings.append(Reading(node, operand, dim, fill, weight, groups))

    def add_contraction(self, node: Node, weights: Iterable[Node], *works: Dims) -> None:
        """Record the weights that an operation sums over, and per product the dimensions whose sizes give its MACs."""
        self.weights |= dict.fromkeys(filter(None, map(self.source, weights)))
        self.work += [(module_of(node), op_name(node), dims) for dims in works]

    def add_literal(self, node: Node, number: int, expr: Expr, last: bool = False) -> None:
        """Record that the code of an operation's module holds the size of a dimension, as in :class:`Literal`."""
        self.literals.append(Literal(module_of(node), number, expr, last))

    def freeze_passed_values(self, node: Node) -> None:
        """Freeze the operands that a module hands on whose code depends on data; those inside its children stay."""
        for operand in node.all_input_nodes:
            module = _common_ancestor(module_of(operand), module_of(node))
            if module in self.decided and operand.op != "placeholder":
                why = f"data decide what is done with it, by `{self.decided[module]}` in {module or 'the model'}"
                for expr in all_dims(self.dims[operand]):
                    d.freeze(expr, why)

    def why(self, node: Node) -> str:
        """Return the reason for which an operation freezes a dimension, or marks it, as a clause for users."""
        return f"the number or order of its units matters to {op_name(node)} in {module_of(node) or 'the model'}"

    def unify(self, node: Node, a: Expr, b: Expr) -> None:
        """Make two dimensions equal, entry by entry, as an operation combines them; freeze both if they cannot be."""
        d.unify(a, b, self.why(node))

    def freeze(self, node: Node, exprs: Iterable[Expr]) -> None:
        """Freeze dimensions, since an operation reads them so that their sizes cannot change."""
        for expr in exprs:
            d.freeze(expr, self.why(node))

    def frozen(self, node: Node, n: int) -> Expr:
        """Return a new dimension of size ``n`` that cannot change, because of an operation."""
        return d.frozen(n, self.why(node))

    def fresh(self, node: Node, why: str = "") -> Value:
        """Return new frozen dimensions in the shape of the node's value; ``why``: the reason, if not the operation."""
        why = why or self.why(node)
        dims = [None if s is None else tuple(d.frozen(n, why) for n in s) for s in as_list(shapes_of(node))]
        return dims if isinstance(shapes_of(node), list) else dims[0]


def _common_ancestor(a: str, b: str) -> str:
    """Return the path of the innermost module that contains or is each of two; empty: the whole network."""
    common = takewhile(lambda pair: pair[0] == pair[1], zip(a.split("."), b.split("."), strict=False))
    return ".".join(part for part, _ in common)


# Operations that combine a weight with a mask, a scale or an update; the result has the weight's roles.
_ENTRYWISE = frozenset(("add", "sub", "mul", "div", "where", "masked_fill"))


def all_dims(dims: Value) -> list[Expr]:
    """Return every dimension of a node's value, or of all of its values, in order."""
    return [expr for value in as_list(dims) for expr in value or ()]


# A function from an operation to the dimensions of its result, which ties or freezes those of its operands.
Rule = Callable[[Walk, Node], Value]
