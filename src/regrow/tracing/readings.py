"""Record where a network reads its axes, so that it can be run with dropped units replaced there, block by block.

Blocks end where repeated modules meet. Only the structure of the recording tells where (which module runs which
operation, data flow, shapes and constants), so networks without numbers have blocks too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from regrow.core.axes import AxisGraph, Decision, Dim, Example
from regrow.tracing.capture import Capture, TraceError, capture, capture_in_training
from regrow.tracing.folds import find_divisor_dims
from regrow.tracing.graph import Names, assemble
from regrow.tracing.meta_copy import leaves_in
from regrow.tracing.model_state import describe_code, names_in, state_of
from regrow.tracing.nodes import module_of, modules_around, op_name, operands, shape_of
from regrow.tracing.record import compared_operands
from regrow.tracing.rules import walk
from regrow.tracing.steps import list_operations, list_steps
from regrow.tracing.walk import Walk


@dataclass(frozen=True)
class GraphBlock:
    """A contiguous run of operations in a recording, with the values that cross its boundaries.

    Operations are numbered as in ``AxisGraph.steps``, so that a block of a network is one of its cut copy too.
    """

    path: str  # the module whose operations they are; empty between repeated modules
    start: int  # the number of the first operation
    stop: int  # the number behind the last
    inputs: tuple[int | str, ...] = ()  # numbers of earlier operations, and the network's inputs and constants
    outputs: tuple[int, ...] = ()  # operations whose results are read later, or are outputs of the network
    states: tuple[str, ...] = ()  # parameters and buffers that it reads
    # Its class: blocks of one class run the same operations with the same constants in the same wiring, at any widths.
    block_class: int = 0


def divide_into_blocks(recorded: Capture) -> tuple[GraphBlock, ...]:
    """Divide a recorded network into blocks: its outermost repeated modules, and the operations between two of them.

    A module is repeated if another one in the same parent runs the same operations on the same shapes, or is of its
    class and both have operations of their own beside those of their children (a residual block of another width). It
    is a block if it reads two weights or more and its operations are contiguous.
    """
    net = _Net(recorded)
    end = len(net.steps)
    repeated = sorted(net.find_repeated(range(end)), key=lambda block: block.start)
    result: list[GraphBlock] = []
    numbers: dict[int, int] = {}
    before = 0  # where the block before ends
    for block in (*repeated, GraphBlock("", end, end)):
        for path, start, stop in (("", before, block.start), (block.path, block.start, block.stop)):
            if start < stop:
                form = net.hash_form(start, stop, sized=False)
                block_class = numbers.setdefault(form, len(numbers))
                inputs, outputs, states = net.find_boundaries(start, stop)
                result.append(GraphBlock(path, start, stop, inputs, outputs, states, block_class))
        before = block.stop
    return tuple(result)


class _Net:
    """A recording as a list of operations, with the modules around each, and the last reader of each result."""

    def __init__(self, recorded: Capture) -> None:
        self.steps = list_steps(recorded)
        self.modules = [[(path, kind) for path, kind in modules_around(n) if path] for n in list_operations(recorded)]
        self.shapes = {name: shape_of(node) for node, name in recorded.states.items()}
        self.readers = {operand: i for i, step in enumerate(self.steps) for operand in step.operands}

    def find_repeated(self, indices: Sequence[int], depth: int = 0) -> list[GraphBlock]:
        """Return the repeated modules, ``depth`` levels below the network, among the operations numbered ``indices``.

        A repeated module counts as a whole, unless most of it is a chain of repeated modules again (an encoder of
        blocks); parallel modules, such as experts, are no chain.
        """
        children: dict[str, list[int]] = {}
        for i in indices:
            if len(self.modules[i]) > depth:
                path, _ = self.modules[i][depth]
                children.setdefault(path, []).append(i)
        forms: dict[str, int] = {}
        classes: dict[str, type] = {}
        for path, inside in children.items():
            if self._is_block(inside):
                forms[path] = self.hash_form(inside[0], inside[-1] + 1)
                if any(len(self.modules[i]) == depth + 1 for i in inside):  # has operations outside its children
                    _, classes[path] = self.modules[inside[0]][depth]
        form_counts, class_counts = Counter(forms.values()), Counter(classes.values())
        result = []
        for path, inside in children.items():
            nested = self.find_repeated(inside, depth + 1)
            same_form = path in forms and form_counts[forms[path]] > 1
            same_class = path in classes and class_counts[classes[path]] > 1
            covered = sum(block.stop - block.start for block in nested)
            is_container = 2 * covered > len(inside) and self._is_chain(nested)  # such as an encoder of blocks
            if (same_form or same_class) and not is_container:
                result.append(GraphBlock(path, inside[0], inside[-1] + 1))
            else:
                result += nested
        return result

    def _is_chain(self, blocks: Sequence[GraphBlock]) -> bool:
        """Whether each block works on the output of the one before it."""
        for block, other in pairwise(blocks):
            reached = {*range(block.start, block.stop)}
            for i in range(block.stop, other.stop):
                if not reached.isdisjoint(self.steps[i].operands):
                    reached.add(i)
            if reached.isdisjoint(range(other.start, other.stop)):
                return False
        return True

    def _is_block(self, indices: Sequence[int]) -> bool:
        """Whether operations (their numbers) are contiguous and read two weights or more."""
        if indices[-1] - indices[0] + 1 != len(indices):
            return False
        read = {operand for i in indices for operand in self.steps[i].operands if isinstance(operand, str)}
        return sum(len(self.shapes.get(name, ())) > 1 for name in read) > 1

    def hash_form(self, start: int, stop: int, sized: bool = True) -> int:
        """Return a hash of what operations ``start`` to ``stop - 1`` compute, of any input; ``sized``: with shapes."""
        outside: dict[int | str, int] = {}
        form = []
        for step in self.steps[start:stop]:
            operands: list[object] = []
            for operand in step.operands:
                if isinstance(operand, int) and operand >= start:
                    operands.append(operand - start)
                else:
                    shape = self.shapes.get(operand) if isinstance(operand, str) else None
                    number = outside.setdefault(operand, len(outside))
                    operands.append((number, shape if sized else _without_sizes(shape)))
            form.append((step.op, step.shapes if sized else _without_sizes(step.shapes), step.numbers, tuple(operands)))
        return hash(tuple(form))

    def find_boundaries(self, start: int, stop: int) -> tuple[tuple[int | str, ...], tuple[int, ...], tuple[str, ...]]:
        """Return (inputs, outputs, states) of operations ``start`` to ``stop - 1``, as in :class:`GraphBlock`."""
        read = dict.fromkeys(operand for step in self.steps[start:stop] for operand in step.operands)
        states = tuple(x for x in read if isinstance(x, str) and x in self.shapes)
        inputs = tuple(x for x in read if x not in self.shapes and not (isinstance(x, int) and x >= start))
        outputs = tuple(i for i in range(start, stop) if self.readers.get(i, -1) >= stop)
        return inputs, outputs, states


def _without_sizes(shape: Any) -> Any:
    """Return a shape, or several, with every size above 1 replaced by 2."""
    if isinstance(shape, list | tuple):
        return tuple(map(_without_sizes, shape))
    return shape if shape is None else min(shape, 2)


@dataclass(frozen=True)
class ReadDim:
    """A dimension that an operation sums, compares or normalises over, so that dropped units must be masked there."""

    step: int  # the number of the operation in AxisGraph.steps
    operand: int  # the index of the tensor among those that the operation takes
    axis: int  # the index of the dimension in that tensor
    dim: Dim  # that dimension written in axes
    fill: float | None  # what replaces dropped units; None: the operation runs over the kept units (a restated norm)
    weight: str  # the parameter it is multiplied with; empty if there is none
    groups: Dim  # the number of groups written in axes, for a norm inside groups


@dataclass(frozen=True)
class Recording:
    """A traced network to run with units masked: its operations and the dimensions that read axes, but no values."""

    capture: Capture  # the operations, to be run one by one
    reads: tuple[ReadDim, ...]  # they hold for a cut copy too, whose operations are the same
    code: tuple[object, ...]  # of the recorded modules, as describe_code returns it

    def __deepcopy__(self, memo: dict[int, object]) -> "Recording":
        """Return itself: it is immutable, and the graph of a long network is linked too deep to be copied."""
        return self

    @cached_property
    def blocks(self) -> tuple[GraphBlock, ...]:
        """The blocks of the recorded network."""
        return divide_into_blocks(self.capture)

    def fits(self, model: nn.Module, example: Example) -> bool:
        """Whether the model and the example still have the code, shapes, dtypes and devices of the recording.

        Constants are not compared: :func:`regrow.tracing.trial.rehearse` does that, on a new recording.
        """
        state, inputs, leaves = state_of(model), self.capture.inputs, leaves_in(example)
        return (
            self.code == describe_code(model)
            and len(inputs) == len(leaves)
            and all(_has_form(state.get(name), node.meta["val"]) for node, name in self.capture.states.items())
            and all(_has_form(leaf, node.meta.get("val")) for node, leaf in zip(inputs, leaves, strict=True))
        )


def _has_form(value: object, form: object) -> bool:
    """Whether a value is what a placeholder stands for: a tensor of that shape, dtype and device, or an equal value."""
    if isinstance(form, Tensor):
        same = isinstance(value, Tensor) and (value.shape, value.dtype, value.device)
        return same == (form.shape, form.dtype, form.device)
    return type(value) is type(form) and bool(value == form)


@dataclass(frozen=True)
class Readings:
    """A recorded network, the dimensions in which it reads its axes, and the input it was recorded with."""

    capture: Capture  # the recorded operations
    given: Sequence[object]  # the tensors and other values that the network takes, as leaves_in returns them
    reads: tuple[ReadDim, ...]  # in order of the operations
    sizes: Mapping[str, int]  # key of each axis of the network → its units
    # In an eager recording, each operand from which an operation computes integers or booleans: the operation, the
    # operand, and its dimensions written in axes.
    compared: tuple[tuple[Node, Node, tuple[Dim, ...]], ...]


def record_readings(
    model: nn.Module, axes: AxisGraph, example: Example, decisions: tuple[Decision, ...] | None = None
) -> Readings:
    """Record a network anew, on ``example``, and return where it reads the axes of ``axes``; or raise TraceError.

    ``decisions``: of an earlier eager run, which are replayed, as in :func:`capture`.
    """
    recorded = capture(model, example, decisions, tracer=axes.tracer)
    w = walk(recorded, cautious=False)
    if axes.trained:
        trace_training(model, example, w)
    fresh, names = assemble(model, w, example)
    known = {axis.slots: axis.key for axis in axes}
    renamed = {axis.key: known.get(axis.slots, axis.key) for axis in fresh}
    names = Names({number: renamed[key] for number, key in names.keys.items()})
    nodes = recorded.graph.nodes if recorded.decisions is not None else ()
    compared = [(node, operand) for node in nodes for operand in compared_operands(node)]
    return Readings(
        capture=recorded,
        given=leaves_in(example),
        reads=list_reads(w, names),
        sizes={renamed[axis.key]: axis.size for axis in fresh},
        compared=tuple((node, operand, names.dims(w.of(operand))) for node, operand in compared),
    )


def make_recording(model: nn.Module, w: Walk, names: Names) -> Recording | None:
    """Return a walked network's recording, to run it masked; ``None`` where data decide which operations run."""
    if w.capture.decisions is not None:
        return None
    return Recording(w.capture, list_reads(w, names), describe_code(model))


