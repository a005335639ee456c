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

from regrow.core.axes import AxisGraph, Cache, Dim, RecordedStep, size_of
from regrow.core.operations import Number, Numbers
from regrow.tracing import dimensions as d
from regrow.tracing.capture import Capture
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.graph import Names
from regrow.tracing.nodes import ALIASES, leaves_of, module_of, op_name, shapes_of, uncast, whole
from regrow.tracing.rules.shapes import bounds
from regrow.tracing.walk import Dims, Value, Walk, all_dims

MOST_STEPS = 16
"""The most operations between a softmax and the matrix products before and after it."""


def caches(w: Walk, names: Names) -> tuple[Cache, ...]:
    """Return the keys and values that each attention reads, as dimensions per token.

    Only attention over tokens of the model's input counts; tensors that are read twice are cached once.
    """
    given = [node for node in w.capture.graph.nodes if node.op == "placeholder" and node not in w.capture.states]
    tokens = {leaf.number for node in given for expr in all_dims(w.dims[node]) for leaf in d.leaves(expr)}
    result: dict[tuple[Node, Node], Cache] = {}
    for node in w.capture.graph.nodes:
        for key, value, over in _read(w, node):
            if not _is_token(over, tokens):
                continue
            both = _kept(w, key), _kept(w, value)
            own = [_per_token(w.of(one), tokens) for one in both]
            if own[0] is not None and own[1] is not None:
                item = both[0].meta["val"].element_size()
                result.setdefault(both, Cache(module_of(node), names.dims(own[0]), names.dims(own[1]), item))
    return tuple(result.values())


def _read(w: Walk, node: Node) -> Iterator[tuple[Node, Node, Expr]]:
    """Yield keys, values and the dimension attended over, if an operation is an attention, fused or its softmax."""
    if node.op != "call_function":
        return
    if op_name(node) == "scaled_dot_product_attention":
        key, value = (node.kwargs.get(name, node.args[i] if len(node.args) > i else None) for i, name in _PLACES)
        if isinstance(key, Node) and isinstance(value, Node):
            yield key, value, w.of(key)[-2]
    elif op_name(node) in ("softmax", "_softmax"):
        asked, answered = _product(w, node, back=True), _product(w, node, back=False)
        if asked is not None and answered is not None:
            yield asked, answered, w.of(node)[whole(node.args[1])]


_PLACES = ((1, "key"), (2, "value"))


def _product(w: Walk, softmax: Node, back: bool) -> Node | None:
    """Return the second factor of the product before a softmax (the keys), or after it (the values)."""
    near = [softmax]
    for _ in range(MOST_STEPS):
        beyond: list[Node] = []
        for one in near:
            for other in one.all_input_nodes if back else one.users:
                if other.op != "call_function":
                    continue
                if op_name(other) in _PRODUCTS:
                    first, second = other.all_input_nodes[-2:] if len(other.all_input_nodes) > 1 else (other, other)
                    if first is not second and not w.source(first) and not w.source(second) and (back or first is one):
                        return second
                elif len(w.dims[other] or ()) >= 3:
                    beyond.append(other)
        near = beyond
    return None


_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum"))


def _kept(w: Walk, node: Node) -> Node:
    """Return the smallest of a tensor and those from which it was only reshaped or repeated."""
    best, one = node, node
    while one.op == "call_function" and op_name(one) in _LAID_OUT and isinstance(one.args[0], Node):
        one = one.args[0]
        if _bytes(one) < _bytes(best):
            best = one
    return best


_SHAPES = (
    "view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze expand expand_as broadcast_to "
    "repeat tile repeat_interleave transpose swapaxes permute movedim mT mH adjoint t slice"
)
_LAID_OUT = ALIASES | frozenset(_SHAPES.split())


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _per_token(dims: Dims, tokens: Container[int]) -> Dims | None:
    """Return the dimensions without those of the model's input; ``None`` if there are none of these."""
    parts = [part for expr in map(d.resolve, dims) for part in (expr.parts if isinstance(expr, d.Times) else (expr,))]
    own = tuple(part for part in parts if not _is_token(part, tokens))
    return own if len(own) < len(parts) else None


def _is_token(expr: Expr, tokens: Container[int]) -> bool:
    expr = d.resolve(expr)
    return isinstance(expr, Leaf) and expr.number in tokens


FIRST_RUN = "it reads what it keeps at its first run, which is not known yet; run the network once"
"""The problem of a network that caches something at its first run, with these inputs, and has not run."""
Operands = tuple[int | str, ...]
"""Where an operation's operands come from: the index of an operation, or the name of a state or input."""


