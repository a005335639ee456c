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

from regrow.core.axes import AxisGraph, Cache, RecordedStep, size_of
from regrow.core.operations import Number, Numbers
from regrow.tracing import dimensions as d
from regrow.tracing.capture import Capture
from regrow.tracing.dimensions import Expr, Leaf
from regrow.tracing.graph import Names
from regrow.tracing.nodes import (
    ALIASES,
    as_list,
    axis_of,
    leaves_of,
    module_of,
    op_name,
    operand_of,
    operands,
    parameters_of,
    shapes_of,
    uncast,
)
from regrow.tracing.rules.shapes import bounds
from regrow.tracing.walk import Dims, Walk, all_dims

MOST_STEPS = 16
"""The most operations between a softmax and the matrix products before and after it."""


def caches(w: Walk, names: Names) -> tuple[Cache, ...]:
    """Return the keys and values that each attention reads, as dimensions per token.

    Only attention over tokens of the model's input counts; tensors that are read twice are cached once.
    """
    given = (*w.capture.inputs, *w.capture.constants)
    tokens = {leaf.number for node in given for expr in all_dims(w.dims[node]) for leaf in d.leaves(expr)}
    result: dict[tuple[Node, Node], Cache] = {}
    for node in w.capture.graph.nodes:
        key, value, over = _attention(w, node)
        if key is not None and value is not None and _is_token(over, tokens):
            key, value = _smallest(key), _smallest(value)
            keys, values = (_per_token(w.of(cached), tokens) for cached in (key, value))
            if keys is not None and values is not None:
                item = key.meta["val"].element_size()
                result.setdefault((key, value), Cache(module_of(node), names.dims(keys), names.dims(values), item))
    return tuple(result.values())


def _attention(w: Walk, node: Node) -> tuple[Node | None, Node | None, Expr]:
    """Return keys, values and the dimension attended over, if an operation is an attention, fused or its softmax."""
    if node.op == "call_function" and op_name(node) == "scaled_dot_product_attention":
        key, value = operand_of(node, 1, "key"), operand_of(node, 2, "value")
        return key, value, w.of(key)[-2]
    if node.op == "call_function" and op_name(node) in ("softmax", "_softmax"):
        over = w.of(node)[axis_of(node, 1, len(w.of(node)))]
        return _product(w, node, back=True), _product(w, node, back=False), over
    return None, None, d.ONE


def _product(w: Walk, softmax: Node, back: bool) -> Node | None:
    """Return the second factor of the product before a softmax (the keys), or after it (the values)."""
    near = [softmax]
    for _ in range(MOST_STEPS):
        beyond: list[Node] = []
        for node in near:
            for other in node.all_input_nodes if back else node.users:
                if other.op == "call_function" and op_name(other) in _PRODUCTS:
                    first, second = other.all_input_nodes[-2:] if len(other.all_input_nodes) > 1 else (other, other)
                    if first is not second and not w.source(first) and not w.source(second) and (back or first is node):
                        return second
                elif other.op == "call_function" and len(w.dims[other] or ()) >= 3:
                    beyond.append(other)
        near = beyond
    return None


_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum"))


def _smallest(node: Node) -> Node:
    """Return the smallest of a tensor and those from which it was only reshaped or repeated."""
    chain = [node]
    while node.op == "call_function" and op_name(node) in _LAID_OUT and isinstance(node.args[0], Node):
        node = node.args[0]
        chain.append(node)
    return min(chain, key=lambda made: int(made.meta["val"].nbytes))


_SHAPES = (
    "view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze expand expand_as broadcast_to "
    "repeat tile repeat_interleave transpose swapaxes permute movedim mT mH adjoint t slice"
)
_LAID_OUT = ALIASES | frozenset(_SHAPES.split())


def _per_token(dims: Dims, tokens: Container[int]) -> Dims | None:
    """Return the dimensions without those of the model's input; ``None`` if there are none of these."""
    whole = d.times(*dims)
    parts = whole.parts if isinstance(whole, d.Times) else (whole,)
    rest = tuple(part for part in parts if not _is_token(part, tokens))
    return rest if len(rest) < len(parts) else None


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
            tuple(None if dims is None else names.dims(dims) for dims in as_list(w.dims.get(node))),
            numbers,
            names.dim(w.starts[node]) if node in w.starts else None,
            read,
        )
        for node, numbers, read in calls(w.capture, w.starts)
    )


def difference(
    known: Sequence[RecordedStep], recorded: Capture, sizes: Mapping[str, int], added: Collection[str] = ()
) -> Difference | None:
    """Return the first operation in which a resized network differs from the traced one as planned, if there is one."""
    for i, (step, node) in enumerate(zip_longest(known, operations(recorded))):
        if step is None or node is None or step.op != op_name(node):
            ran = "nothing" if node is None else _where(op_name(node), module_of(node))
            before = "nothing" if step is None else _where(step.op, step.module)
            return Difference(f"the network runs other operations at that size: {ran} instead of {before}", i)
    constant: Difference | None = None
    recalled = calls(recorded, _started(known, recorded))
    for i, (step, (node, numbers, takes)) in enumerate(zip(known, recalled, strict=True)):
        where = _where(step.op, step.module)
        for dims, shape in zip(step.shapes, as_list(shapes_of(node)), strict=True):
            planned = None if dims is None else tuple(size_of(dim, sizes) for dim in dims)
            if planned is not None and shape is not None and planned != shape:
                return Difference(f"{where} has shape {list(shape)} at that size, not {list(planned)}", i)
        if step.start is not None and bounds(node)[0] != (start := size_of(step.start, sizes)):
            return Difference(f"{where} begins at entry {bounds(node)[0]} at that size, not at {start}", i)
        takes = tuple(operand for operand in takes if operand not in added)
        constant = constant or _constants(where, step.numbers, numbers, step.operands, takes, i)
    return constant


