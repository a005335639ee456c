"""Trial cuts: run a resized copy of the network on fake data, and freeze the axes whose cut does not run as planned."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch
from torch import nn

from regrow.core.axes import Axis, AxisGraph, Mark, size_of
from regrow.core.plan import PlanError
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.capture import Capture, TraceError, capture, evaluating, in_training, quiet
from regrow.tracing.interception import Line, as_exporting, format_line, line_of, line_raised, parting_line
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


def freeze_failing(model: nn.Module, axes: AxisGraph, trained: Capture | None = None) -> AxisGraph:
    """Return the graph with every axis frozen whose trial cut does not run as planned.

    A few units of each free axis are cut, in all axes at once, on a copy without numbers, which is recorded again.
    Where that fails, axes are tried class by class: axes are of one class if their slots differ in layer numbers only.
    Axes of two units are tried separately: with one unit left, many networks run other operations.
    """
    full = {axis.key: f"it must keep {axis.least} units" for axis in axes.free() if axis.size <= axis.least}
    free = [axis for axis in axes.free() if axis.key not in full]
    small = [axis for axis in free if axis.size <= 2]
    large = [axis for axis in free if axis.size > 2]
    bad: dict[str, str] = {**full}
    for group in (small, large):
        if group and _problem(model, axes, trained, group):
            bad |= _one_by_one(model, axes, trained, group)
    left = [axis for axis in free if axis.key not in bad]
    if small and left and (problem := _problem(model, axes, trained, left)):
        bad |= {axis.key: problem for axis in left}  # each alone is sound, together they are not: rather none
    for problem in set(bad.values()) - set(full.values()):
        members = [axis for axis in free if bad.get(axis.key) == problem]
        bad |= dict.fromkeys((axis.key for axis in members), problem + _at(_cut_line(model, axes, members)))
    return axes.with_axes(
        {
            key: replace(axis, mark=Mark.FROZEN, reason=bad[key]) if key in bad else axis
            for key, axis in axes.axes.items()
        }
    )


def _one_by_one(model: nn.Module, axes: AxisGraph, trained: Capture | None, group: list[Axis]) -> dict[str, str]:
    """Return axis key → the problem, for the axes of the classes whose trial cut fails."""
    bad: dict[str, str] = {}
    families: dict[tuple, list[list[Axis]]] = {}
    for kind, members in classes_of(group).items():
        alike = tuple((name, dim, outer > 1, inner > 1) for name, dim, outer, _, inner, *_ in kind[1])
        families.setdefault(alike, []).append(members)
    for classes in families.values():
        bad |= _of_family(model, axes, trained, classes)
    left = [axis for axis in group if axis.key not in bad]
    if bad and left and (problem := _problem(model, axes, trained, left)):
        bad |= {axis.key: problem for axis in left}
    elif not bad:
        bad = {axis.key: "it survives alone, but not together with others" for axis in group}
    return bad


def _of_family(model: nn.Module, axes: AxisGraph, trained: Capture | None, classes: list[list[Axis]]) -> dict[str, str]:
    """Return axis key → the problem; equally named classes, one per stage of a network, mostly fail alike."""
    every = [axis for members in classes for axis in members]
    problem = _problem(model, axes, trained, every)
    if not problem or len(classes) == 1:
        return {axis.key: problem for axis in every if problem}
    first, *others = classes
    alone = _problem(model, axes, trained, first)
    if _unnumbered(alone) == _unnumbered(problem):
        return {axis.key: problem for axis in every}
    problems = [(first, alone), *((members, _problem(model, axes, trained, members)) for members in others)]
    bad = {axis.key: one for members, one in problems for axis in members if one}
    return bad or {axis.key: problem for axis in every}


def _unnumbered(problem: str) -> str:
    return re.sub(r"\d+", "#", problem)


def classes_of(axes: Iterable[Axis]) -> dict[tuple, list[Axis]]:
    """Return the axes by class, of which the slots differ in layer numbers only, with those of the same count."""
    classes: dict[tuple, list[Axis]] = {}
    for axis in axes:
        classes.setdefault(_kind(axis), []).append(axis)
    for kind, members in list(classes.items()):
        partners = {axis.count for axis in members if axis.count}
        if partners:
            known = {axis.key for axis in members}
            classes[kind] = members + [a for a in axes if a.count in partners and a.key not in known]
    return classes


def _kind(axis: Axis) -> tuple:
    slots = tuple(
        (re.sub(r"\d+", "#", s.name), s.dim, s.outer, s.stride, s.inner, s.offset, s.role) for s in axis.slots
    )
    return (axis.size, tuple(sorted(set(slots))))


def _problem(model: nn.Module, axes: AxisGraph, trained: Capture | None, cut: list[Axis]) -> str:
    """Return the problem of cutting a few units of each of the axes; empty if there is none.

    The first axis loses one unit, the next two, then three: if the network's code uses the size of one axis for
    another, they must not shrink alike.
    """
    sizes = cut_sizes(axes, cut)
    if any(size < 1 for size in sizes.values()):
        return "it cannot lose what an axis of the same count must lose with it"
    return trial_error(model, axes, sizes, trained)


def _cut_line(model: nn.Module, axes: AxisGraph, cut: list[Axis]) -> Line | None:
    """Return the line of the network's code that makes a trial cut fail, if one is there."""
    to = Resizing(cut_sizes(axes, cut))
    try:
        deviation = difference(axes.steps, record_resized(model, axes, to), to.sizes)
    except (TraceError, RuntimeError):
        return None
    return None if deviation is None else _line(model, axes, to, deviation)


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


