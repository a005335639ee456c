"""A network as a list of operations, and the check that a resized network still runs the same ones."""

import zlib
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from regrow.core.axes import AxisGraph, Cache, Dim, Product, RecordedStep, axes_in, size_of
from regrow.core.axes.operations import Number
from regrow.tracing import dimensions as d
from regrow.tracing.capture import Capture
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.graph import Names
from regrow.tracing.interception import LINE, describe_line
from regrow.tracing.nodes import (
    ALIASES,
    as_list,
    dim_index,
    leaves_of,
    module_of,
    op_name,
    operand_of,
    operands,
    schema_parameters,
    shapes_of,
    uncast,
)
from regrow.tracing.rules.shapes import slice_bounds
from regrow.tracing.walk import Dims, Walk, all_dims

# The most operations between a softmax and the matrix products before and after it.
MOST_STEPS = 16


def find_caches(w: Walk, names: Names) -> tuple[Cache, ...]:
    """Return the keys and values that each attention over tokens of the input reads, as dimensions per token."""
    inputs = (*w.capture.inputs, *w.capture.constants)
    tokens = {leaf.number for node in inputs for expr in all_dims(w.dims[node]) for leaf in d.leaves(expr)}
    result: dict[tuple[Node, Node], Cache] = {}
    for node in w.capture.graph.nodes:
        key, value, over = _parse_attention(w, node)
        if key is not None and value is not None and _is_token(over, tokens):
            key, value = _smallest_form(key), _smallest_form(value)
            keys, values = (_per_token(w.of(cached), tokens) for cached in (key, value))
            if keys is not None and values is not None:
                item = key.meta["val"].element_size()
                result.setdefault((key, value), Cache(module_of(node), names.dims(keys), names.dims(values), item))
    return tuple(result.values())


def _parse_attention(w: Walk, node: Node) -> tuple[Node | None, Node | None, Expr]:
    """Return (keys, values, dimension attended over) of a fused attention or a softmax; ``None`` if not found."""
    if op_name(node) == "scaled_dot_product_attention":
        key, value = operand_of(node, 1, "key"), operand_of(node, 2, "value")
        return key, value, w.of(key)[-2]
    if op_name(node) in ("softmax", "_softmax"):
        over = w.of(node)[dim_index(node, 1, len(w.of(node)))]
        return _find_factor(w, node, back=True), _find_factor(w, node, back=False), over
    return None, None, d.ONE


def _find_factor(w: Walk, softmax: Node, back: bool) -> Node | None:
    """Return the second factor of the product before a softmax (``back``: the keys), or after it (the values)."""
    frontier = [softmax]
    for _ in range(MOST_STEPS):
        following: list[Node] = []
        for node in frontier:
            for other in node.all_input_nodes if back else node.users:
                if op_name(other) in _PRODUCTS:
                    factors = other.all_input_nodes[-2:]
                    computed = len(factors) == 2 and not any(map(w.source, factors))
                    if computed and (back or factors[0] is node):
                        return factors[1]
                elif other.op == "call_function" and len(w.dims[other] or ()) >= 3:
                    following.append(other)
        frontier = following
    return None


_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum"))


def _smallest_form(node: Node) -> Node:
    """Return the node with the fewest bytes among ``node`` and those from which it was only reshaped or repeated."""
    chain = [node]
    while op_name(node) in _LAID_OUT and isinstance(node.args[0], Node):
        node = node.args[0]
        chain.append(node)
    return min(chain, key=lambda x: int(x.meta["val"].nbytes))


_SHAPES = (
    "view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze expand expand_as broadcast_to "
    "repeat tile repeat_interleave transpose swapaxes permute movedim mT mH adjoint t slice"
)
_LAID_OUT = ALIASES | frozenset(_SHAPES.split())


def _per_token(dims: Dims, tokens: Container[int]) -> Dims | None:
    """Return the factors of dimensions that are no tokens (leaves in ``tokens``); ``None`` if no factor is one."""
    whole = d.times(*dims)
    parts = whole.parts if isinstance(whole, d.Times) else (whole,)
    rest = tuple(part for part in parts if not _is_token(part, tokens))
    return rest if len(rest) < len(parts) else None


