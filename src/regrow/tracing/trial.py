"""Trial cuts: run a resized copy of the network on fake data, and freeze the axes whose cut does not run as planned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import torch
from torch import nn

from regrow.core.axes import Axis, AxisGraph, Example, size_of
from regrow.core.plan import PlanError
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.capture import Capture, TraceError, capture, evaluating, in_training, quiet
from regrow.tracing.interception import Line, as_exporting, format_line, line_of, line_raised, parting_line
from regrow.tracing.kinds import freeze_axes
from regrow.tracing.meta_copy import cast_example, fake_example, meta_copy, without_numbers
from regrow.tracing.model_state import preserve_state
from regrow.tracing.steps import FIRST_RUN, Difference, difference, first_difference, operations, refold_steps


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


def cut_sizes(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return the sizes of a trial in which some axes lose a few units."""
    sizes = axes.sizes()
    turns: dict[str, int] = {}
    for axis in cut:
        members = [other for other in axes if other.count == axis.count] if axis.count else [axis]
        many = 1 + turns.setdefault(axis.count or axis.key, len(turns)) % 3
        if any(other.size - many * _step(other, axes) < max(other.least, 1) for other in members):
            many = 1
        sizes[axis.key] = axis.size - many * _step(axis, axes)
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
    left = [axis for axis in free if axis.key not in bad]
    if small and left and (problem := trials.problem(left)):
        bad |= {axis.key: problem for axis in left}  # each alone is sound, together they are not: rather none
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
        sizes = cut_sizes(self.axes, cut)
        if any(size < 1 for size in sizes.values()):
            return "it cannot lose what an axis of the same count must lose with it"
        try:
            deviation = difference(self.axes.steps, record_resized(self.model, self.axes, Resizing(sizes)), sizes)
        except TraceError as error:
            return _refusal(error)
        return deviation.problem if deviation is not None else _untrained(self.model, self.axes, sizes, self.trained)

    def one_by_one(self, group: Sequence[Axis]) -> dict[str, str]:
        """Return axis key → the problem, for the axes of the classes whose trial cut fails."""
        bad: dict[str, str] = {}
        families: dict[tuple, list[list[Axis]]] = {}
        for kind, members in classes_of(group).items():
            alike = tuple((name, dim, outer > 1, inner > 1) for name, dim, outer, _, inner, *_ in kind[1])
            families.setdefault(alike, []).append(members)
        for classes in families.values():
            bad |= self.of_family(classes)
        left = [axis for axis in group if axis.key not in bad]
        if bad and left and (problem := self.problem(left)):
            bad |= {axis.key: problem for axis in left}
        return bad or {axis.key: "it survives alone, but not together with others" for axis in group}

    def of_family(self, classes: Sequence[Sequence[Axis]]) -> dict[str, str]:
        """Return axis key → the problem; equally named classes, one per stage of a network, mostly fail alike."""
        every = [axis for members in classes for axis in members]
        problem = self.problem(every)
        if not problem or len(classes) == 1:
            return {axis.key: problem for axis in every if problem}
        alone = self.problem(classes[0])
        if re.sub(r"\d+", "#", alone) == re.sub(r"\d+", "#", problem):
            return {axis.key: problem for axis in every}
        problems = [(classes[0], alone), *((members, self.problem(members)) for members in classes[1:])]
        bad = {axis.key: reason for members, reason in problems for axis in members if reason}
        return bad or {axis.key: problem for axis in every}

    def line(self, cut: Sequence[Axis]) -> Line | None:
        """Return the line of the network's code that makes a trial cut fail, if one is there."""
        to = Resizing(cut_sizes(self.axes, cut))
        try:
            deviation = difference(self.axes.steps, record_resized(self.model, self.axes, to), to.sizes)
        except (TraceError, RuntimeError):
            return None
        return None if deviation is None else _line(self.model, self.axes, to, deviation)