def first_difference(
    present: Capture, planned: Capture, known: Sequence[RecordedStep] | None = None
) -> Difference | None:
    """Return the first constant that differs between the recordings before and after sizes were changed, if any."""
    if any(isinstance(x, FakeTensor) for recorded in (present, planned) for x in recorded.constants.values()):
        return Difference(FIRST_RUN, 0)
    before, after = len(operations(present)), len(operations(planned))
    if before != after:
        problem = f"the network runs {after} operations at that size, and {before} as it is"
        return Difference(problem, min(before, after))
    pairs = (calls(recorded, _started(known, recorded)) for recorded in (present, planned))
    for i, ((node, old, reads), (_, new, takes)) in enumerate(zip(*pairs, strict=True)):
        if result := _constants(_where(op_name(node), module_of(node)), old, new, reads, takes, i):
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
    return tuple(
        replace(step, numbers=numbers, operands=reads)
        for step, (_, numbers, reads) in zip(known, calls(recorded, _started(known, recorded)), strict=True)
    )


def operations(recorded: Capture) -> list[Node]:
    """Return the operations that compute something, and the output; without casts, copies and assertions."""
    every = (node for node in recorded.graph.nodes if node.op in ("call_function", "output"))
    return [node for node in every if op_name(node) not in ALIASES and not op_name(node).startswith("_assert")]


def _started(known: Sequence[RecordedStep] | None, recorded: Capture) -> set[Node]:
    """Return the slices whose start follows from axis sizes; all operations, where that is unknown."""
    pairs = zip_longest(known or (), operations(recorded))
    return {node for step, node in pairs if known is None or (step is not None and step.start is not None)}


def _where(op: str, module: str) -> str:
    return f"{op or 'the answer'} in {module or 'the model'}"


def _constants(where: str, old: Numbers, new: Numbers, reads: Operands, takes: Operands, i: int) -> Difference | None:
    if old != new:
        if len(old) == len(new):
            gone, come = tuple(x for x in old if x not in new), tuple(x for x in new if x not in old)
            old, new = gone or old, come or new
        return Difference(f"a number in {where} depends on the size: {[*old]} becomes {[*new]}", i, constant=True)
    if reads != takes:
        return Difference(f"what {where} works on depends on the size", i, constant=True)
    return None


def calls(recorded: Capture, started: Container[Node]) -> Iterator[tuple[Node, Numbers, Operands]]:
    """Yield each operation with its constants and operands; the start of a slice in ``started`` is no constant."""
    names: dict[Node, int | str] = {node: f"input {i}" for i, node in enumerate(recorded.inputs)}
    names |= recorded.states | dict.fromkeys(recorded.constants, "constant")
    names |= {node: str(node.target) for node in recorded.graph.nodes if node.op == "get_attr"}
    for i, node in enumerate(operations(recorded)):
        names[node] = i
        read = [uncast(operand) for operand in operands(node)]
        constants = tuple(_entries_of(read, recorded.constants))
        yield node, (*_numbers(node, node in started), *constants), tuple(names.get(operand, "") for operand in read)


def _numbers(node: Node, started: bool) -> Iterator[Number | tuple[Number, ...]]:
    """Yield the constants of a call that are not sizes.

    Sizes follow from the shape of the result, which is compared by itself. Constants that equal their default are left
    out, since some recordings write them down and others do not.
    """
    if node.op == "output":
        return
    usual = _parameters_of(node.target)
    given = [*zip_longest([*usual][: len(node.args)], node.args, fillvalue=""), *node.kwargs.items()]
    free_start = started or 0 in (shapes_of(node) or ())
    for name, value in given:
        if name in _SIZES or name in _OF_OPERATION.get(op_name(node), ()) or (name == "start" and free_start):
            continue
        if isinstance(value, Node) or value == usual.get(name, ...):
            continue
        plain = [_plain(x) for x in leaves_of(value) if isinstance(x, bool | int | float | str)]
        yield from [tuple(plain)] if isinstance(value, list | tuple) and plain else plain


@lru_cache(maxsize=4096)
def _parameters_of(target: object) -> dict[str, object]:
    """Return the names of an operation's parameters, and their defaults; an ellipsis for those without one."""
    takes = parameters_of(target)
    return {taken.name: taken.default_value if taken.has_default_value() else ... for taken in takes}


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

_OF_OPERATION = {"arange": ("end",), "slice": ("end",), "histc": ("bins", "min", "max")}
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
