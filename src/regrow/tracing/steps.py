"""What a network does, operation by operation, and whether a cut network still does the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from regrow.axes import AxisGraph, Dim, Step, size_of
from regrow.tracing.capture import Capture, module_of, shape_of
from regrow.tracing.graph import Names
from regrow.tracing.rules.shapes import bounds
from regrow.tracing.walk import ALIASES, Walk, op_name


def steps(w: Walk, names: Names) -> tuple[Step, ...]:
    """The operations of a walked network."""
    return tuple(
        Step(
            op_name(node),
            module_of(node),
            _written(w.dims.get(node), names),
            _numbers(node, w.capture),
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
    nodes = _operations(recorded)
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
        if numbers and step.numbers != (own := _numbers(node, recorded)):
            return f"a number in {where} depends on the size: {list(step.numbers)} becomes {list(own)}"
    return ""


def _operations(recorded: Capture) -> list[Node]:
    """The operations that compute something; copies and casts come and go with strides and precision."""
    calls = (node for node in recorded.graph.nodes if node.op == "call_function")
    return [node for node in calls if op_name(node) not in ALIASES and not op_name(node).startswith("_assert")]


def _written(dims: Any, names: Names) -> tuple[tuple[Dim, ...] | None, ...]:
    several = dims if isinstance(dims, list) else [dims]
    return tuple(None if one is None else names.dims(one) for one in several)


def _numbers(node: Node, recorded: Capture) -> tuple[float, ...]:
    """The numbers of a call that are not sizes: all floats, and integers where the operation works entry by entry.

    A constant of one entry is a number too.
    """
    entrywise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    values = [_constant(value, recorded) for value in (*node.args, *node.kwargs.values())]
    kinds = (float, int) if entrywise else (float,)
    return tuple(v for v in values if isinstance(v, kinds) and not isinstance(v, bool))


def _constant(value: Any, recorded: Capture) -> Any:
    while isinstance(value, Node) and value.op == "call_function" and op_name(value) in ALIASES:
        value = value.args[0]
    held = recorded.constants.get(value) if isinstance(value, Node) else None
    return held.item() if held is not None and held.numel() == 1 and not isinstance(held, FakeTensor) else value
