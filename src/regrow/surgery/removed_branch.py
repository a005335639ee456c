"""The axes of a network after a dropped branch is restored."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from regrow.axes import Axis, AxisGraph, axes_in
from regrow.branches import Branch

T = TypeVar("T")


def rejoin_axes(old: AxisGraph, branch: Branch, axes: AxisGraph) -> AxisGraph:
    """Return the network's axes with a branch restored; the axes inside it must not have changed since.

    The operations, work and branches of the result, and its order, must be taken from a new recording.

    Args:
        old: The network's axes before the branch was dropped.
        branch: The branch.
        axes: The network's axes without the branch.
    """

    def held(name: str) -> bool:
        return branch.holds(name.partition(":")[0])

    own = {axis.key for axis in old if any(held(slot.name) for slot in axis.slots)}
    lost = own - axes.axes.keys()

    def both(before: Iterable[T], now: Iterable[T], name: Any = str) -> tuple[T, ...]:
        return (*now, *(one for one in before if held(name(one))))

    def axis(key: str) -> Axis:
        if key not in old.axes:
            return axes[key]
        now = axes.axes.get(key) or replace(old[key], slots=())
        slots = both(old[key].slots, now.slots, lambda slot: slot.name)
        return replace(old[key], size=now.size, ids=now.ids, next_id=now.next_id, slots=slots)

    keys = [*(key for key in old.axes if key in own or key in axes.axes), *(axes.axes.keys() - old.axes.keys())]
    return replace(
        axes,
        axes={key: axis(key) for key in keys},
        shapes={**{name: dims for name, dims in old.shapes.items() if held(name)}, **axes.shapes},
        parameters=axes.parameters | frozenset(filter(held, old.parameters)),
        counted=both(old.counted, axes.counted),
        itemsize={**{name: size for name, size in old.itemsize.items() if held(name)}, **axes.itemsize},
        ties={**{name: first for name, first in old.ties.items() if held(name)}, **axes.ties},
        integers={
            **{at: dim for at, dim in old.integers.items() if held(at) or lost & {*axes_in(dim)}},
            **axes.integers,
        },
        folds=both(old.folds, axes.folds, lambda fold: fold.weight),
        unreached=both(old.unreached, axes.unreached),
    )
