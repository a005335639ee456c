"""What a network does, operation by operation, and whether a cut network still does the same."""

import zlib
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from regrow.axes import AxisGraph, Dim, Step, size_of
from regrow.tracing.capture import Capture, module_of, shape_of
from regrow.tracing.graph import Names
from regrow.tracing.rules.shapes import bounds
from regrow.tracing.walk import ALIASES, Walk, op_name


def steps(w: Walk, names: Names) -> tuple[Step, ...]:
    """The operations of a walked network."""
    constants = w.capture.constants
    return tuple(
        Step(
            op_name(node),
            module_of(node),
            _written(w.dims.get(node), names),
            _numbers(node, constants),
            names.dim(w.starts[node]) if node in w.starts else None,
        )
        for node in _operations(w.capture)
    )


def difference(axes: AxisGraph, recorded: Capture, sizes: Mapping[str, int], numbers: bool = True) -> str:
    """What a network of other sizes does otherwise than planned; empty if nothing.

    Args:
        axes: The axes of the network as it was traced.
        recorded: What the network of other sizes does.
        sizes: The size of each of its axes.
        numbers: Whether to compare constants too; they also differ between precisions, and after a fold.
    """
    nodes, constants = _operations(recorded), recorded.constants
    if [op_name(node) for node in nodes] != [step.op for step in axes.steps]:
        return "the network runs other operations at that size"
    for step, node in zip(axes.steps, nodes, strict=True):
        where = f"{step.op} in {step.module or 'the model'}"
        found = shape_of(node)
        shapes = found if isinstance(found, list) else [found]
        for dims, shape in zip(step.shapes, shapes, strict=True):
            planned = None if dims is None else tuple(size_of(dim, sizes) for dim in dims)
            if planned is not None and shape is not None and planned != shape:
                return f"{where} has shape {list(shape)} at that size, not {list(planned)}"
        if step.start is not None and bounds(node)[0] != (start := size_of(step.start, sizes)):
            return f"{where} begins at entry {bounds(node)[0]} at that size, not at {start}"
        if numbers and step.numbers != (found_numbers := _numbers(node, constants)):
            return f"a number in {where} depends on the size: {list(step.numbers)} becomes {list(found_numbers)}"
    return ""


def _operations(recorded: Capture) -> list[Node]:
    """The operations that compute something; copies and casts come and go with strides and precision."""
    calls = (node for node in recorded.graph.nodes if node.op == "call_function")
    return [node for node in calls if op_name(node) not in ALIASES and not op_name(node).startswith("_assert")]


def _written(dims: Any, names: Names) -> tuple[tuple[Dim, ...] | None, ...]:
    several = dims if isinstance(dims, list) else [dims]
    return tuple(None if one is None else names.dims(one) for one in several)


def _numbers(node: Node, constants: Mapping[Node, Tensor]) -> tuple[float, ...]:
    """The numbers of a call that are not sizes.

    These are all floats, integers where the operation works entry by entry, and the entries of tensors that the
    network's code made of numbers (``torch.tensor(size)``). One record writes down an epsilon that has its usual value
    and another does not: such numbers are left out.
    """
    entrywise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    takes = getattr(getattr(node.target, "_schema", None), "arguments", ())
    usual = {one.name: one.default_value for one in takes if one.has_default_value()}
    given = [*zip_longest((one.name for one in takes), node.args, fillvalue=None)][: len(node.args)]
    values = [
        value
        for name, value in (*given, *node.kwargs.items())
        if isinstance(value, Node) or value != usual.get(name, ...)
    ]
    kinds = (float, int) if entrywise else (float,)
    plain = (v for v in values if isinstance(v, kinds) and not isinstance(v, bool))
    return (*plain, *(n for v in values if isinstance(v, Node) for n in _entries(v, constants)))


def _entries(node: Node, constants: Mapping[Node, Tensor]) -> Iterator[float]:
    while node.op == "call_function" and op_name(node) in ALIASES and isinstance(node.args[0], Node):
        node = node.args[0]
    value = constants.get(node)
    if value is None or value.is_meta or isinstance(value, FakeTensor):
        return
    flat = value.detach().cpu().double().flatten()
    yield from flat.tolist() if len(flat) <= 64 else (len(flat), zlib.crc32(flat.numpy().tobytes()))