def _is_token(expr: Expr, tokens: Container[int]) -> bool:
    """Whether a dimension is one of the input's: a leaf whose number is in ``tokens``."""
    expr = d.resolve(expr)
    return isinstance(expr, Leaf) and expr.number in tokens


# The problem of a network that caches something at its first run, with these inputs, and has not run.
FIRST_RUN = "it reads what it keeps at its first run, which is not known yet; run the network once"


@dataclass(frozen=True)
class Difference:
    """The first operation in which two recordings of a network differ."""

    problem: str  # what differs and where, as a clause for users
    # Whether a constant or an operand differs. Constants also differ between precisions and after a fold, operands
    # after a bias was added, so only a comparison with the present network can tell.
    constant: bool = False


def list_symbolic_steps(w: Walk, names: Names) -> tuple[RecordedStep, ...]:
    """Return the operations of a walked network in comparable form, with shapes and starts written in axes."""
    result = []
    for node, step in zip(list_operations(w.capture), list_steps(w.capture, w.starts), strict=True):
        shapes = tuple(None if dims is None else names.dims(dims) for dims in as_list(w.dims.get(node)))
        start = names.dim(w.starts[node]) if node in w.starts else None
        result.append(replace(step, shapes=shapes, start=start))
    return tuple(result)


def list_steps(recorded: Capture, started: Container[Node] = ()) -> list[RecordedStep]:
    """Return the operations of a recording in comparable form; the start of a slice in ``started`` is no constant."""
    names: dict[Node, int | str] = {node: f"input {i}" for i, node in enumerate(recorded.inputs)}
    names |= recorded.states | dict.fromkeys(recorded.constants, "constant")
    names |= {node: str(node.target) for node in recorded.graph.nodes if node.op == "get_attr"}
    result = []
    for i, node in enumerate(list_operations(recorded)):
        names[node] = i
        read = [uncast(operand) for operand in operands(node)]
        shapes = tuple(as_list(shapes_of(node)))
        numbers = (*_constants_of(node, node in started), *_entries_of(read, recorded.constants))
        named = tuple(names.get(operand, "") for operand in read)
        result.append(RecordedStep(op_name(node), module_of(node), shapes, numbers, operands=named))
    return result


def find_step_difference(
    steps: Sequence[RecordedStep], recorded: Capture, sizes: Mapping[str, int], added: Collection[str] = ()
) -> Difference | None:
    """Return the first difference of a recording from known steps at ``sizes`` (axis key → units), or ``None``.

    One of constants or operands is returned only if all operations and shapes agree. ``added``: names of new biases.
    """
    nodes, resized = list_operations(recorded), list_steps(recorded, _moving_slices(steps, recorded))
    for i, (step, other) in enumerate(zip_longest(steps, resized)):
        if step is None or other is None or step.op != other.op:
            ran, before = ("nothing" if x is None else _describe_step(x) for x in (other, step))
            problem = f"the network runs other operations at that size: {ran} instead of {before}"
            return Difference(problem + _line_clause(nodes[i : i + 1]))
    constant: Difference | None = None
    for step, other, node in zip(steps, resized, nodes, strict=True):
        planned = [None if dims is None else tuple(size_of(dim, sizes) for dim in dims) for dims in step.shapes]
        pairs = zip(planned, other.shapes, strict=False)
        problem = ""
        if len(planned) != len(other.shapes) or any(None not in (a, b) and a != b for a, b in pairs):
            problem = "has another shape"
        elif step.start is not None and slice_bounds(node)[0] != size_of(step.start, sizes):
            problem = "begins at another entry"
        if problem:
            return Difference(f"{_describe_step(step)} {problem} at that size than planned{_line_clause([node])}")
        planned_operands = tuple(operand for operand in other.operands if operand not in added)
        constant = constant or _compare_constants(step, replace(other, operands=planned_operands), node)
    return constant


