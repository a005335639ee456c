"""Divide a recorded network into blocks, at the boundaries of its repeated modules, so that it can run block by block.

Only the structure of the recording is used (which module runs which operation, data flow, shapes and constants), so it
works on networks without numbers, and with one block in memory at a time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from regrow.tracing.capture import Capture
from regrow.tracing.nodes import modules_around, shape_of
from regrow.tracing.steps import operations, steps_of


@dataclass(frozen=True)
class GraphBlock:
    """A contiguous run of operations in a recording, with the values that cross its boundaries.

    Operations are numbered as in ``AxisGraph.steps``, so that a block of a network is one of its cut copy too.
    """

    path: str  # the module whose operations they are; empty between repeated modules
    start: int
    stop: int
    inputs: tuple[int | str, ...] = ()  # numbers of earlier operations, and the network's inputs and constants
    outputs: tuple[int, ...] = ()  # operations whose results are read later, or are outputs of the network
    states: tuple[str, ...] = ()  # parameters and buffers that it reads
    # Its class: blocks of one class run the same operations with the same constants in the same wiring, at any widths.
    kind: int = 0


def blocks(recorded: Capture) -> tuple[GraphBlock, ...]:
    """Divide a recorded network into blocks: its outermost repeated modules, and the operations between two of them.

    A module is repeated if another one in the same parent runs the same operations on the same shapes, or is of its
    class and both have operations of their own beside those of their children (a residual block of another width). It
    is a block if it reads two weights or more and its operations are contiguous.
    """
    net = _Net(recorded)
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
                inputs, outputs, states = net.seams(start, stop)
                result.append(GraphBlock(path, start, stop, inputs, outputs, states, kind))
        at = block.stop
    return tuple(result)


class _Net:
    """A recording as a list of operations, with the modules around each and its last reader."""

    def __init__(self, recorded: Capture) -> None:
        self.steps = steps_of(recorded)
        self.modules = [[(path, kind) for path, kind in modules_around(n) if path] for n in operations(recorded)]
        self.shapes = {name: shape_of(node) for node, name in recorded.states.items()}
        self.readers = {operand: i for i, step in enumerate(self.steps) for operand in step.operands}

    def repeated(self, numbers: Sequence[int], depth: int = 0) -> list[GraphBlock]:
        """Return the repeated modules among those that run some operations.

        A repeated module counts as a whole, unless most of it is a chain of repeated modules again (an encoder of
        blocks); parallel modules, such as experts, are no chain.
        """
        children: dict[str, list[int]] = {}
        for i in numbers:
            if len(self.modules[i]) > depth:
                children.setdefault(self.modules[i][depth][0], []).append(i)
        forms: dict[str, int] = {}
        kinds: dict[str, type] = {}
        for path, part in children.items():
            if self._is_block(part):
                forms[path] = self.form(part[0], part[-1] + 1)
                if any(len(self.modules[i]) == depth + 1 for i in part):
                    kinds[path] = self.modules[part[0]][depth][1]
        alike, same = Counter(forms.values()), Counter(kinds.values())
        result = []
        for path, part in children.items():
            parts = self.repeated(part, depth + 1)
            is_repeated = path in forms and (alike[forms[path]] > 1 or (path in kinds and same[kinds[path]] > 1))
            covered = sum(block.stop - block.start for block in parts)
            if is_repeated and not (2 * covered > len(part) and self._is_chain(parts)):
                result.append(GraphBlock(path, part[0], part[-1] + 1))
            else:
                result += parts
        return result

    def _is_chain(self, parts: Sequence[GraphBlock]) -> bool:
        """Whether each of some modules works on the output of the one before it."""
        for block, other in pairwise(parts):
            reached = {*range(block.start, block.stop)}
            for i in range(block.stop, other.stop):
                if not reached.isdisjoint(self.steps[i].operands):
                    reached.add(i)
            if reached.isdisjoint(range(other.start, other.stop)):
                return False
        return True

    def _is_block(self, numbers: Sequence[int]) -> bool:
        if numbers[-1] - numbers[0] + 1 != len(numbers):
            return False
        read = {operand for i in numbers for operand in self.steps[i].operands if isinstance(operand, str)}
        return sum(len(self.shapes.get(name, ())) > 1 for name in read) > 1

    def form(self, start: int, stop: int, sized: bool = True) -> int:
        """Return a hash of what some operations compute, independent of names and of where their inputs come from."""
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
                    operands.append((number, shape if sized else _unsized(shape)))
            form.append((step.op, step.shapes if sized else _unsized(step.shapes), step.numbers, tuple(operands)))
        return hash(tuple(form))

    def seams(self, start: int, stop: int) -> tuple[tuple[int | str, ...], tuple[int, ...], tuple[str, ...]]:
        """Return the inputs, outputs and states of a run of operations, as in :class:`GraphBlock`."""
        read = dict.fromkeys(operand for step in self.steps[start:stop] for operand in step.operands)
        states = tuple(x for x in read if isinstance(x, str) and x in self.shapes)
        inputs = tuple(x for x in read if x not in self.shapes and not (isinstance(x, int) and x >= start))
        outputs = tuple(i for i in range(start, stop) if self.readers.get(i, -1) >= stop)
        return inputs, outputs, states


def _unsized(shape: Any) -> Any:
    """Return a shape, or several, with every size above 1 replaced by 2."""
    return tuple(map(_unsized, shape)) if isinstance(shape, list | tuple) else shape if shape is None else min(shape, 2)
