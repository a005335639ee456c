"""The trial cut: a shape check cannot prove a cut, running the cut network again can."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import lcm

import torch
from torch import nn

from regrow.axes import Axis, AxisGraph, Mark, size_of
from regrow.tracing.attributes import held, hold
from regrow.tracing.capture import TraceError, capture, in_training
from regrow.tracing.hollow import faked, fitting, hollow
from regrow.tracing.steps import difference


def proved(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """The graph with every axis frozen whose cut the network does not survive as planned.

    A few units of each free axis are cut, in all axes at once, on a copy without numbers, which is recorded again.
    Where that fails, axes are tried class by class: axes are of one class if their slots differ in layer numbers only.
    Axes of two units are tried apart from the start: with one unit left, many networks do something else.
    """
    full = {axis.key: f"it must keep {axis.least} units" for axis in axes.free() if axis.size <= axis.least}
    free = [axis for axis in axes.free() if axis.key not in full]
    small = [axis for axis in free if axis.size <= 2]
    large = [axis for axis in free if axis.size > 2]
    bad: dict[str, str] = full
    for group in (small, large):
        if group and _problem(model, axes, group):
            bad |= _one_by_one(model, axes, group)
    left = [axis for axis in free if axis.key not in bad]
    if small and left and (problem := _problem(model, axes, left)):
        bad |= {axis.key: problem for axis in left}  # each alone is sound, together they are not: rather none
    return axes.with_axes(
        {
            key: replace(axis, mark=Mark.FROZEN, reason=bad[key]) if key in bad else axis
            for key, axis in axes.axes.items()
        }
    )


def _one_by_one(model: nn.Module, axes: AxisGraph, group: list[Axis]) -> dict[str, str]:
    """Key → what goes wrong, for the axes of the classes that do not survive."""
    bad: dict[str, str] = {}
    families: dict[tuple, list[list[Axis]]] = {}
    for kind, members in _classes(group).items():
        alike = tuple((name, dim, outer > 1, inner > 1) for name, dim, outer, _, inner, *_ in kind[1])
        families.setdefault(alike, []).append(members)
    for classes in families.values():
        bad |= _of_family(model, axes, classes)
    left = [axis for axis in group if axis.key not in bad]
    if bad and left and (problem := _problem(model, axes, left)):
        bad |= {axis.key: problem for axis in left}
    elif not bad:
        bad = {axis.key: "it survives alone, but not together with others" for axis in group}
    return bad


def _of_family(model: nn.Module, axes: AxisGraph, classes: list[list[Axis]]) -> dict[str, str]:
    """Key → what goes wrong. Classes of one name, as a network has in each of its stages, mostly fail alike."""
    every = [axis for members in classes for axis in members]
    problem = _problem(model, axes, every)
    if not problem or len(classes) == 1:
        return {axis.key: problem for axis in every if problem}
    first, *others = classes
    alone = _problem(model, axes, first)
    if _unnumbered(alone) == _unnumbered(problem):
        return {axis.key: problem for axis in every}
    found = [(first, alone), *((members, _problem(model, axes, members)) for members in others)]
    bad = {axis.key: one for members, one in found for axis in members if one}
    return bad or {axis.key: problem for axis in every}


def _unnumbered(problem: str) -> str:
    return re.sub(r"\d+", "#", problem)


def _classes(axes: Iterable[Axis]) -> dict[tuple, list[Axis]]:
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


def _problem(model: nn.Module, axes: AxisGraph, cut: list[Axis]) -> str:
    """What goes wrong when a few units of each of the axes are cut; empty if nothing does.

    One axis loses one unit, the next one two, then three: where the network's code takes the size of one axis for that
    of another, they must not shrink alike.
    """
    sizes = axes.sizes()
    turns: dict[str, int] = {}
    for axis in cut:
        members = [other for other in axes if other.count == axis.count] if axis.count else [axis]
        many = 1 + turns.setdefault(axis.count or axis.key, len(turns)) % 3
        if any(other.size - many * _step(other, axes) < max(other.least, 1) for other in members):
            many = 1
        sizes[axis.key] = axis.size - many * _step(axis, axes)
    if any(size < 1 for size in sizes.values()):
        return "it cannot lose what an axis of the same count must lose with it"
    return rehearsed(model, axes, sizes, numbers=True)


def rehearsed(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], numbers: bool = False) -> str:
    """What goes wrong when the network is given other sizes, on a copy without numbers; empty if nothing does.

    The copy is recorded as the network was when it was traced.
    """
    return _repeated(model, axes, sizes, numbers) or (_trained(model, axes, sizes) if axes.trained else "")


def _repeated(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], numbers: bool) -> str:
    try:
        copy, mode = resized(model, axes, sizes)
        again = capture(copy, faked(fitting(axes.example, model), mode), axes.decisions, exported=axes.exported)
    except TraceError as error:
        return _refusal(error)
    return difference(axes, again, sizes, numbers)


def _trained(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]) -> str:
    try:
        copy, mode = resized(model, axes, sizes)
        in_training(copy, faked(fitting(axes.example, model), mode))
    except TraceError as error:
        return _refusal(error)
    return ""


def _refusal(error: TraceError) -> str:
    cause = error.__cause__ or error
    line = next((line for line in str(cause).strip().splitlines() if line.strip()), type(cause).__name__)
    return f"the network does not run at that size: {line.strip()[:200]}"


def _step(axis: Axis, axes: AxisGraph) -> int:
    """How many units go at least: 1, or so many that sizes stay multiples and axes of one count lose equally much."""
    if not axis.count:
        return axis.multiple
    return lcm(*(other.times * other.multiple for other in axes if other.count == axis.count)) // axis.times


def resized(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]
) -> tuple[nn.Module, torch._subclasses.FakeTensorMode]:
    """A copy without numbers whose axes have other sizes: tensors and the integers that restate them."""
    shapes = {name: tuple(size_of(dim, sizes) for dim in dims) for name, dims in axes.shapes.items()}
    copy, mode = hollow(model, shapes)
    for place, value in planned_integers(axes, sizes).items():
        path, name = place.split(":")
        module = copy.get_submodule(path)
        old = held(module, name)
        hold(module, name, (value, *old[1:]) if isinstance(old, tuple) else value)
    return copy, mode


def planned_integers(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """``module:attribute`` → what it must hold once the axes have the given sizes."""
    return {place: size_of(dim, sizes) for place, dim in axes.integers.items()}
