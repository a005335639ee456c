"""Trace a network on inputs of other batch sizes and lengths: what depends on them must not depend on a width.

One example shows one side of every branch on a length. So the network is traced on a larger input too, and on a smaller
one where the example is longer than a width. Where it runs other operations there, they must leave axes as free. And
cut to few units, it must deviate from its plan there in nothing in which it does not on an input as traced.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Example
from regrow.tracing.capture import TraceError, capture
from regrow.tracing.graph import assemble
from regrow.tracing.interception import limit_calls
from regrow.tracing.meta_copy import fake_copy, leaves_in, map_tensors
from regrow.tracing.readings import trace_training
from regrow.tracing.rules import walk
from regrow.tracing.steps import find_step_difference, fit_steps, list_symbolic_steps
from regrow.tracing.trial import Resizing, freeze_axes, group_by_class, plan_deep_cuts, record_resized

# Why an axis is frozen that no operation freezes on the traced example.
REASON = "what the network does with it depends on the batch size or length of the input"

# Axes of fewer units (of heads, mostly) are no widths with which a network's code compares a length.
LEAST_WIDTH = 8

# The most operations on another example, as a multiple of those on the traced one.
MOST_TIMES_LONGER = 3


def freeze_by_size(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the graph with every axis frozen that cannot be cut on inputs of another batch size or length."""
    if axes.decisions is not None or not axes.steps or not axes.free():
        return axes
    for examples in (_larger_examples(axes), _smaller_examples(axes)):
        for example in examples:
            with suppress(TraceError):
                axes = _Probe(model, axes, _trace_at(model, axes, example)).freeze()
                break  # the first example that can be traced decides
    return axes


def _trace_at(model: nn.Module, axes: AxisGraph, example: Example, *others: AxisGraph) -> AxisGraph:
    """Return the axes on another example; TraceError if it runs many more operations (one per token) there.

    Where it runs the operations of ``axes`` or of one of ``others``, the axes are those of that graph.
    """
    copy, fake = fake_copy(model, example)
    with limit_calls(MOST_TIMES_LONGER * len(axes.recording.capture.graph.nodes)):
        recorded = capture(copy, fake, tracer=axes.tracer)
    for candidate in (axes, *others):
        if (fitted := fit_steps(candidate.steps, recorded, candidate.sizes())) is not None:
            return replace(candidate, steps=fitted, example=example)
    w = walk(recorded)
    if axes.trained:
        trace_training(copy, fake, w)
    graph, names = assemble(model, w, example)
    return replace(graph, steps=list_symbolic_steps(w, names))


@dataclass(frozen=True)
class _Probe:
    """A comparison of a traced network with the same network on an example of other sizes."""

    model: nn.Module
    axes: AxisGraph  # on the traced example
    other: AxisGraph  # on the example of other sizes

    def freeze(self) -> AxisGraph:
        """Return the traced graph with every axis frozen that cannot be cut on the other example."""
        axes = self.axes if self.is_as_traced else self._freeze_other_marks()
        free = [*axes.free()]
        if not free or not self.depends_on_size(free):
            return axes
        members = [axis for group in group_by_class(free).values() if self.depends_on_size(group) for axis in group]
        return _freeze_with_partners(axes, {axis.key: REASON for axis in members or free})

    @property
    def is_as_traced(self) -> bool:
        """Whether the network runs the operations that it runs on the traced example."""
        return self.other.axes is self.axes.axes

    def depends_on_size(self, cut: Sequence[Axis]) -> bool:
        """Whether a network with few units of the axes ``cut`` deviates from its plan otherwise than as traced."""
        sizes = plan_deep_cuts(self.axes, cut)
        problem = self._find_deviation(self.other, sizes)
        if not problem and (self.is_as_traced or self.enlarged_axes.axes is self.other.axes):
            return False
        return problem != self._find_deviation(self.enlarged_axes, sizes)

    @cached_property
    def enlarged_axes(self) -> AxisGraph:
        """The axes on the traced example with a batch, and lengths in which ``other`` differs, of 3 or more.

        They are those of ``axes`` or ``other`` themselves if these fit; as traced if the larger example fails.
        """
        example, main, other = self.axes.example, _main_shape(self.axes.example), _main_shape(self.other.example)
        lengths = [d for dims in _length_dims(self.axes) for d in dims if main[d] != other[d]]
        if main[0] < 3 or any(main[d] < 3 for d in lengths):
            example = _resize_example(example, main, max(main[0], 3), {d: max(main[d], 3) for d in lengths})
        with suppress(TraceError):
            return _trace_at(self.model, self.axes, example, self.other)
        return self.axes

    def _freeze_other_marks(self) -> AxisGraph:
        """Return the traced graph with every axis frozen to which the other example gives another mark."""
        marks = {frozenset(axis.slots): axis for axis in self.other}
        reasons = {}
        for axis in self.axes.free():
            match = marks.get(frozenset(axis.slots))
            if match is None or match.mark is not axis.mark:
                why = match.reason if match is not None and not match.free else REASON
                reasons[axis.key] = f"{why}, on an input of another size"
        return _freeze_with_partners(self.axes, reasons)

    def _find_deviation(self, graph: AxisGraph, sizes: Mapping[str, int]) -> str:
        """Return how a network cut to ``sizes`` deviates from its plan on the example of ``graph``; empty if not."""
        holders = {slot: axis.key for axis in self.axes for slot in axis.slots}
        planned = {axis.key: sizes.get(holders.get(axis.slots[0], ""), axis.size) for axis in graph}
        try:
            small = record_resized(self.model, replace(self.axes, example=graph.example), Resizing(sizes))
        except TraceError:
            return "it does not run at that size"
        deviation = find_step_difference(graph.steps, small, planned)
        return deviation.problem if deviation is not None else ""