def trial_error(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], trained: Capture | None = None) -> str:
    """Return the problem of running the network at other sizes, on a copy without numbers; empty if there is none.

    The copy is recorded as the network was when it was traced.
    """
    try:
        deviation = difference(axes.steps, record_resized(model, axes, Resizing(sizes)), sizes)
    except TraceError as error:
        return _refusal(error)
    return deviation.problem if deviation is not None else _untrained(model, axes, sizes, trained)


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
    both = [resize_copy(model, axes, Resizing(sizes)) for sizes in (axes.sizes(), to.sizes)]
    given = [fake_example(cast_example(axes.example, model), mode) for _, mode in both]
    (one, _), (other, _) = both
    kept = (preserve_state(one, outside=True), preserve_state(other, outside=True))
    with evaluating(one), evaluating(other), as_exporting(), quiet(), kept[0], kept[1]:
        parting = parting_line(one, other, (given[0], given[1]))
    if parting is not None:
        return parting
    nodes = operations(record_resized(model, axes, to.plain, lines=True))
    return line_of(nodes[deviation.step]) if deviation.step < len(nodes) else None


def record_resized(model: nn.Module, axes: AxisGraph, to: Resizing, lines: bool = False) -> Capture:
    """Record the network at other sizes, on a copy without numbers, as it was recorded when it was traced."""
    copy, mode = resize_copy(model, axes, to)
    example = fake_example(cast_example(axes.example, model), mode)
    return capture(copy, example, axes.decisions, tracer=axes.tracer, lines=lines)


def _untrained(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], present: Capture | None = None) -> str:
    """Return the problem of training the network at other sizes; empty if there is none, or training was not traced."""
    if not axes.trained:
        return ""
    try:
        present = present or _recorded_in_training(model, axes, axes.sizes())
        planned = _recorded_in_training(model, axes, sizes)
    except TraceError as error:
        return _refusal(error)
    deviation = first_difference(present, planned)
    return f"in training, {deviation.problem}" if deviation is not None else ""


def _recorded_in_training(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]) -> Capture:
    copy, mode = resize_copy(model, axes, Resizing(sizes))
    return in_training(copy, fake_example(cast_example(axes.example, model), mode))


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
        own: dict[str, Any] = copy.get_submodule(path)._parameters
        own[leaf] = None if bias in to.removed else without_numbers(mode, (to.added[bias],), own["weight"])
    return copy, mode


def planned_integers(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return ``module:attribute`` → the integer it must hold at the given axis sizes."""
    return {place: size_of(dim, sizes) for place, dim in axes.integers.items()}
