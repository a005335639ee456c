"""A network as a list of operations, and the check that a resized network still runs the same ones."""

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from regrow.core.axes import AxisGraph, Dim, RecordedStep, size_of
from regrow.core.axes.operations import Number, Numbers
from regrow.tracing.capture import Capture
from regrow.tracing.graph import Names
from regrow.tracing.nodes import ALIASES, leaves_of, module_of, op_name, shapes_of, uncast
from regrow.tracing.rules.shapes import bounds
from regrow.tracing.walk import Value, Walk

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
    """Return the operations of a walked network in comparable form, with shapes written in axes.

    Args:
        w: The walk.
        names: Writes expressions in axes.
    """
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
    """Return the first operation in which a resized network differs from the traced one as planned; ``None`` if none.

    Args:
        known: The operations of the traced network.
        recorded: The recording of the resized network.
        sizes: Axis key → its number of units in the resized network.
        added: The names of biases that only the resized network has.
    """
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
    """Compare the recordings before and after sizes were changed; return the first constant that differs, or ``None``.

    Args:
        present: The recording of the present network.
        planned: The recording of the planned network.
        known: The operations of the traced network; ``None``: the starts of slices are not compared.
    """
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
    """Return the operations of a network after folds have changed the epsilons of its norms.

    Args:
        axes: Its axes, with the operations before.
        constants: ``module:attribute`` → the new epsilon.
    """
    new = {f.epsilon.partition(":")[0]: (f.value, constants[f.epsilon]) for f in axes.folds if f.epsilon in constants}

    def fitting(step: RecordedStep) -> RecordedStep:
        old, value = new.get(step.module, (None, None))
        return replace(step, numbers=tuple(value if x == old else x for x in step.numbers)) if new else step

    return tuple(map(fitting, axes.steps))


def restate_steps(known: Sequence[RecordedStep], recorded: Capture) -> tuple[RecordedStep, ...]:
    """Return the operations with the constants and operands of a new recording; shapes stay written in axes.

    Args:
        known: The operations before.
        recorded: The new recording.
    """
    started = _started(known, recorded)
    return tuple(
        replace(step, numbers=numbers, operands=operands)
        for step, (_, numbers, operands) in zip(known, calls(recorded, started), strict=True)
    )


def operations(recorded: Capture) -> list[Node]:
    """Return the operations that compute something, and the output; without casts, copies and assertions.

    Args:
        recorded: The recording.
    """
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
    """Yield each operation with its constants and operands.

    Args:
        recorded: The recording.
        started: Slices whose start follows from axis sizes, and is no constant.
    """
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
