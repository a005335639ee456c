"""The trial cut: a shape check cannot prove a cut, running the cut network again can."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import lcm

import torch
from torch import nn
from torch.fx import Node

from regrow.axes import Axis, AxisGraph, Dim, Mark, size_of
from regrow.tracing.capture import Capture, TraceError, capture, faked, hollow, module_of, shape_of
from regrow.tracing.graph import Names
from regrow.tracing.walk import Walk, op_name


def proved(model: nn.Module, axes: AxisGraph, w: Walk, names: Names) -> AxisGraph:
    """The graph with every axis frozen whose cut the network does not survive as planned.

    One unit of each free axis is cut, in all axes at once, on a copy without numbers, and the copy is recorded again.
    Where that fails, axes are tried class by class: axes are of one class if their slots differ in layer numbers only.
    """
    free = [axis for axis in axes if axis.free]
    problem = _problem(model, axes, w, names, free)
    if not problem:
        return axes
    verdicts: dict[tuple, str] = {}
    for kind, members in _classes(free).items():
        verdicts[kind] = _problem(model, axes, w, names, members)
    bad = {axis.key: verdicts[_kind(axis)] for axis in free if verdicts[_kind(axis)]}
    if not bad:  # each alone is sound, together they are not: keep none rather than a wrong one
        bad = {axis.key: problem for axis in free}
    return axes.with_axes(
        {
            key: replace(axis, mark=Mark.FROZEN, reason=bad[key]) if key in bad else axis
            for key, axis in axes.axes.items()
        }
    )


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


def _problem(model: nn.Module, axes: AxisGraph, w: Walk, names: Names, cut: list[Axis]) -> str:
    """What goes wrong when one unit of each of the axes is cut; empty if nothing does."""
    sizes = axes.sizes() | {axis.key: axis.size - _step(axis, axes) for axis in cut}
    if any(size < 1 for size in sizes.values()):
        return "it cannot lose what an axis of the same count must lose with it"
    try:
        copy, mode = resized(model, axes, sizes)
        again = capture(copy, faked(axes.example, mode))
    except TraceError as error:
        cause = error.__cause__ or error
        line = next((line for line in str(cause).strip().splitlines() if line.strip()), type(cause).__name__)
        return f"the network does not run with a unit less: {line.strip()[:200]}"
    return _difference(w.capture, again, w, names, sizes)


def _step(axis: Axis, axes: AxisGraph) -> int:
    """How many units go at least: 1, or so many that the axes of the same count lose equally much."""
    if not axis.count:
        return 1
    return lcm(*(other.times for other in axes if other.count == axis.count)) // axis.times


def resized(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]
) -> tuple[nn.Module, torch._subclasses.FakeTensorMode]:
    """A copy without numbers whose axes have other sizes: tensors and the integers that restate them."""
    shapes = {name: tuple(size_of(dim, sizes) for dim in dims) for name, dims in axes.shapes.items()}
    copy, mode = hollow(model, shapes)
    for place, value in planned_integers(axes, sizes).items():
        path, name = place.split(":")
        module = copy.get_submodule(path)
        old = getattr(module, name)
        setattr(module, name, (value, *old[1:]) if isinstance(old, tuple) else value)
    return copy, mode


def planned_integers(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """``module:attribute`` → what it must hold once the axes have the given sizes."""
    return {place: size_of(dim, sizes) for place, dim in axes.integers.items()}


def _difference(before: Capture, after: Capture, w: Walk, names: Names, sizes: Mapping[str, int]) -> str:
    old, new = list(before.graph.nodes), list(after.graph.nodes)
    if [op_name(n) if n.op == "call_function" else n.op for n in old] != [
        op_name(n) if n.op == "call_function" else n.op for n in new
    ]:
        return "the network runs other operations with a unit less"
    for a, b in zip(old, new, strict=True):
        if a.op != "call_function" or w.dims.get(a) is None:
            continue
        planned, found = _planned(w.dims[a], names, sizes), shape_of(b)
        if found is not None and planned != found:
            return f"{op_name(a)} in {module_of(a) or 'the model'} has shape {found} with a unit less, not {planned}"
        if _numbers(a) != _numbers(b):
            return (
                f"a number in {op_name(a)} in {module_of(a) or 'the model'} is computed from the size: "
                f"{_numbers(a)} becomes {_numbers(b)}"
            )
    return ""


def _planned(dims: object, names: Names, sizes: Mapping[str, int]) -> object:
    def shape(one: tuple) -> tuple[int, ...]:
        written: tuple[Dim, ...] = names.dims(one)
        return tuple(size_of(dim, sizes) for dim in written)

    if isinstance(dims, list):
        return [None if one is None else shape(one) for one in dims]
    assert isinstance(dims, tuple)
    return shape(dims)


def _numbers(node: Node) -> list[float]:
    """The numbers of a call that are not sizes: all floats, and integers where the operation works entry by entry."""
    entrywise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    values = [*node.args, *node.kwargs.values()]
    return [v for v in values if isinstance(v, float) or (entrywise and isinstance(v, int) and not isinstance(v, bool))]
