"""Record where a network reads its axes, so that it can be run with dropped units replaced there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.fx import Node

from regrow.core.axes import AxisGraph, Decision, Dim, Example, Product, Sum
from regrow.core.operations import Tracer
from regrow.tracing.blocks import GraphBlock, blocks
from regrow.tracing.capture import Capture, capture
from regrow.tracing.decisions import compared_operands
from regrow.tracing.dimensions import Expr
from regrow.tracing.graph import Names, assemble
from regrow.tracing.meta_copy import leaves_in
from regrow.tracing.model_state import code_of, state_of
from regrow.tracing.nodes import operands
from regrow.tracing.rules import walk
from regrow.tracing.steps import operations
from regrow.tracing.training_trace import trace_training
from regrow.tracing.walk import Walk


@dataclass(frozen=True)
class ReadDim:
    """A dimension that an operation sums, compares or normalises over, so that dropped units must be masked there.

    Args:
        step: The number of the operation in :attr:`regrow.core.axes.AxisGraph.steps`.
        operand: Which of the tensors that the operation takes.
        axis: The index of the dimension in that tensor.
        dim: That dimension written in axes.
        fill: The value that replaces dropped units; ``None``: the operation runs over the kept units (a restated norm).
        weight: The name of the parameter it is multiplied with; empty if there is none.
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
    """A recorded network and the dimensions in which it reads its axes; independent of the values of its tensors.

    Args:
        capture: The operations, to be run one by one.
        reads: The dimensions that are read. They hold for a cut copy too, whose operations are the same.
        code: The code of the recorded modules, as :func:`regrow.tracing.model_state.code_of` returns it.
    """

    capture: Capture
    reads: tuple[ReadDim, ...]
    code: tuple[object, ...]

    def __deepcopy__(self, memo: dict[int, object]) -> "Recording":
        """Return itself: it is immutable, and the graph of a long network is linked too deep to be copied."""
        return self

    @cached_property
    def blocks(self) -> tuple[GraphBlock, ...]:
        """The blocks of the recorded network."""
        return blocks(self.capture)

    def fits(self, model: nn.Module, example: Example) -> bool:
        """Whether the model and the example still have the code, shapes, dtypes and devices of the recording.

        Constants are not compared: :func:`regrow.tracing.trial.rehearse` does that, on a new recording.
        """
        state, inputs, leaves = state_of(model), self.capture.inputs, leaves_in(example)
        return (
            self.code == code_of(model)
            and len(inputs) == len(leaves)
            and all(_is_alike(state.get(name), node.meta["val"]) for node, name in self.capture.states.items())
            and all(_is_alike(leaf, node.meta.get("val")) for node, leaf in zip(inputs, leaves, strict=True))
        )

    def renew(self, model: nn.Module, example: Example, tracer: Tracer) -> "Recording":
        """Return a recording of a model that was cast, moved or changed since; made once for all that are alike.

        A new walk would not see axes of which one unit is left, so the dimensions that are read stay.
        """
        if not (self._renewed and self._renewed[-1].fits(model, example)):
            recorded = capture(model, example, tracer=tracer)
            self._renewed[:] = [Recording(recorded, self.reads, code_of(model))]
        return self._renewed[-1]

    @cached_property
    def _renewed(self) -> list["Recording"]:
        return []


def _is_alike(value: object, form: object) -> bool:
    """Whether a value is what a placeholder stands for: a tensor of that shape, dtype and device, or an equal value."""
    if isinstance(form, Tensor):
        same = isinstance(value, Tensor) and (value.shape, value.dtype, value.device)
        return same == (form.shape, form.dtype, form.device)
    return type(value) is type(form) and bool(value == form)


@dataclass(frozen=True)
class Readings:
    """A recorded network, the dimensions in which it reads its axes, and the input it was recorded with.

    Args:
        capture: The operations, to be run one by one.
        given: The tensors and other values that the network is given.
        reads: The dimensions that are read.
        sizes: The size of each axis that occurs in them.
        compared: In an eager recording, each operand from which an operation computes integers or booleans: the
            operation, the operand, and its dimensions written in axes.
    """

    capture: Capture
    given: Sequence[object]
    reads: tuple[ReadDim, ...]
    sizes: Mapping[str, int]
    compared: tuple[tuple[Node, Node, tuple[Dim, ...]], ...]


def readings(
    model: nn.Module, axes: AxisGraph, example: Example, decisions: tuple[Decision, ...] | None = None
) -> Readings:
    """Record a network anew and return where it reads the axes of ``axes``."""
    recorded = capture(model, example, decisions, tracer=axes.tracer)
    w = walk(recorded, cautious=False)
    if axes.trained:
        trace_training(model, example, w)
    fresh, names = assemble(model, w, example)
    known = {axis.slots: axis.key for axis in axes}
    renamed = {axis.key: known.get(axis.slots, axis.key) for axis in fresh}

    def written(expr: Expr | None) -> Dim:
        return 1 if expr is None else _renamed(names.dim(expr), renamed)

    return Readings(
        capture=recorded,
        given=leaves_in(example),
        reads=reads(w, written),
        sizes={renamed[axis.key]: axis.size for axis in fresh},
        compared=tuple(
            (node, one, tuple(map(written, w.of(one))))
            for node in (recorded.graph.nodes if recorded.decisions is not None else ())
            for one in compared_operands(node)
        ),
    )


def recording(model: nn.Module, w: Walk, names: Names) -> Recording | None:
    """Return a walked network's recording; ``None`` where data decide which operations run."""
    if w.capture.decisions is not None:
        return None
    return Recording(w.capture, reads(w, lambda expr: 1 if expr is None else names.dim(expr)), code_of(model))


def reads(w: Walk, written: Callable[[Expr | None], Dim]) -> tuple[ReadDim, ...]:
    """Return the dimensions in which a walked network reads its axes."""
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


def _renamed(dim: Dim, names: Mapping[str, str]) -> Dim:
    match dim:
        case str():
            return names[dim]
        case Product(parts):
            return Product(tuple(_renamed(part, names) for part in parts))
        case Sum(parts):
            return Sum(tuple(_renamed(part, names) for part in parts))
    return dim