@dataclass(frozen=True)
class Difference:
    """The first operation in which two recordings of a network differ.

    Args:
        problem: A description of the difference.
        step: The number of the operation.
        constant: Whether a constant or an operand differs. Constants also differ between precisions and after a fold,
            operands after a bias was added, so only a comparison with the present network can tell.
    """

    problem: str
    step: int
    constant: bool = False


def steps(w: Walk, names: Names) -> tuple[RecordedStep, ...]:
    """Return the operations of a walked network in comparable form, with shapes written in axes."""
    return tuple(
        RecordedStep(
            op_name(node),
            module_of(node),
            _written(w.dims.get(node), names),
            numbers,
            names.dim(w.starts[node]) if node in w.starts else None,
            operands,
        )
        for node, numbers, operands in calls(w.capture, w.starts)
    )


def difference(
    known: Sequence[RecordedStep], recorded: Capture, sizes: Mapping[str, int], added: Collection[str] = ()
) -> Difference | None:
    """Return the first operation in which a resized network differs from the traced one as planned, if there is one."""
    nodes = operations(recorded)
    for i, (step, node) in enumerate(zip_longest(known, nodes)):
        if step is None or node is None or step.op != op_name(node):
            ran = "nothing" if node is None else _where(op_name(node), module_of(node))
            before = "nothing" if step is None else _where(step.op, step.module)
            return Difference(f"the network runs other operations at that size: {ran} instead of {before}", i)
    started = _started(known, recorded)
    constant: Difference | None = None
    for i, (step, (node, numbers, operands)) in enumerate(zip(known, calls(recorded, started), strict=True)):
        where = _where(step.op, step.module)
        shapes = shapes_of(node)
        for dims, shape in zip(step.shapes, shapes if isinstance(shapes, list) else [shapes], strict=True):
            planned = None if dims is None else tuple(size_of(dim, sizes) for dim in dims)
            if planned is not None and shape is not None and planned != shape:
                return Difference(f"{where} has shape {list(shape)} at that size, not {list(planned)}", i)
        if step.start is not None and bounds(node)[0] != (start := size_of(step.start, sizes)):
            return Difference(f"{where} begins at entry {bounds(node)[0]} at that size, not at {start}", i)
        if constant is None:
            reads = tuple(one for one in operands if one not in added)
            constant = _constants(where, step.numbers, numbers, step.operands, reads, i)
    return constant


def first_difference(
    present: Capture, planned: Capture, known: Sequence[RecordedStep] | None = None
) -> Difference | None:
    """Return the first constant that differs between the recordings before and after sizes were changed, if any."""
    if any(isinstance(x, FakeTensor) for recorded in (present, planned) for x in recorded.constants.values()):
        return Difference(FIRST_RUN, 0)
    if (one := len(operations(present))) != (other := len(operations(planned))):
        return Difference(f"the network runs {other} operations at that size, and {one} as it is", min(one, other))
    pairs = (calls(recorded, _started(known, recorded)) for recorded in (present, planned))
    for i, ((node, before, reads), (_, after, takes)) in enumerate(zip(*pairs, strict=True)):
        where = _where(op_name(node), module_of(node))
        if result := _constants(where, before, after, reads, takes, i):
            return result
    return None


def refold_steps(axes: AxisGraph, constants: Mapping[str, float | None]) -> tuple[RecordedStep, ...]:
    """Return the operations of a network after folds have changed the epsilons of its norms."""
    new = {f.epsilon.partition(":")[0]: (f.value, constants[f.epsilon]) for f in axes.folds if f.epsilon in constants}

    def fitting(step: RecordedStep) -> RecordedStep:
        old, value = new.get(step.module, (None, None))
        return replace(step, numbers=tuple(value if x == old else x for x in step.numbers)) if new else step

    return tuple(map(fitting, axes.steps))


def restate_steps(known: Sequence[RecordedStep], recorded: Capture) -> tuple[RecordedStep, ...]:
    """Return the operations with the constants and operands of a new recording; shapes stay written in axes."""
    started = _started(known, recorded)
    return tuple(
        replace(step, numbers=numbers, operands=operands)
        for step, (_, numbers, operands) in zip(known, calls(recorded, started), strict=True)
    )


def operations(recorded: Capture) -> list[Node]:
    """Return the operations that compute something, and the output; without casts, copies and assertions."""
    every = (node for node in recorded.graph.nodes if node.op in ("call_function", "output"))
    return [node for node in every if op_name(node) not in ALIASES and not op_name(node).startswith("_assert")]


def _started(known: Sequence[RecordedStep] | None, recorded: Capture) -> set[Node]:
    """Return the slices whose start follows from axis sizes; all operations, where that is unknown."""
    if known is None:
        return {*operations(recorded)}
    return {node for step, node in zip(known, operations(recorded), strict=False) if step.start is not None}


