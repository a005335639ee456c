"""Where a network reads its axes: the recorded operations, ready to be run with dropped units replaced."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.axes import AxisGraph, Decision, Dim, Example, Product, Sum
from regrow.tracing.capture import Capture, capture
from regrow.tracing.graph import assemble
from regrow.tracing.reach import reach
from regrow.tracing.record import judged
from regrow.tracing.rules import POINTWISE, RULES
from regrow.tracing.walk import walk


@dataclass(frozen=True)
class ReadDim:
    """A dimension that an operation sums or compares over.

    Args:
        node: The operation.
        operand: Which of its arguments.
        axis: Which dimension of the argument.
        dim: That dimension written in axes.
        fill: What dropped units count as; ``None`` where the operation runs over the kept units.
        weight: The parameter it is multiplied with, if it is one.
        groups: The number of groups written in axes, for a norm inside groups.
    """

    node: Node
    operand: Node
    axis: int
    dim: Dim
    fill: float | None
    weight: str
    groups: Dim


@dataclass(frozen=True)
class Readings:
    """A recorded network with the places that read its axes.

    Args:
        capture: The operations, to be run one by one.
        inputs: The value of each placeholder.
        readings: The places.
        sizes: The size of each axis that occurs in them.
        decisions: What data decided; ``None`` where ``torch.export`` recorded.
        judged: Each operand of which an operation makes whole numbers or truth values, in an eager record: the
            operation, the operand, and its dimensions written in axes.
    """

    capture: Capture
    inputs: tuple[Any, ...]
    readings: tuple[ReadDim, ...]
    sizes: Mapping[str, int]
    decisions: tuple[Decision, ...] | None
    judged: tuple[tuple[Node, Node, tuple[Dim, ...]], ...]


def readings(
    model: nn.Module, axes: AxisGraph, example: Example, decisions: tuple[Decision, ...] | None = None
) -> Readings:
    """Record a network anew and say where it reads the axes of ``axes``.

    Args:
        model: The network.
        axes: Its axes; names of axes are theirs, also where a cut has moved them since they were traced.
        example: The input to record with, and to run on.
        decisions: As for :func:`regrow.tracing.capture.capture`.
    """
    recorded = capture(model, example, decisions)
    w = walk(recorded, RULES, POINTWISE, cautious=False)
    if axes.trained:
        reach(model, example, w)
    fresh, names = assemble(model, w, example)
    known = {axis.slots: axis.key for axis in axes}
    renamed = {axis.key: known.get(axis.slots, axis.key) for axis in fresh}

    def written(expr: Any) -> Dim:
        return 1 if expr is None else _renamed(names.dim(expr), renamed)

    return Readings(
        capture=recorded,
        inputs=tuple(_inputs(model, recorded, example)),
        readings=tuple(
            ReadDim(r.node, r.operand, r.dim, written(w.of(r.operand)[r.dim]), r.fill, r.weight, written(r.groups))
            for r in w.readings
        ),
        sizes={renamed[axis.key]: axis.size for axis in fresh},
        decisions=recorded.decisions,
        judged=tuple(
            (node, one, tuple(map(written, w.of(one))))
            for node in (recorded.graph.nodes if recorded.decisions is not None else ())
            for one in judged(node)
        ),
    )


def _renamed(dim: Dim, names: Mapping[str, str]) -> Dim:
    match dim:
        case str():
            return names[dim]
        case Product(parts):
            return Product(tuple(_renamed(part, names) for part in parts))
        case Sum(parts):
            return Sum(tuple(_renamed(part, names) for part in parts))
    return dim


def _inputs(model: nn.Module, recorded: Capture, example: Example) -> Iterator[Any]:
    state: dict[str, Any] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    given = iter(tree_leaves((example.args, dict(example.kwargs))))
    for node in recorded.graph.nodes:
        if node.op != "placeholder":
            continue
        if node in recorded.states:
            yield state[recorded.states[node]]
        elif node in recorded.constants:
            yield recorded.constants[node]
        else:
            yield next(given)
