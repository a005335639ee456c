"""Where a network reads its axes: the recorded operations, ready to be run with dropped units replaced."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.axes import AxisGraph, Decision, Dim, Example, Product, Sum
from regrow.tracing.blocks import GraphBlock, blocks
from regrow.tracing.capture import Capture, capture
from regrow.tracing.graph import Names, assemble
from regrow.tracing.record import compared_operands
from regrow.tracing.rules import POINTWISE, RULES
from regrow.tracing.steps import operations
from regrow.tracing.training_trace import trace_training
from regrow.tracing.walk import Walk, walk


@dataclass(frozen=True)
class ReadDim:
    """A dimension that an operation sums or compares over.

    Args:
        step: The number of the operation, as in :attr:`regrow.axes.AxisGraph.steps`.
        operand: Which of the tensors that it is given.
        axis: Which dimension of that tensor.
        dim: That dimension written in axes.
        fill: What dropped units count as; ``None`` where the operation runs over the kept units.
        weight: The parameter it is multiplied with, if it is one.
        groups: The number of groups written in axes, for a norm inside groups.
    """

    step: int
    operand: int
    axis: int
    dim: Dim
    fill: float | None
    weight: str
    groups: Dim


@dataclass(frozen=True)
class Recording:
    """A recorded network with the places that read its axes; nothing in it depends on numbers in tensors.

    Args:
        capture: The operations, to be run one by one.
        reads: The places. They are those of a cut copy too, whose operations are the same ones.
    """

    capture: Capture
    reads: tuple[ReadDim, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recording":
        """Itself: nothing in it ever changes, and the operations of a long network are linked too deep to be copied."""
        return self

    @cached_property
    def blocks(self) -> tuple[GraphBlock, ...]:
        """Its blocks."""
        return blocks(self.capture)

    def fits(self, model: nn.Module) -> bool:
        """Whether it is of the model as it is: shapes, precisions and devices."""
        state = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        forms = [(state.get(name), node.meta["val"]) for node, name in self.capture.states.items()]
        return all(
            x is not None and (x.shape, x.dtype, x.device) == (form.shape, form.dtype, form.device) for x, form in forms
        )


@dataclass(frozen=True)
class Readings:
    """A recorded network with the places that read its axes, and the input that it was recorded with.

    Args:
        capture: The operations, to be run one by one.
        inputs: The value of each placeholder.
        reads: The places.
        sizes: The size of each axis that occurs in them.
        decisions: What data decided; ``None`` where ``torch.export`` recorded.
        compared: Each operand of which an operation makes whole numbers or truth values, in an eager record: the
            operation, the operand, and its dimensions written in axes.
    """

    capture: Capture
    inputs: tuple[Any, ...]
    reads: tuple[ReadDim, ...]
    sizes: Mapping[str, int]
    decisions: tuple[Decision, ...] | None
    compared: tuple[tuple[Node, Node, tuple[Dim, ...]], ...]

    @property
    def given(self) -> list[Any]:
        """The network's inputs alone, in order."""
        places = [node for node in self.capture.graph.nodes if node.op == "placeholder"]
        known = self.capture.states.keys() | self.capture.constants.keys()
        return [value for node, value in zip(places, self.inputs, strict=True) if node not in known]


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
        trace_training(model, example, w)
    fresh, names = assemble(model, w, example)
    known = {axis.slots: axis.key for axis in axes}
    renamed = {axis.key: known.get(axis.slots, axis.key) for axis in fresh}

    def written(expr: Any) -> Dim:
        return 1 if expr is None else _renamed(names.dim(expr), renamed)

    return Readings(
        capture=recorded,
        inputs=tuple(inputs(model, recorded, example)),
        reads=reads(w, written),
        sizes={renamed[axis.key]: axis.size for axis in fresh},
        decisions=recorded.decisions,
        compared=tuple(
            (node, one, tuple(map(written, w.of(one))))
            for node in (recorded.graph.nodes if recorded.decisions is not None else ())
            for one in compared_operands(node)
        ),
    )


def recording(w: Walk, names: Names) -> Recording | None:
    """A walked network's recording; ``None`` where data decide what it does, for their decisions are part of a run."""
    if w.capture.decisions is not None:
        return None
    return Recording(w.capture, reads(w, lambda expr: 1 if expr is None else names.dim(expr)))


def reads(w: Walk, written: Callable[[Any], Dim]) -> tuple[ReadDim, ...]:
    """The places of a walked network that read its axes.

    Args:
        w: The walk.
        written: A dimension's expression (or none) → the dimension written in axes.
    """
    step = {node: i for i, node in enumerate(operations(w.capture))}
    return tuple(
        ReadDim(
            step[r.node],
            operands(r.node).index(r.operand),
            r.dim,
            written(w.of(r.operand)[r.dim]),
            r.fill,
            r.weight,
            written(r.groups),
        )
        for r in w.readings
    )


def operands(node: Node) -> list[Node]:
    """The tensors that an operation is given, in order."""
    return [one for one in tree_leaves((node.args, node.kwargs)) if isinstance(one, Node)]


def _renamed(dim: Dim, names: Mapping[str, str]) -> Dim:
    match dim:
        case str():
            return names[dim]
        case Product(parts):
            return Product(tuple(_renamed(part, names) for part in parts))
        case Sum(parts):
            return Sum(tuple(_renamed(part, names) for part in parts))
    return dim


def inputs(model: nn.Module, recorded: Capture, example: Example) -> Iterator[Any]:
    """The value of each placeholder of a recording, in order."""
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