def _freeze_with_partners(axes: AxisGraph, reasons: Mapping[str, str]) -> AxisGraph:
    """Return the graph with axes (key → reason) frozen, and with them those that must keep as many units."""
    counts = {axes[key].count: reason for key, reason in reasons.items() if axes[key].count}
    others = {axis.key: counts[axis.count] for axis in axes.free() if axis.count in counts}
    return freeze_axes(axes, {**others, **reasons})


def _larger_examples(axes: AxisGraph) -> Iterator[Example]:
    """Yield examples with a larger batch, larger lengths or both, in the order in which they tell most.

    Sizes above every width show where a network mistakes one for the other. Some networks take only multiples of the
    traced sizes, and some only one of the two larger.
    """
    main = _main_shape(axes.example)
    if not main:
        return
    widest = max(axis.size for axis in axes.free())
    multiples = [n * (widest // n + 1) for n in main]
    batch, lengths = widest + 1 + main[0], _length_dims(axes)
    tries = [(batch, {d: widest + 1 + main[d] for d in dims}) for dims in lengths]
    tries += [(batch, {d: multiples[d] for d in dims}) for dims in lengths]
    tries += [(batch, {d: 2 * main[d] for d in dims}) for dims in lengths]
    tries += [(multiples[0], {})]
    tries += [(main[0], {d: multiples[d] for d in dims}) for dims in lengths]
    yield from (_resize_example(axes.example, main, size, grown) for size, grown in tries)


def _smaller_examples(axes: AxisGraph) -> Iterator[Example]:
    """Yield smaller examples where the batch or a length of tokens is no smaller than a width."""
    main = _main_shape(axes.example)
    narrowest = min((axis.size for axis in axes.free() if axis.size >= LEAST_WIDTH), default=0)
    lengths = [dims for dims in _length_dims(axes) if len(main) < 4] if main else []
    if not main or not narrowest or max(main[0], *(main[d] for dims in lengths for d in dims), 0) < narrowest:
        return
    for dims in (*lengths, ()):
        yield _resize_example(axes.example, main, min(main[0], 3), {d: min(main[d], 4) for d in dims})


def _main_shape(example: Example) -> tuple[int, ...]:
    """Return the shape of an example's first tensor that is no scalar; empty if there is none, or it has no entries."""
    main = next((x for x in leaves_in(example) if isinstance(x, Tensor) and x.dim()), None)
    return tuple(main.shape) if main is not None and main.numel() else ()


def _length_dims(axes: AxisGraph) -> list[tuple[int, ...]]:
    """Return groups of dimensions of the first tensor that may be lengths: tokens, a sequence, or an image's sides."""
    main = next(x for x in leaves_in(axes.example) if isinstance(x, Tensor) and x.dim())
    if main.dim() == 2:
        return [] if main.is_floating_point() else [(1,)]
    if main.dim() == 3:
        return [(1,), (2,)]
    return [tuple(range(2, main.dim()))] if main.dim() > 3 else []


def _resize_example(example: Example, main: tuple[int, ...], batch: int, lengths: Mapping[int, int]) -> Example:
    """Return an example with another batch size and ``lengths`` (dimension → size) of the tensors of shape ``main``.

    Other tensors follow where they have equal sizes; entries become 0.
    """
    by_size = {main[d]: new for d, new in lengths.items()}

    def resize(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the new shape of a tensor."""
        result = []
        for i, n in enumerate(shape):
            if i == 0 and n == main[0]:
                result.append(batch)
            elif len(shape) == len(main):
                result.append(lengths[i] if i in lengths and n == main[i] else n)
            else:
                result.append(by_size.get(n, n) if i > 0 and n > 1 else n)
        return tuple(result)

    return map_tensors(example, lambda x: x.new_zeros(()).expand(resize(tuple(x.shape))))  # entries do not matter