def classes_of(axes: Sequence[Axis]) -> dict[tuple, list[Axis]]:
    """Return the axes by class, of which the slots differ in layer numbers only, with those of the same count."""
    classes: dict[tuple, list[Axis]] = {}
    for axis in axes:
        slots = {(re.sub(r"\d+", "#", s.name), s.dim, s.outer, s.stride, s.inner, s.offset, s.role) for s in axis.slots}
        classes.setdefault((axis.size, tuple(sorted(slots))), []).append(axis)
    for members in classes.values():
        partners, known = {axis.count for axis in members if axis.count}, {axis.key for axis in members}
        members += [axis for axis in axes if axis.count in partners and axis.key not in known]
    return classes


@dataclass(frozen=True)
class Resizing:
    """The sizes, constants and biases that a plan leads to, without the values of tensors.

    Args:
        sizes: Axis key → its number of units.
        constants: ``module:attribute`` → the number that folds set.
        added: Name of a bias that is added → its size.
        removed: Names of biases that are removed.
    """

    sizes: Mapping[str, int]
    constants: Mapping[str, float | None] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    @property
    def plain(self) -> "Resizing":
        """The sizes alone, as a :class:`Resizing`."""
        return Resizing(self.sizes)


@dataclass(frozen=True)
class Rehearsal:
    """The recordings that a rehearsal made.

    Args:
        planned: The recording of the planned network.
        present: That of the present network, where a constant is another than when it was traced; else ``None``.
    """

    planned: Capture
    present: Capture | None = None


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
    present = None
    deviation = difference(refold_steps(axes, to.constants), planned, to.sizes, to.added)
    if deviation is not None and deviation.constant:  # constants differ between precisions too
        bare = planned if to == to.plain else record_resized(model, axes, to.plain)
        present = record_resized(model, axes, Resizing(axes.sizes()))
        deviation = first_difference(present, bare, axes.steps)
    if deviation is not None and deviation.problem == FIRST_RUN:
        raise PlanError(f"the plan cannot be carried out: {FIRST_RUN} on the example input")
    if deviation is not None:
        raise PlanError(_cannot(deviation.problem, _line(model, axes, to, deviation)))
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
    (present, given), (planned, resized) = (_resized(model, axes, Resizing(n)) for n in (axes.sizes(), to.sizes))
    states = preserve_state(present, outside=True), preserve_state(planned, outside=True)
    with evaluating(present), evaluating(planned), as_exporting(), quiet(), states[0], states[1]:
        parting = parting_line(present, planned, (given, resized))
    if parting is not None:
        return parting
    nodes = operations(record_resized(model, axes, to.plain, lines=True))
    return line_of(nodes[deviation.step]) if deviation.step < len(nodes) else None


def _resized(model: nn.Module, axes: AxisGraph, to: Resizing) -> tuple[nn.Module, Example]:
    copy, mode = resize_copy(model, axes, to)
    return copy, fake_example(cast_example(axes.example, model), mode)


def record_resized(model: nn.Module, axes: AxisGraph, to: Resizing, lines: bool = False) -> Capture:
    """Record the network at other sizes, on a copy without numbers, as it was recorded when it was traced."""
    return capture(*_resized(model, axes, to), axes.decisions, tracer=axes.tracer, lines=lines)


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


def resize_copy(model: nn.Module, axes: AxisGraph, to: Resizing) -> tuple[nn.Module, torch._subclasses.FakeTensorMode]:
    """Return a copy without numbers at the planned sizes, with integers, constants and biases, and its fake mode."""
    shapes = {name: tuple(size_of(dim, to.sizes) for dim in dims) for name, dims in axes.shapes.items()}
    copy, mode = meta_copy(model, shapes)
    for place, value in {**planned_integers(axes, to.sizes), **to.constants}.items():
        path, name = place.split(":")
        module = copy.get_submodule(path)
        old = get_attribute(module, name)
        set_attribute(module, name, (value, *old[1:]) if isinstance(old, tuple) else value)
    for bias in (*to.added, *to.removed):
        path, _, leaf = bias.rpartition(".")
        parameters: dict[str, Any] = copy.get_submodule(path)._parameters
        added = bias in to.added
        parameters[leaf] = without_numbers(mode, (to.added[bias],), parameters["weight"]) if added else None
    return copy, mode


def planned_integers(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return ``module:attribute`` → the integer it must hold at the given axis sizes."""
    return {place: size_of(dim, sizes) for place, dim in axes.integers.items()}
