"""Trial cuts: run a resized copy of the network on fake data, and freeze the axes whose cut does not run as planned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.core.axes import Axis, AxisGraph, Example, Mark, size_of
from regrow.core.errors import first_line
from regrow.core.plan import PlanError
from regrow.tracing.attributes import get_attribute, set_attribute
from regrow.tracing.capture import Capture, TraceError, capture, capture_in_training
from regrow.tracing.interception import describe_raising
from regrow.tracing.meta_copy import cast_example, fake_example, fake_like, meta_copy
from regrow.tracing.steps import FIRST_RUN, find_changed_constant, find_step_difference, with_new_epsilons


@dataclass(frozen=True)
class Resizing:
    """The sizes, constants and biases that a plan leads to, without the values of tensors."""

    sizes: Mapping[str, int]  # axis key → its number of units
    constants: Mapping[str, float] = field(default_factory=dict)  # module:attribute → the epsilon that a fold sets
    added: Mapping[str, int] = field(default_factory=dict)  # name of a bias that is added → its size


@dataclass(frozen=True)
class Rehearsal:
    """The recordings that :func:`rehearse` makes."""

    planned: Capture  # of the network at the planned sizes
    present: Capture | None = None  # of the present network, where a constant is another than when it was traced


def plan_deep_cuts(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return axis key → size in a trial where the axes in ``cut`` keep as few units as they may, two or more."""
    sizes = axes.sizes()
    groups: dict[str, list[Axis]] = {}
    for axis in cut:
        groups.setdefault(axis.count or axis.key, []).append(axis)
    for members in groups.values():
        steps = min((axis.size - max(axis.least, 2)) // _least_loss(axis, axes) for axis in members)
        sizes |= {axis.key: axis.size - max(steps, 0) * _least_loss(axis, axes) for axis in members}
    return sizes


def plan_small_cuts(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return axis key → size in a trial where the axes in ``cut`` lose 1, 2 or 3 times the least they can, in turn."""
    sizes = axes.sizes()
    turns: dict[str, int] = {}
    for axis in cut:
        members = [other for other in axes if other.count == axis.count] if axis.count else [axis]
        steps = 1 + turns.setdefault(axis.count or axis.key, len(turns)) % 3  # 1, 2, 3, 1, … per group of equal counts
        if any(other.size - steps * _least_loss(other, axes) < max(other.least, 1) for other in members):
            steps = 1
        sizes[axis.key] = axis.size - steps * _least_loss(axis, axes)
    return sizes


def _least_loss(axis: Axis, axes: AxisGraph) -> int:
    """Return the smallest number of units that an axis can lose so that its size and those of its group stay valid."""
    if not axis.count:
        return axis.multiple
    return lcm(*(other.times * other.multiple for other in axes if other.count == axis.count)) // axis.times


def freeze_failing(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the graph with every axis frozen whose trial cut does not run as planned.

    A few units of each free axis are cut, in all axes at once, on a copy without numbers, which is recorded again.
    Where that fails, half of the axes are tried, and so on, down to classes, whose slots differ in layer numbers only.
    Axes of two units are tried separately: with one unit left, many networks run other operations.
    """
    minimal = {axis.key: f"it must keep {axis.least} units" for axis in axes.free() if axis.size <= axis.least}
    free = [axis for axis in axes.free() if axis.key not in minimal]
    narrow = [axis for axis in free if axis.size <= 2]
    reasons: dict[str, str] = {}
    for group in (narrow, [axis for axis in free if axis.size > 2]):
        if failing := _find_failing(model, axes, [*group_by_class(group).values()]):
            reasons |= failing | _try_cuts(model, axes, [axis for axis in group if axis.key not in failing])
    if narrow:
        reasons |= _try_cuts(model, axes, [axis for axis in free if axis.key not in reasons])
    return freeze_axes(axes, minimal | reasons)


def freeze_axes(axes: AxisGraph, reasons: Mapping[str, str]) -> AxisGraph:
    """Return the graph with the axes in ``reasons`` (axis key → reason) frozen for these."""
    frozen = {key: replace(axes[key], mark=Mark.FROZEN, reason=reason) for key, reason in reasons.items()}
    return replace(axes, axes={**axes.axes, **frozen}) if frozen else axes


def _try_cuts(model: nn.Module, axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, str]:
    """Return axis key → the problem of cutting a few units of each of some axes; empty if there is none.

    The first axis loses one unit, the next two, then three: if the network's code uses the size of one axis for
    another, they must not shrink alike. The copy is recorded as the network was when it was traced.
    """
    if not cut:
        return {}
    sizes = plan_small_cuts(axes, cut)
    problem = "it cannot lose what an axis of the same count must lose with it"
    if all(size > 0 for size in sizes.values()):
        try:
            deviation = find_step_difference(axes.steps, record_resized(model, axes, Resizing(sizes)), sizes)
            problem = deviation.problem if deviation is not None else _try_training(model, axes, sizes)
        except TraceError as error:
            problem = _describe_refusal(error)
    return {axis.key: problem for axis in cut if problem}


def _find_failing(model: nn.Module, axes: AxisGraph, classes: Sequence[Sequence[Axis]]) -> dict[str, str]:
    """Return axis key → the problem, for the classes of axes whose trial cut fails; they are found by halving."""
    bad = _try_cuts(model, axes, [axis for members in classes for axis in members])
    if not bad or len(classes) == 1:
        return bad
    half = len(classes) // 2
    failing = _find_failing(model, axes, classes[:half]) | _find_failing(model, axes, classes[half:])
    return failing or bad  # each half may run where both together do not


def group_by_class(axes: Sequence[Axis]) -> dict[tuple, list[Axis]]:
    """Return class → axes whose slots differ in layer numbers only, with those that must keep as many units as they."""
    classes: dict[tuple, list[Axis]] = {}
    for axis in axes:
        slots = {(_without_numbers(s.name), s.dim, s.outer, s.stride, s.inner, s.offset, s.role) for s in axis.slots}
        classes.setdefault((axis.size, tuple(sorted(slots))), []).append(axis)
    for members in classes.values():
        partners, known = {axis.count for axis in members if axis.count}, {axis.key for axis in members}
        members += [axis for axis in axes if axis.count in partners and axis.key not in known]
    return classes


def _without_numbers(text: str) -> str:
    """Return a name with each number replaced by ``#``."""
    return re.sub(r"\d+", "#", text)


def rehearse(model: nn.Module, axes: AxisGraph, resizing: Resizing) -> Rehearsal:
    """Record the planned network on a fake copy, and raise PlanError unless it runs the operations that are planned.

    Every operation must have the planned shape and work on the same operands with the same constants: a network whose
    Python code reads a width may do anything else.
    """
    try:
        planned = record_resized(model, axes, resizing)
    except TraceError as error:
        raise PlanError(_describe_plan_problem(_describe_refusal(error))) from error
    present, bare = None, Resizing(resizing.sizes)
    steps = with_new_epsilons(axes, resizing.constants)
    deviation = find_step_difference(steps, planned, resizing.sizes, resizing.added)
    if deviation is not None and deviation.constant:  # constants differ between precisions too
        present = record_resized(model, axes, Resizing(axes.sizes()))
        planned_bare = planned if resizing == bare else record_resized(model, axes, bare)
        deviation = find_changed_constant(present, planned_bare, axes.steps)
    if deviation is not None and deviation.problem == FIRST_RUN:
        raise PlanError(f"the plan cannot be carried out: {FIRST_RUN} on the example input")
    if deviation is not None:
        raise PlanError(_describe_plan_problem(deviation.problem))
    if problem := _try_training(model, axes, resizing.sizes):
        raise PlanError(_describe_plan_problem(problem))
    return Rehearsal(planned, present)


def _describe_plan_problem(problem: str) -> str:
    """Return the message of a PlanError for a problem, with the remedy."""
    return f"the plan cannot be carried out: {problem}; plan other sizes, or write that code without the size"


def _resize(model: nn.Module, axes: AxisGraph, resizing: Resizing) -> tuple[nn.Module, Example]:
    """Return a resized copy on fake tensors, and the example of ``axes`` for it, in the model's precision."""
    copy, mode = resize_copy(model, axes, resizing)
    return copy, fake_example(cast_example(axes.example, model), mode)


def record_resized(model: nn.Module, axes: AxisGraph, resizing: Resizing) -> Capture:
    """Record the network at other sizes, on a fake copy, with the tracer and decisions of ``axes``; or TraceError."""
    copy, example = _resize(model, axes, resizing)
    return capture(copy, example, axes.decisions, tracer=axes.tracer)


def _try_training(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]) -> str:
    """Return the problem of training the network at other sizes; empty if there is none, or training was not traced."""
    if not axes.trained:
        return ""
    try:
        present = capture_in_training(*_resize(model, axes, Resizing(axes.sizes())))
        planned = capture_in_training(*_resize(model, axes, Resizing(sizes)))
    except TraceError as error:
        return _describe_refusal(error)
    deviation = find_changed_constant(present, planned)
    return f"in training, {deviation.problem}" if deviation is not None else ""


def _describe_refusal(error: TraceError) -> str:
    """Return the problem of a network that cannot be recorded at a size, with the line of its code."""
    cause = error.__cause__ or error
    return f"the network does not run at that size: {first_line(cause)}{describe_raising(cause)}"


def resize_copy(model: nn.Module, axes: AxisGraph, resizing: Resizing) -> tuple[nn.Module, FakeTensorMode]:
    """Return a fake copy with the planned shapes, attributes and added biases, and its fake mode."""
    shapes = {name: tuple(size_of(dim, resizing.sizes) for dim in dims) for name, dims in axes.shapes.items()}
    copy, mode = meta_copy(model, shapes)
    for attribute, value in {**planned_integers(axes, resizing.sizes), **resizing.constants}.items():
        path, name = attribute.split(":")
        module = copy.get_submodule(path)
        old = get_attribute(module, name)
        set_attribute(module, name, (value, *old[1:]) if isinstance(old, tuple) else value)
    for bias, size in resizing.added.items():
        path, _, leaf = bias.rpartition(".")
        parameters: dict[str, Any] = copy.get_submodule(path)._parameters
        parameters[leaf] = fake_like(mode, (size,), parameters["weight"])
    return copy, mode


def planned_integers(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return ``module:attribute`` → the integer it must hold at ``sizes`` (axis key → size)."""
    return {attribute: size_of(dim, sizes) for attribute, dim in axes.integers.items()}