def list_reads(w: Walk, names: Names) -> tuple[ReadDim, ...]:
    """Return the dimensions in which a walked network reads its axes, in order of the operations."""
    numbers = {node: i for i, node in enumerate(list_operations(w.capture))}
    result = []
    for r in w.readings:
        operand = operands(r.node).index(r.operand)
        dim = names.dim(w.of(r.operand)[r.dim])
        groups = 1 if r.groups is None else names.dim(r.groups)
        result.append(ReadDim(numbers[r.node], operand, r.dim, dim, r.fill, r.weight, groups))
    return tuple(result)


def trace_training(model: nn.Module, example: Example, w: Walk) -> None:
    """Record and walk a network in training mode too, and merge what that ties or freezes into ``w``, in place.

    It does so where training uses parameters that evaluation leaves out (auxiliary heads), or where the network's own
    code reads its mode and other operations run then. Both walks are about the same parameters, so what the second one
    ties, freezes or marks holds in the first. Sizes that training alone divides by have no fold: they are frozen.
    """
    if w.capture.decisions is not None or not (w.capture.unused or "training" in _names_in_code(model)):
        return
    try:
        trained = capture_in_training(model, example)
    except TraceError:
        return
    unused = tuple(name for name in w.capture.unused if name in trained.unused)
    if len(unused) == len(w.capture.unused) and _operation_names(w.capture) == _operation_names(trained):
        return
    second = walk(trained, merged=w)
    folded = {(module_of(node), kind) for node, kind in w.norms}
    for node, kind in second.norms:
        if (module_of(node), kind) not in folded:
            second.freeze(node, find_divisor_dims(second, node, kind))
    w.training_reads += [(second.of(reading.operand)[reading.dim], reading.weight) for reading in second.readings]
    w.capture = replace(w.capture, unused=unused)


def _names_in_code(model: nn.Module) -> set[str]:
    """Return the names that a network's own code (not torch's) reads, in classes and in functions that modules hold."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    defined = [base for base in classes if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    values = [value for holder in (*defined, *model.modules()) for value in vars(holder).values()]
    codes = [getattr(getattr(value, "__func__", value), "__code__", None) for value in values]
    return {name for code in codes if isinstance(code, CodeType) for name in names_in(code)}


def _operation_names(recorded: Capture) -> list[str]:
    """Return the names of the operations of a recording, in order, without dropout."""
    return [name for node in list_operations(recorded) if (name := op_name(node)) not in _DROPOUT]


# Operations that are not compared: evaluation may leave them out or not, with the same result.
_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
