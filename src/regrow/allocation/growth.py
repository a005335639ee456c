"""Decide how many units axes gain that run short of free weights, under a cap on the network's parameters."""

from collections.abc import Iterable, Mapping
from math import ceil, prod

from regrow.core.axes import Axis, AxisGraph, Role, size_of


def growable_axes(axes: AxisGraph) -> tuple[Axis, ...]:
    """Return the axes that can be widened by growth: those whose units a single weight produces.

    A residual stream is produced by several weights, and is left out.

    Args:
        axes: The network's axes.
    """
    return tuple(axis for axis in axes.units() if not axis.narrow and len(makers(axis, axes)) == 1)


def makers(axis: Axis, axes: AxisGraph) -> tuple[str, ...]:
    """Return the names of the weights that produce an axis's units.

    Args:
        axis: The axis.
        axes: The network's axes.
    """
    made = dict.fromkeys(slot.name for slot in axis.slots if slot.role is Role.PRODUCES)
    return tuple(name for name in made if name in axes.counted)


def growth(
    axes: AxisGraph,
    short: Iterable[Axis],
    base: Mapping[str, int],
    *,
    share: float,
    multiple: int,
    cap: float,
) -> dict[str, int]:
    """Return axis key → how many units it gains: ``share`` of its first size, rounded up, if the cap allows it.

    Args:
        axes: The network's axes.
        short: The axes that run short, most urgent first.
        base: The first size of each axis.
        share: The fraction of an axis's first size that is added.
        multiple: The number of added units is rounded up to a multiple of this.
        cap: The most parameters the network may have, as a multiple of those it had at first.

    Returns:
        The numbers; axes for which there is no room are left out.
    """
    sizes = axes.sizes()
    most = cap * _parameters(axes, {**sizes, **base})
    result: dict[str, int] = {}
    for axis in short:
        n = ceil(ceil(share * base[axis.key]) / multiple) * multiple
        if _parameters(axes, {**sizes, axis.key: axis.size + n}) <= most:
            sizes[axis.key] += n
            result[axis.key] = n
    return result


def _parameters(axes: AxisGraph, sizes: Mapping[str, int]) -> int:
    own = (name for name in axes.parameters if name not in axes.ties)
    return sum(prod(size_of(dim, sizes) for dim in axes.shapes[name]) for name in own)