def find_changed_constant(
    present: Capture, planned: Capture, steps: Sequence[RecordedStep] | None = None
) -> Difference | None:
    """Return the first constant or operand that differs between recordings before and after a resize, or ``None``.

    ``steps``: known steps, which tell the slices whose start may change; without them no start is compared.
    """
    if any(isinstance(x, FakeTensor) for recorded in (present, planned) for x in recorded.constants.values()):
        return Difference(FIRST_RUN)
    before, after = (list_steps(recorded, _moving_slices(steps, recorded)) for recorded in (present, planned))
    if len(before) != len(after):
        return Difference(f"the network runs {len(after)} operations at that size, and {len(before)} as it is")
    return next(filter(None, map(_compare_constants, before, after, list_operations(planned))), None)


def with_new_epsilons(axes: AxisGraph, epsilons: Mapping[str, float]) -> tuple[RecordedStep, ...]:
    """Return ``axes.steps`` with the epsilons that a cut gives norms; ``epsilons``: ``module:attribute`` → value."""
    changes = {f.epsilon.partition(":")[0]: (f.value, epsilons[f.epsilon]) for f in axes.folds if f.epsilon in epsilons}
    result = []
    for step in axes.steps:
        if step.module in changes:
            old, new = changes[step.module]
            step = replace(step, numbers=tuple(new if x == old else x for x in step.numbers))
        result.append(step)
    return tuple(result)


def with_new_constants(steps: Sequence[RecordedStep], recorded: Capture) -> tuple[RecordedStep, ...]:
    """Return known steps with the constants and operands of a new recording; shapes stay written in axes."""
    rows = zip(steps, list_steps(recorded, _moving_slices(steps, recorded)), strict=True)
    return tuple(replace(step, numbers=new.numbers, operands=new.operands) for step, new in rows)


def fit_steps(
    steps: Sequence[RecordedStep], recorded: Capture, sizes: Mapping[str, int]
) -> tuple[RecordedStep, ...] | None:
    """Return known steps with the input's sizes of a new recording; ``None`` if operations or sizes of axes differ."""
    others = list_steps(recorded, _moving_slices(steps, recorded))
    if [(x.op, x.numbers, x.operands) for x in steps] != [(x.op, x.numbers, x.operands) for x in others]:
        return None
    result = []
    for step, other in zip(steps, others, strict=True):
        shapes: list[tuple[Dim, ...] | None] = []
        for dims, shape in zip_longest(step.shapes, other.shapes, fillvalue=()):
            fitted = [_fit_dim(dim, size_of(n, {}), sizes) for dim, n in zip(dims or (), shape or (), strict=False)]
            if len(dims or ()) != len(shape or ()) or None in fitted:
                return None
            shapes.append(None if dims is None else tuple(dim for dim in fitted if dim is not None))
        result.append(replace(step, shapes=tuple(shapes)))
    return tuple(result)


def _fit_dim(dim: Dim, n: int, sizes: Mapping[str, int]) -> Dim | None:
    """Return a dimension with its fixed factor replaced so that its size is ``n``; ``None`` if no factor does that."""
    if not {*axes_in(dim)}:
        return n
    if not isinstance(dim, Product):
        return dim if size_of(dim, sizes) == n else None
    units = tuple(part for part in dim.parts if {*axes_in(part)})
    factor, rest = divmod(n, size_of(Product(units), sizes))
    return None if rest else Product((factor, *units))


def list_operations(recorded: Capture) -> list[Node]:
    """Return the operations and the output of a graph, as ``AxisGraph.steps`` numbers them: no casts, no assertions."""
    every = (node for node in recorded.graph.nodes if node.op in ("call_function", "output"))
    return [node for node in every if op_name(node) not in ALIASES and not op_name(node).startswith("_assert")]


def _moving_slices(steps: Sequence[RecordedStep] | None, recorded: Capture) -> set[Node]:
    """Return the slices whose start follows from axis sizes; all operations, if ``steps`` is ``None``."""
    pairs = zip_longest(steps or (), list_operations(recorded))
    return {node for step, node in pairs if steps is None or (step is not None and step.start is not None)}


