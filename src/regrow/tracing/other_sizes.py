"""Trace a network on inputs of other batch sizes and lengths: what depends on them must not depend on a width.

One example shows one side of every branch on a length. On a larger input, and on a smaller one where the example is
longer than a width, other operations may run: they must leave axes as free. And a network cut to few units must differ
from the uncut one there in nothing in which it does not differ on the traced example.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Dim, Example, Product, axes_in, size_of
from regrow.tracing.capture import Capture, TraceError, capture
from regrow.tracing.graph import assemble
from regrow.tracing.interception import limit_calls
from regrow.tracing.meta_copy import fake_copy, leaves_in, map_tensors
from regrow.tracing.nodes import as_list, op_name, shapes_of
from regrow.tracing.rules import walk
from regrow.tracing.steps import first_difference, operations, steps_of
from regrow.tracing.support import freeze_axes
from regrow.tracing.trial import Resizing, classes_of, deep_cuts, record_resized

REASON = "what the network does with it depends on the batch size or length of the input"
"""Why an axis is frozen that no operation freezes on the traced example."""

NARROW = 8
"""Axes of fewer units (of heads, mostly) are not taken for the width with which a length is compared."""

LONGER = 3
"""How many times the operations of the traced example another one may run."""


def freeze_by_size(model: nn.Module, axes: AxisGraph, examples: Sequence[Example] = ()) -> AxisGraph:
    """Return the graph with every axis frozen that cannot be cut on inputs of other sizes."""
    if axes.decisions is not None or not axes.steps or not axes.free():
        return axes
    families = [[example] for example in examples] or [list(_larger(axes)), list(_smaller(axes))]
    for family in families:
        for example in family:
            with suppress(TraceError):
                recorded = _record(model, axes, example)
                axes = _Probe(model, axes, example, recorded).freeze()
                break
    return axes


def _record(model: nn.Module, axes: AxisGraph, example: Example) -> Capture:
    """Record the network on an example, on fake tensors, unless it runs many more operations (one per token) there."""
    copy, fake = fake_copy(model, example)
    with limit_calls(LONGER * len(axes.recording.capture.graph.nodes)):
        return capture(copy, fake, tracer=axes.tracer)


@dataclass(frozen=True)
class _Probe:
    """A recording of a network on an example of other sizes than the traced one."""

    model: nn.Module
    axes: AxisGraph
    example: Example
    recorded: Capture

    def freeze(self) -> AxisGraph:
        axes = self.axes if self.is_as_traced else self._with_marks()
        free = [*axes.free()]
        if not free or not self.depends(free):
            return axes
        members = [axis for group in classes_of(free).values() if self.depends(group) for axis in group]
        return _frozen(axes, {axis.key: REASON for axis in members or free})

    def depends(self, cut: Sequence[Axis]) -> bool:
        """Whether a network that keeps few units of some axes differs from the uncut one as it does not when traced."""
        sizes = deep_cuts(self.axes, cut)
        problem = self._trial_problem(self.example, self.recorded, sizes)
        if not problem and (self.is_as_traced or _is_same(self.axes, self.near[1], self.recorded)):
            return False
        return problem != self._trial_problem(*self.near, sizes)

    @cached_property
    def is_as_traced(self) -> bool:
        """Whether the network runs the operations that it runs on the traced example."""
        return _is_same(self.axes, self.axes.recording.capture, self.recorded)

    @cached_property
    def near(self) -> tuple[Example, Capture]:
        """An example as traced, recorded again, since caches may be empty now; a batch or length below 3 becomes 3."""
        example, main, other = self.axes.example, _main_shape(self.axes.example), _main_shape(self.example)
        lengths = [d for dims in _lengths(self.axes) for d in dims if main[d] != other[d]]
        if main[0] < 3 or any(main[d] < 3 for d in lengths):
            example = _grown(example, main, max(main[0], 3), {d: max(main[d], 3) for d in lengths})
        with suppress(TraceError):
            return example, _record(self.model, self.axes, example)
        return self.axes.example, self.axes.recording.capture

    def _with_marks(self) -> AxisGraph:
        """Return the graph without the axes to which a trace on the other example gives another mark."""
        other, _ = assemble(self.model, walk(self.recorded), self.example)
        marks = {frozenset(axis.slots): axis for axis in other}
        reasons = {}
        for axis in self.axes.free():
            match = marks.get(frozenset(axis.slots))
            if match is None or match.mark is not axis.mark:
                why = match.reason if match is not None and not match.free else REASON
                reasons[axis.key] = f"{why}, on an input of another size"
        return _frozen(self.axes, reasons)

    def _trial_problem(self, example: Example, recorded: Capture, sizes: Mapping[str, int]) -> str:
        """Return how a cut network differs from the uncut one on an example; empty if it runs the same."""
        try:
            small = record_resized(self.model, replace(self.axes, example=example), Resizing(sizes))
        except TraceError:
            return "it does not run at that size"
        if list(map(op_name, operations(recorded))) != list(map(op_name, operations(small))):
            return "it runs other operations at that size"
        aligned = len(self.axes.steps) == len(operations(recorded))
        if deviation := first_difference(recorded, small, self.axes.steps if aligned else None):
            return deviation.problem
        return _misfit(self.axes, recorded, small, sizes, same_input=True)


def _is_same(axes: AxisGraph, first: Capture, second: Capture) -> bool:
    """Whether two recordings of a network have the same operations and constants, sizes of the input aside."""
    before, after = ([node.target for node in operations(recorded)] for recorded in (first, second))
    if before != after:
        return False
    rows = zip(steps_of(first), steps_of(second), strict=True)
    same = all((x.numbers, x.operands) == (y.numbers, y.operands) for x, y in rows)
    return same and not _misfit(axes, first, second, axes.sizes(), same_input=False)


def _frozen(axes: AxisGraph, reasons: Mapping[str, str]) -> AxisGraph:
    counts = {axes[key].count: reason for key, reason in reasons.items() if axes[key].count}
    others = {axis.key: counts[axis.count] for axis in axes.free() if axis.count in counts}
    return freeze_axes(axes, {**others, **reasons})


def _misfit(axes: AxisGraph, first: Capture, second: Capture, sizes: Mapping[str, int], same_input: bool) -> str:
    """Return where a shape does not follow from that at other sizes of axes, and of the input unless the same."""
    before, after, known = operations(first), operations(second), axes.sizes()
    for step, node, other in zip(axes.steps, before, after, strict=True) if len(axes.steps) == len(before) else ():
        shapes, others = as_list(shapes_of(node)), as_list(shapes_of(other))
        for dims, shape, new in zip(step.shapes, shapes, others, strict=False):
            if dims is None or shape is None or new is None:
                continue
            fits = [_fits(dim, n, m, known, sizes, same_input) for dim, n, m in zip(dims, shape, new, strict=False)]
            if len(shape) != len(new) or not all(fits):
                return f"{step.op} in {step.module or 'the model'} has another shape at that size"
    return ""


def _fits(
    dim: Dim, old: int, new: int, sizes: Mapping[str, int], new_sizes: Mapping[str, int], same_input: bool
) -> bool:
    if not {*axes_in(dim)}:
        return old == new or not same_input
    if not isinstance(dim, Product):
        return new * size_of(dim, sizes) == old * size_of(dim, new_sizes)
    parts = [part for part in dim.parts if {*axes_in(part)}]  # the others may be sizes of the input
    units, new_units = (prod(size_of(part, sized) for part in parts) for sized in (sizes, new_sizes))
    return new * units == old * new_units if same_input else not (old % units or new % new_units)


def _larger(axes: AxisGraph) -> Iterator[Example]:
    """Yield larger examples: batch and length above every width, multiples of the traced ones, then one of them."""
    main = _main_shape(axes.example)
    if not main:
        return
    widest = max(axis.size for axis in axes.free())
    multiples = [n * (widest // n + 1) for n in main]
    batch, lengths = widest + 1 + main[0], _lengths(axes)
    tries = [(batch, {d: widest + 1 + main[d] for d in dims}) for dims in lengths]
    tries += [(batch, {d: multiples[d] for d in dims}) for dims in lengths]
    tries += [(batch, {d: 2 * main[d] for d in dims}) for dims in lengths]
    tries += [(multiples[0], {}), *((main[0], {d: multiples[d] for d in dims}) for dims in lengths)]
    yield from (_grown(axes.example, main, size, grown) for size, grown in tries)


def _smaller(axes: AxisGraph) -> Iterator[Example]:
    """Yield smaller examples where the batch or a length of tokens is no smaller than a width."""
    main = _main_shape(axes.example)
    narrowest = min((axis.size for axis in axes.free() if axis.size >= NARROW), default=0)
    lengths = [dims for dims in _lengths(axes) if len(main) < 4]
    if not main or not narrowest or max(main[0], *(main[d] for dims in lengths for d in dims), 0) < narrowest:
        return
    for dims in (*lengths, ()):
        yield _grown(axes.example, main, min(main[0], 3), {d: min(main[d], 4) for d in dims})


def _main_shape(example: Example) -> tuple[int, ...]:
    """Return the shape of the first tensor of an example; empty if it has no entries."""
    main = next((x for x in leaves_in(example) if isinstance(x, Tensor) and x.dim()), None)
    return tuple(main.shape) if main is not None and main.numel() else ()


def _lengths(axes: AxisGraph) -> list[tuple[int, ...]]:
    """Return the dimensions of the first tensor that may be lengths: of tokens, of a sequence, or of an image."""
    main = next(x for x in leaves_in(axes.example) if isinstance(x, Tensor) and x.dim())
    if main.dim() == 2:
        return [] if main.is_floating_point() else [(1,)]
    if main.dim() == 3:
        return [(1,), (2,)]
    return [tuple(range(2, main.dim()))] if main.dim() > 3 else []


def _grown(example: Example, main: tuple[int, ...], batch: int, lengths: Mapping[int, int]) -> Example:
    """Return an example of another batch size and lengths; further tensors follow where they have equal sizes."""
    by_size = {main[d]: new for d, new in lengths.items()}

    def grow(shape: tuple[int, ...]) -> tuple[int, ...]:
        result = []
        for i, n in enumerate(shape):
            if i == 0 and n == main[0]:
                result.append(batch)
            elif len(shape) == len(main):
                result.append(lengths[i] if i in lengths and n == main[i] else n)
            else:
                result.append(by_size.get(n, n) if i > 0 and n > 1 else n)
        return tuple(result)

    return map_tensors(example, lambda x: x.new_zeros(()).expand(grow(tuple(x.shape))))  # entries do not matter
