"""Trial cuts: run a resized copy of the network on fake data, and freeze the axes whose cut does not run as planned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.core.axes import Axis, AxisGraph, Example, size_of
from regrow.core.plan import PlanError
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.capture import Capture, TraceError, capture, evaluating, in_training, quiet
from regrow.tracing.interception import LINE, Line, as_exporting, format_line, line_raised, parting_line
from regrow.tracing.meta_copy import cast_example, fake_example, meta_copy, without_numbers
from regrow.tracing.model_state import preserve_state
from regrow.tracing.steps import FIRST_RUN, Difference, difference, first_difference, operations, refold_steps
from regrow.tracing.support import freeze_axes


@dataclass(frozen=True)
class Resizing:
    """The sizes, constants and biases that a plan leads to, without the values of tensors."""

    sizes: Mapping[str, int]  # axis key → its number of units
    constants: Mapping[str, float] = field(default_factory=dict)  # module:attribute → the number that folds set
    added: Mapping[str, int] = field(default_factory=dict)  # name of a bias that is added → its size


@dataclass(frozen=True)
class Rehearsal:
    """The recordings that a rehearsal made."""

    planned: Capture
    present: Capture | None = None  # of the present network, where a constant is another than when it was traced


def deep_cuts(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return the sizes of a trial in which some axes keep as few units as they may, two or more."""
    sizes = axes.sizes()
    groups: dict[str, list[Axis]] = {}
    for axis in cut:
        groups.setdefault(axis.count or axis.key, []).append(axis)
    for members in groups.values():
        steps = min((axis.size - max(axis.least, 2)) // _step(axis, axes) for axis in members)
        sizes |= {axis.key: axis.size - max(steps, 0) * _step(axis, axes) for axis in members}
    return sizes


def _small_cuts(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return the sizes of a trial in which some axes lose a few units."""
    sizes = axes.sizes()
    turns: dict[str, int] = {}
    for axis in cut:
        members = [other for other in axes if other.count == axis.count] if axis.count else [axis]
        steps = 1 + turns.setdefault(axis.count or axis.key, len(turns)) % 3
        if any(other.size - steps * _step(other, axes) < max(other.least, 1) for other in members):
            steps = 1
        sizes[axis.key] = axis.size - steps * _step(axis, axes)
    return sizes


def _step(axis: Axis, axes: AxisGraph) -> int:
    """Return how many units an axis loses at least, so that its size and those of its group stay valid."""
    if not axis.count:
        return axis.multiple
    return lcm(*(other.times * other.multiple for other in axes if other.count == axis.count)) // axis.times


def freeze_failing(model: nn.Module, axes: AxisGraph, trained: Capture | None) -> AxisGraph:
    """Return the graph with every axis frozen whose trial cut does not run as planned.

    A few units of each free axis are cut, in all axes at once, on a copy without numbers, which is recorded again.
    Where that fails, axes are tried class by class: axes are of one class if their slots differ in layer numbers only.
    Axes of two units are tried separately: with one unit left, many networks run other operations. ``trained`` is the
    network's recording in training mode, if there is one.
    """
    trials = _Trials(model, axes, trained)
    full = {axis.key: f"it must keep {axis.least} units" for axis in axes.free() if axis.size <= axis.least}
    free = [axis for axis in axes.free() if axis.key not in full]
    small = [axis for axis in free if axis.size <= 2]
    bad: dict[str, str] = {}
    for group in (small, [axis for axis in free if axis.size > 2]):
        if group and trials.problem(group):
            bad |= trials.one_by_one(group)
    if small:
        bad |= trials.together([axis for axis in free if axis.key not in bad])
    for problem in set(bad.values()):
        members = [axis for axis in free if bad.get(axis.key) == problem]
        bad |= dict.fromkeys((axis.key for axis in members), problem + _at(trials.line(members)))
    return freeze_axes(axes, full | bad)


@dataclass(frozen=True)
class _Trials:
    """Trial cuts of a network."""

    model: nn.Module
    axes: AxisGraph
    trained: Capture | None

    def problem(self, cut: Sequence[Axis]) -> str:
        """Return the problem of cutting a few units of each of some axes; empty if there is none.

        The first axis loses one unit, the next two, then three: if the network's code uses the size of one axis for
        another, they must not shrink alike. The copy is recorded as the network was when it was traced.
        """
        sizes = _small_cuts(self.axes, cut)
        if any(size < 1 for size in sizes.values()):
            return "it cannot lose what an axis of the same count must lose with it"
        try:
            deviation = difference(self.axes.steps, record_resized(self.model, self.axes, Resizing(sizes)), sizes)
        except TraceError as error:
            return _refusal(error)
        return deviation.problem if deviation is not None else _untrained(self.model, self.axes, sizes, self.trained)

    def together(self, group: Sequence[Axis]) -> dict[str, str]:
        """Return axis key → the problem, if axes cannot be cut together: as each alone is sound, rather none is."""
        problem = self.problem(group) if group else ""
        return {axis.key: problem for axis in group if problem}

    def one_by_one(self, group: Sequence[Axis]) -> dict[str, str]:
        """Return axis key → the problem, for the axes of the classes whose trial cut fails."""
        families: dict[tuple, list[list[Axis]]] = {}
        for (_, slots), members in classes_of(group).items():
            alike = tuple((name, dim, outer > 1, inner > 1) for name, dim, outer, _, inner, *_ in slots)
            families.setdefault(alike, []).append(members)
        bad: dict[str, str] = {}
        for classes in families.values():
            bad |= self.of_family(classes)
        if bad:
            bad |= self.together([axis for axis in group if axis.key not in bad])
        return bad or {axis.key: "it survives alone, but not together with others" for axis in group}

    def of_family(self, classes: Sequence[Sequence[Axis]]) -> dict[str, str]:
        """Return axis key → the problem; equally named classes, one per stage of a network, mostly fail alike."""
        every = [axis for members in classes for axis in members]
        bad = self.together(every)
        if not bad or len(classes) == 1:
            return bad
        alone = self.problem(classes[0])
        if _unnumbered(alone) == _unnumbered(bad[every[0].key]):
            return bad
        apart = {axis.key: alone for axis in classes[0] if alone}
        for members in classes[1:]:
            apart |= self.together(members)
        return apart or bad

    def line(self, cut: Sequence[Axis]) -> Line | None:
        """Return the line of the network's code that makes a trial cut fail, if one is there."""
        to = Resizing(_small_cuts(self.axes, cut))
        try:
            deviation = difference(self.axes.steps, record_resized(self.model, self.axes, to), to.sizes)
        except (TraceError, RuntimeError):
            return None
        return None if deviation is None else _line(self.model, self.axes, to, deviation)


def classes_of(axes: Sequence[Axis]) -> dict[tuple, list[Axis]]:
    """Return the axes by class, of which the slots differ in layer numbers only, with those of the same count."""
    classes: dict[tuple, list[Axis]] = {}
    for axis in axes:
        slots = {(_unnumbered(s.name), s.dim, s.outer, s.stride, s.inner, s.offset, s.role) for s in axis.slots}
        classes.setdefault((axis.size, tuple(sorted(slots))), []).append(axis)
    for members in classes.values():
        partners, known = {axis.count for axis in members if axis.count}, {axis.key for axis in members}
        members += [axis for axis in axes if axis.count in partners and axis.key not in known]
    return classes


def _unnumbered(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def rehearse(model: nn.Module, axes: AxisGraph, to: Resizing) -> Rehearsal:
    """Record the planned network on a copy without numbers, and raise unless it runs the operations that are planned.

    Every operation must have the planned shape and work on the same operands with the same constants: a network whose
    Python code reads a width may do anything else.
    """
    try:
        planned = record_resized(model, axes, to)
    except TraceError as error:
        line = line_raised(error.__cause__ or error)
        raise PlanError(_cannot(_refusal(error), line)) from error
    present, bare = None, Resizing(to.sizes)
    deviation = difference(refold_steps(axes, to.constants), planned, to.sizes, to.added)
    if deviation is not None and deviation.constant:  # constants differ between precisions too
        present = record_resized(model, axes, Resizing(axes.sizes()))
        deviation = first_difference(present, planned if to == bare else record_resized(model, axes, bare), axes.steps)
    if deviation is not None and deviation.problem == FIRST_RUN:
        raise PlanError(f"the plan cannot be carried out: {FIRST_RUN} on the example input")
    if deviation is not None:
        raise PlanError(_cannot(deviation.problem, _line(model, axes, bare, deviation)))
    if problem := _untrained(model, axes, to.sizes):
        raise PlanError(_cannot(problem, None))
    return Rehearsal(planned, present)


def _cannot(problem: str, line: Line | None) -> str:
    remedy = "write it without the size" if line else "plan other sizes"
    axes = "leave the axes that it reads out of the plan"
    return f"the plan cannot be carried out: {problem}{_at(line)}; {remedy}, or {axes}"


def _at(line: Line | None) -> str:
    return f"; it is the code at {format_line(line)}" if line else ""


def _line(model: nn.Module, axes: AxisGraph, to: Resizing, deviation: Difference) -> Line | None:
    """Return the line of the network's code that causes a difference: where runs diverge, or that of the operation."""
    present, planned = _resized(model, axes, Resizing(axes.sizes())), _resized(model, axes, to)
    states = preserve_state(present[0], outside=True), preserve_state(planned[0], outside=True)
    with evaluating(present[0]), evaluating(planned[0]), as_exporting(), quiet(), states[0], states[1]:
        parting = parting_line((present, planned))
    if parting is not None:
        return parting
    nodes = operations(record_resized(model, axes, to, lines=True))
    return nodes[deviation.step].meta.get(LINE) if deviation.step < len(nodes) else None


def _resized(model: nn.Module, axes: AxisGraph, to: Resizing) -> tuple[nn.Module, Example]:
    copy, mode = resize_copy(model, axes, to)
    return copy, fake_example(cast_example(axes.example, model), mode)


def record_resized(model: nn.Module, axes: AxisGraph, to: Resizing, lines: bool = False) -> Capture:
    """Record the network at other sizes, on a copy without numbers, as it was recorded when it was traced."""
    copy, example = _resized(model, axes, to)
    return capture(copy, example, axes.decisions, tracer=axes.tracer, lines=lines)


def _untrained(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], present: Capture | None = None) -> str:
    """Return the problem of training the network at other sizes; empty if there is none, or training was not traced."""
    if not axes.trained:
        return ""
    try:
        present = present or in_training(*_resized(model, axes, Resizing(axes.sizes())))
        planned = in_training(*_resized(model, axes, Resizing(sizes)))
    except TraceError as error:
        return _refusal(error)
    deviation = first_difference(present, planned)
    return f"in training, {deviation.problem}" if deviation is not None else ""


def _refusal(error: TraceError) -> str:
    cause = error.__cause__ or error
    line = next((line for line in str(cause).strip().splitlines() if line.strip()), type(cause).__name__)
    return f"the network does not run at that size: {line.strip()[:200]}"


def resize_copy(model: nn.Module, axes: AxisGraph, to: Resizing) -> tuple[nn.Module, FakeTensorMode]:
    """Return a copy without numbers at the planned sizes, with integers, constants and biases, and its fake mode."""
    shapes = {name: tuple(size_of(dim, to.sizes) for dim in dims) for name, dims in axes.shapes.items()}
    copy, mode = meta_copy(model, shapes)
    for attribute, value in {**planned_integers(axes, to.sizes), **to.constants}.items():
        path, name = attribute.split(":")
        module = copy.get_submodule(path)
        old = get_attribute(module, name)
        set_attribute(module, name, (value, *old[1:]) if isinstance(old, tuple) else value)
    for bias, size in to.added.items():
        path, _, leaf = bias.rpartition(".")
        parameters: dict[str, Any] = copy.get_submodule(path)._parameters
        parameters[leaf] = without_numbers(mode, (size,), parameters["weight"])
    return copy, mode


def planned_integers(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return ``module:attribute`` → the integer it must hold at the given axis sizes."""
    return {attribute: size_of(dim, sizes) for attribute, dim in axes.integers.items()}
