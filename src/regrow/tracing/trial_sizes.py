"""The sizes of trial cuts: a few units fewer, or as few as may be left."""

from collections.abc import Sequence
from math import lcm

from regrow.core.axes import Axis, AxisGraph


def deep_cuts(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return the sizes of a trial in which some axes keep as few units as they may, two or more.

    Args:
        axes: The network's axes.
        cut: The axes that lose units.
    """
    sizes = axes.sizes()
    groups: dict[str, list[Axis]] = {}
    for axis in cut:
        groups.setdefault(axis.count or axis.key, []).append(axis)
    for members in groups.values():
        steps = min((axis.size - max(axis.least, 2)) // _step(axis, axes) for axis in members)
        sizes |= {axis.key: axis.size - max(steps, 0) * _step(axis, axes) for axis in members}
    return sizes


def cut_sizes(axes: AxisGraph, cut: Sequence[Axis]) -> dict[str, int]:
    """Return the sizes of a trial in which some axes lose a few units.

    Args:
        axes: The network's axes.
        cut: The axes that lose units.
    """
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