def _where(op: str, module: str) -> str:
    return f"{op or 'the answer'} in {module or 'the model'}"


def _constants(
    where: str, before: Numbers, after: Numbers, reads: Operands, takes: Operands, i: int
) -> Difference | None:
    if before != after:
        gone, come = ([x for x in one if x not in other] for one, other in ((before, after), (after, before)))
        old, new = (gone or [*before], come or [*after]) if len(before) == len(after) else ([*before], [*after])
        return Difference(f"a number in {where} depends on the size: {old} becomes {new}", i, constant=True)
    if reads != takes:
        return Difference(f"what {where} works on depends on the size", i, constant=True)
    return None


def _written(dims: Value, names: Names) -> tuple[tuple[Dim, ...] | None, ...]:
    several = dims if isinstance(dims, list) else [dims]
    return tuple(None if one is None else names.dims(one) for one in several)


def calls(recorded: Capture, started: Collection[Node]) -> Iterator[tuple[Node, Numbers, Operands]]:
    """Yield each operation with its constants and operands."""
    given = [n for n in recorded.graph.nodes if n.op == "placeholder"]
    inputs = [n for n in given if n not in recorded.states and n not in recorded.constants]
    names: dict[Node, int | str] = {node: f"input {i}" for i, node in enumerate(inputs)}
    names |= recorded.states | dict.fromkeys(recorded.constants, "constant")
    names |= {node: str(node.target) for node in recorded.graph.nodes if node.op == "get_attr"}
    for i, node in enumerate(operations(recorded)):
        names[node] = i
        read = [uncast(one) for one in leaves_of((node.args, node.kwargs)) if isinstance(one, Node)]
        constants = tuple(_entries_of(read, recorded.constants))
        yield node, (*_numbers(node, node in started), *constants), tuple(names.get(one, "") for one in read)


def _numbers(node: Node, started: bool) -> Iterator[Number | tuple[Number, ...]]:
    """Yield the constants of a call that are not sizes.

    Sizes follow from the shape of the result, which is compared by itself. Constants that equal their default are left
    out, since some recordings write them down and others do not.
    """
    if node.op == "output":
        return
    names, usual = _parameters_of(node.target)
    given = [(names[i] if i < len(names) else "", value) for i, value in enumerate(node.args)]
    empty, more = 0 in (shapes_of(node) or ()), _OF_OPERATION.get(op_name(node), frozenset())
    for name, value in (*given, *node.kwargs.items()):
        if name in _SIZES or name in more or (name == "start" and (started or empty)):
            continue
        if isinstance(value, Node) or value == usual.get(name, ...):
            continue
        plain = [_plain(x) for x in leaves_of(value) if isinstance(x, bool | int | float | str)]
        yield from [tuple(plain)] if isinstance(value, list | tuple) and plain else plain


@lru_cache(maxsize=4096)
def _parameters_of(target: object) -> tuple[tuple[str, ...], dict[str, object]]:
    """Return the names of an operation's parameters, and the defaults of those that have one."""
    takes = getattr(getattr(target, "_schema", None), "arguments", ())
    return tuple(one.name for one in takes), {one.name: one.default_value for one in takes if one.has_default_value()}


def _plain(value: float | str) -> float | str:
    return "nan" if isinstance(value, float) and value != value else value


_SIZES = frozenset(
    (
        *("size", "sizes", "shape", "split_size", "split_sizes", "normalized_shape", "output_size", "repeats"),
        *("groups", "num_groups", "length", "steps", "dtype", "device", "layout", "memory_format", "pin_memory"),
        *("cudnn_enabled", "cudnn_enable", "output_dtype", "non_blocking", "copy"),
    )
)
"""Arguments that are not compared: they follow from the result's shape, or set device, precision and layout."""

_OF_OPERATION = {
    **dict.fromkeys(("arange", "slice"), frozenset(("end",))),
    "histc": frozenset(("bins", "min", "max")),
}
"""Further arguments that are not compared, per operation; a histogram's range follows the units that it counts."""


def _entries_of(read: Sequence[Node], constants: Mapping[Node, Tensor]) -> Iterator[Number]:
    """Yield the entries of tensors that the network's code made of numbers, as ``torch.tensor(size)``."""
    for node in read:
        value = constants.get(node)
        if value is None or value.is_meta or isinstance(value, FakeTensor):
            continue
        value = value.detach().cpu()
        value = value if value.layout is torch.strided else value.to_dense()
        flat = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double().flatten()
        entries = flat.tolist() if len(flat) <= 64 else (len(flat), zlib.crc32(flat.numpy().tobytes()))
        yield from map(_plain, entries)
