"""Record where a network reads its axes, so that it can be run with dropped units replaced there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import CodeType

from torch import Tensor, nn
from torch.fx import Node

from regrow.core.axes import AxisGraph, Decision, Dim, Example, Product, Sum
from regrow.core.axes.operations import Tracer
from regrow.tracing.blocks import GraphBlock, blocks
from regrow.tracing.capture import Capture, TraceError, capture, in_training
from regrow.tracing.dimensions import Expr
from regrow.tracing.folds import size_divided_by
from regrow.tracing.graph import Names, assemble
from regrow.tracing.meta_copy import leaves_in
from regrow.tracing.model_state import code_of, names_in, state_of
from regrow.tracing.nodes import module_of, op_name, operands
from regrow.tracing.record import compared_operands
from regrow.tracing.rules import walk
from regrow.tracing.steps import operations
from regrow.tracing.walk import Walk


@dataclass(frozen=True)
class ReadDim:
    """A dimension that an operation sums, compares or normalises over, so that dropped units must be masked there."""

    step: int  # the number of the operation in AxisGraph.steps
    operand: int  # which of the tensors that the operation takes
    axis: int  # the index of the dimension in that tensor
    dim: Dim  # that dimension written in axes
    fill: float | None  # what replaces dropped units; None: the operation runs over the kept units (a restated norm)
    weight: str  # the parameter it is multiplied with; empty if there is none
    groups: Dim  # the number of groups written in axes, for a norm inside groups


@dataclass(frozen=True)
class Recording:
    """A recorded network and the dimensions in which it reads its axes; independent of the values of its tensors."""

    capture: Capture  # the operations, to be run one by one
    reads: tuple[ReadDim, ...]  # they hold for a cut copy too, whose operations are the same
    code: tuple[object, ...]  # of the recorded modules, as code_of returns it

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
        """Return a recording of a model that was cast, moved or changed since; made once for all that are alike."""
        # A new walk would not see axes of which one unit is left, so the dimensions that are read stay.
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
    """A recorded network, the dimensions in which it reads its axes, and the input it was recorded with."""

    capture: Capture
    given: Sequence[object]  # the tensors and other values that the network takes
    reads: tuple[ReadDim, ...]
    sizes: Mapping[str, int]  # of each axis that occurs in them
    # In an eager recording, each operand from which an operation computes integers or booleans: the operation, the
    # operand, and its dimensions written in axes.
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
            (node, operand, tuple(map(written, w.of(operand))))
            for node in (recorded.graph.nodes if recorded.decisions is not None else ())
            for operand in compared_operands(node)
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
        case Product(parts) | Sum(parts):
            return type(dim)(tuple(_renamed(part, names) for part in parts))
    return dim


def trace_training(model: nn.Module, example: Example, w: Walk) -> Capture | None:
    """Record and walk a network in training mode too, and merge what that ties or freezes into the evaluation walk.

    It does so where training uses parameters that evaluation leaves out (auxiliary heads), or where the network's own
    code reads its mode and other operations run then. Both walks are about the same parameters, so what the second one
    ties, freezes or marks holds in the first. Sizes that training alone divides by have no fold: they are frozen.
    """
    if w.capture.decisions is not None or not (w.capture.unused or "training" in _names_read(model)):
        return None
    try:
        trained = in_training(model, example)
    except TraceError:
        return None
    left = tuple(name for name in w.capture.unused if name in trained.unused)
    if len(left) == len(w.capture.unused) and _names(w.capture) == _names(trained):
        return None
    second = walk(trained, known={name: w.of(node) for node, name in w.capture.states.items()})
    alike = {(module_of(node), kind) for node, kind in w.norms}
    for node, kind in second.norms:
        if (module_of(node), kind) not in alike:
            second.freeze(node, "its size is divided by in training", *size_divided_by(second, node, kind))
    for parameter, roles in second.roles.items():
        w.roles.setdefault(parameter, set()).update(roles)
    w.also += [(second.of(reading.operand)[reading.dim], reading.weight) for reading in second.readings]
    w.literals += second.literals
    w.groups += second.groups
    w.equal += second.equal
    w.weights |= second.weights
    w.tables += [name for name in second.tables if name not in w.tables]
    w.notes += second.notes
    w.capture = replace(w.capture, unused=left)
    return trained


def _names_read(model: nn.Module) -> set[str]:
    """Return the names that a network's own code (not torch's) reads, in classes and in functions that modules hold."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    defined = [base for base in classes if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    values = [value for holder in (*defined, *model.modules()) for value in vars(holder).values()]
    codes = [getattr(getattr(value, "__func__", value), "__code__", None) for value in values]
    return {name for code in codes if isinstance(code, CodeType) for name in names_in(code)}


def _names(recorded: Capture) -> list[str]:
    return [name for node in operations(recorded) if (name := op_name(node)) not in _DROPOUT]


_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
"""Operations that are not compared: evaluation may leave them out or not, with the same result."""