def _describe_step(step: RecordedStep) -> str:
    """Return an operation and its module for a message, as ``linear in layers.0``."""
    return f"{step.op or 'the answer'} in {step.module or 'the model'}"


def _line_clause(nodes: Sequence[Node]) -> str:
    """Return a clause that names the code line of the first node; empty if there is none."""
    return describe_line(nodes[0].meta.get(LINE)) if nodes else ""


def _compare_constants(step: RecordedStep, other: RecordedStep, node: Node) -> Difference | None:
    """Return how ``other`` (of ``node``) differs from ``step`` in constants or operands; ``None`` if it does not."""
    if step.numbers != other.numbers:
        old, new = [*step.numbers], [*other.numbers]
        if len(old) == len(new):  # name those that differ
            old, new = [x for x in old if x not in new] or old, [x for x in new if x not in old] or new
        problem = f"a number in {_describe_step(step)} depends on the size: {old} becomes {new}"
    elif step.operands != other.operands:
        problem = f"what {_describe_step(step)} works on depends on the size"
    else:
        return None
    return Difference(problem + _line_clause([node]), constant=True)


def _constants_of(node: Node, started: bool) -> Iterator[Number | tuple[Number, ...]]:
    """Yield the constants of a call that are not sizes; nor the start of a slice, if ``started``.

    Sizes follow from the shape of the result, which is compared by itself. Constants that equal their default are left
    out, since some recordings write them down and others do not.
    """
    if node.op == "output":
        return
    defaults = _parameters_of(node.target)
    arguments = [*zip_longest([*defaults][: len(node.args)], node.args, fillvalue=""), *node.kwargs.items()]
    sizes = {*_SIZES, *_OF_OPERATION.get(op_name(node), ())}
    if started or 0 in (shapes_of(node) or ()):
        sizes.add("start")
    for name, value in arguments:
        if name in sizes or isinstance(value, Node) or value == defaults.get(name, ...):
            continue
        plain = [_comparable(x) for x in leaves_of(value) if isinstance(x, bool | int | float | str)]
        if isinstance(value, list | tuple) and plain:
            yield tuple(plain)
        else:
            yield from plain


@lru_cache(maxsize=4096)
def _parameters_of(target: object) -> dict[str, object]:
    """Return the names of an operation's parameters, and their defaults; an ellipsis for those without one."""
    return {x.name: x.default_value if x.has_default_value() else ... for x in schema_parameters(target)}


def _comparable(value: float | str) -> float | str:
    """Return a constant, or the word ``nan`` for a NaN, which is equal to itself."""
    return "nan" if isinstance(value, float) and value != value else value


_NOT_COMPARED = (
    "size sizes shape split_size split_sizes normalized_shape output_size repeats groups num_groups length steps dtype "
    "device layout memory_format pin_memory cudnn_enabled cudnn_enable output_dtype non_blocking copy"
)
# Arguments that are not compared: they follow from the result's shape, or set device, precision and layout.
_SIZES = frozenset(_NOT_COMPARED.split())

# Further arguments that are not compared, per operation; a histogram's range follows the units that it counts.
_OF_OPERATION = {"arange": ("end",), "slice": ("end",), "histc": ("bins", "min", "max")}


def _entries_of(read: Sequence[Node], constants: Mapping[Node, Tensor]) -> Iterator[Number]:
    """Yield the entries of constant tensors, as ``torch.tensor(size)``; above 64, their number and a checksum."""
    for node in read:
        value = constants.get(node)
        if value is None or value.is_meta or isinstance(value, FakeTensor):
            continue
        value = value.detach().cpu()
        value = value if value.layout is torch.strided else value.to_dense()
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        flat = value.double().flatten()
        entries = flat.tolist() if len(flat) <= 64 else (len(flat), zlib.crc32(flat.numpy().tobytes()))
        yield from map(_comparable, entries)
