"""Divide a recorded network into blocks, at the boundaries of its repeated modules, so that it can run block by block.

Only the structure of the recording is used (which module runs which operation, data flow, shapes and constants), so it
works on networks without numbers, and with one block in memory at a time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from regrow.core.operations import Numbers
from regrow.tracing.capture import Capture
from regrow.tracing.nodes import as_list, op_name, shape_of, shapes_of
from regrow.tracing.steps import calls


@dataclass(frozen=True)
class GraphBlock:
    """A contiguous run of operations in a recording, with the values that cross its boundaries.

    Operations are numbered as in ``AxisGraph.steps``, so that a block of a network is one of its cut copy too.

    Args:
        path: The module whose operations they are; empty between repeated modules.
        start: The number of the first operation.
        stop: The number of the last operation plus one.
        inputs: Values it reads from outside: numbers of earlier operations, and the network's inputs and constants.
        outputs: The numbers of its operations whose results are read later, or are outputs of the network.
        states: Names of the parameters and buffers that it reads.
        kind: Its class: blocks of one class run the same operations with the same constants in the same wiring, at any
            widths.
    """

    path: str
    start: int
    stop: int
    inputs: tuple[int | str, ...] = ()
    outputs: tuple[int, ...] = ()
    states: tuple[str, ...] = ()
    kind: int = 0


def blocks(recorded: Capture) -> tuple[GraphBlock, ...]:
    """Divide a recorded network into blocks at its repeated modules; without repeated modules it is one block.

    A module is repeated if another one in the same parent runs the same operations on the same shapes, or is of its
    class and both have operations of their own beside those of their children (a residual block of another width). It
    is a block if it reads two weights or more and its operations are contiguous; the outermost such modules count, and
    the operations between two of them are a block too.
    """
    net = _Net.of(recorded)
    end = len(net.steps)
    repeated = sorted(net.repeated(range(end)), key=lambda block: block.start)
    result: list[GraphBlock] = []
    numbers: dict[int, int] = {}
    at = 0
    for block in (*repeated, GraphBlock("", end, end)):
        for path, start, stop in (("", at, block.start), (block.path, block.start, block.stop)):
            if start < stop:
                form = net.form(start, stop, sized=False)
                kind = numbers.setdefault(form, len(numbers))
                result.append(GraphBlock(path, start, stop, *net.seams(start, stop), kind))
        at = block.stop
    return tuple(result)


@dataclass(frozen=True)
class _BlockStep:
    op: str
    shapes: Any
    numbers: Numbers
    operands: tuple[int | str, ...]
    modules: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Net:
    """A recording as a list of steps, with the last reader of each."""

    steps: Sequence[_BlockStep]
    shapes: Mapping[str, Any]
    readers: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, recorded: Capture) -> "_Net":
        steps: list[_BlockStep] = []
        last: dict[int, int] = {}
        for i, (node, numbers, operands) in enumerate(calls(recorded, ())):
            around = tuple((path, kind) for path, kind, *_ in (node.meta.get("nn_module_stack") or {}).values() if path)
            steps.append(_BlockStep(op_name(node), tuple(as_list(shapes_of(node))), numbers, operands, around))
            last.update((one, i) for one in operands if isinstance(one, int))
        return cls(steps, {name: shape_of(node) for node, name in recorded.states.items()}, last)

    def repeated(self, own: Sequence[int], depth: int = 0) -> list[GraphBlock]:
        """Return the repeated modules among those that run some operations.

        A repeated module counts as a whole, unless most of it is a chain of repeated modules again (an encoder of
        blocks); parallel modules, such as experts, are no chain.
        """
        children: dict[str, list[int]] = {}
        for i in own:
            if len(self.steps[i].modules) > depth:
                children.setdefault(self.steps[i].modules[depth][0], []).append(i)
        whole = {path: part for path, part in children.items() if self._is_block(part)}
        forms = {path: self.form(part[0], part[-1] + 1) for path, part in whole.items()}
        kinds = {path: self.steps[part[0]].modules[depth][1] for path, part in whole.items()}
        classes = {
            path: kind
            for path, kind in kinds.items()
            if any(len(self.steps[i].modules) == depth + 1 for i in whole[path])
        }
        alike, same = Counter(forms.values()), Counter(classes.values())
        result = []
        for path, part in children.items():
            parts = self.repeated(part, depth + 1)
            is_repeated = path in whole and (alike[forms[path]] > 1 or same[classes.get(path)] > 1)
            if is_repeated and not (2 * sum(one.stop - one.start for one in parts) > len(part) and self._chain(parts)):
                result.append(GraphBlock(path, part[0], part[-1] + 1))
            else:
                result += parts
        return result

    def _chain(self, parts: Sequence[GraphBlock]) -> bool:
        """Whether each of some modules works on the output of the one before it."""
        for one, other in pairwise(parts):
            reached = {*range(one.start, one.stop)}
            for i in range(one.stop, other.stop):
                if not reached.isdisjoint(self.steps[i].operands):
                    reached.add(i)
            if reached.isdisjoint(range(other.start, other.stop)):
                return False
        return True

    def _is_block(self, own: Sequence[int]) -> bool:
        if own[-1] - own[0] + 1 != len(own):
            return False
        read = {one for i in own for one in self.steps[i].operands if isinstance(one, str)}
        return sum(len(self.shapes.get(name) or ()) > 1 for name in read) > 1

    def form(self, start: int, stop: int, sized: bool = True) -> int:
        """Return a hash of what some operations compute, independent of names and of where their inputs come from."""
        outside: dict[int | str, int] = {}
        form = []
        for step in self.steps[start:stop]:
            operands = tuple(
                one - start
                if isinstance(one, int) and one >= start
                else (outside.setdefault(one, len(outside)), self._shape(one, sized))
                for one in step.operands
            )
            form.append((step.op, step.shapes if sized else _unsized(step.shapes), step.numbers, operands))
        return hash(tuple(form))

    def _shape(self, operand: int | str, sized: bool) -> Any:
        shape = self.shapes.get(operand) if isinstance(operand, str) else None
        return shape if sized else _unsized(shape)

    def seams(self, start: int, stop: int) -> tuple[tuple[int | str, ...], tuple[int, ...], tuple[str, ...]]:
        """Return the inputs, outputs and states of a run of operations, as in :class:`GraphBlock`."""
        read = dict.fromkeys(one for step in self.steps[start:stop] for one in step.operands)
        states = tuple(one for one in read if isinstance(one, str) and one in self.shapes)
        inputs = tuple(one for one in read if one not in self.shapes and not (isinstance(one, int) and one >= start))
        outputs = tuple(i for i in range(start, stop) if self.readers.get(i, -1) >= stop)
        return inputs, outputs, states


def _unsized(shape: Any) -> Any:
    """Return a shape, or several, with every size above 1 replaced by 2."""
    return tuple(map(_unsized, shape)) if isinstance(shape, list | tuple) else shape if shape is None else min(shape, 2)
