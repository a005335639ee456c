"""How many units are added, and where: axes that are short of free weights, under a cap on the whole."""

from collections.abc import Iterable, Mapping
from math import ceil, prod

from regrow.axes import Axis, AxisGraph, Role, size_of


def growable_axes(axes: AxisGraph) -> tuple[Axis, ...]:
    """The axes inside blocks that can be widened: one weight makes their units. A residual stream has several."""
    return tuple(axis for axis in axes.units() if not axis.narrow and len(makers(axis, axes)) == 1)


def makers(axis: Axis, axes: AxisGraph) -> tuple[str, ...]:
    """The weights that make an axis's units."""
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
    """Axis key → how many units are added: ``share`` of its first size, rounded up to a multiple, while there is room.

    Args:
        axes: The network's axes.
        short: Those that are to grow, most urgent first.
        base: The first size of each axis.
        share: Of the first size.
        multiple: Numbers are multiples of this.
        cap: How many times its first parameters the network may have.

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
