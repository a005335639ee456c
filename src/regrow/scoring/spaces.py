"""Ranking spaces: which units are ranked against each other."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.core.axes import Axis

Row = dict[str, str | int | float]
"""A row of a table in a report: column → value."""

FEW = 16
"""Axes with fewer units than this are ranked together with others of their kind: three ranks say little."""
OUTER_BLOCKS = (0.125, 0.0625)
"""The fractions of the blocks, at the beginning and at the end, that several methods leave unpruned by default."""


@dataclass(frozen=True)
class Space:
    """A ranking space: units ranked against each other, of one axis or of several small axes of one kind.

    Args:
        label: The kind of units (``Axis.label``).
        keys: The axes, in the order of the network.
        sizes: How many units each has.
    """

    label: str
    keys: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def pooled(self) -> bool:
        """Whether it consists of axes that are too small to be ranked by themselves."""
        return len(self.keys) > 1 or self.sizes[0] < FEW

    def gather(self, values: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the values of all its units, one axis after the other, along the last dimension.

        Args:
            values: Axis key → ``[..., size]``.
        """
        return torch.cat([values[key] for key in self.keys], dim=-1)

    def scatter(self, values: Tensor) -> dict[str, Tensor]:
        """Split values of all its units into one tensor per axis: the inverse of :meth:`gather`.

        Args:
            values: ``[..., n]`` for the n units of the space.
        """
        return dict(zip(self.keys, values.split(self.sizes, dim=-1), strict=True))


def spaces(axes: Iterable[Axis], *, parts: int = 1) -> tuple[Space, ...]:
    """Return the ranking spaces: one per large axis; small axes of one kind are pooled.

    Axes of fewer than :data:`FEW` units are pooled by kind, in ``parts`` consecutive ranges of the depth.

    Args:
        axes: The axes, in the order of the network.
        parts: Into how many consecutive parts the pooled axes of one kind are divided.

    >>> from regrow.core.axes import Axis
    >>> [space.keys for space in spaces([Axis("a", 20, ()), Axis("b", 3, ()), Axis("c", 3, ())])]
    [('a',), ('b', 'c')]
    """
    result: list[Space] = []
    small: dict[str, list[Axis]] = {}
    for axis in axes:
        if axis.size < FEW:
            small.setdefault(axis.label, []).append(axis)
        else:
            result.append(Space(axis.label, (axis.key,), (axis.size,)))
    for label, pooled in small.items():
        for part in range(parts):
            some = [axis for i, axis in enumerate(pooled) if i * parts // len(pooled) == part]
            if some:
                result.append(Space(label, tuple(a.key for a in some), tuple(a.size for a in some)))
    return tuple(result)


def inner(units: Sequence[Axis], first: float, last: float) -> list[Axis]:
    """Return the axes that lie neither in the first nor in the last blocks of the network.

    A block is the first number in a tensor's dotted name.

    Args:
        units: Axes; those that lie in no block are always returned.
        first: The fraction of the blocks at the beginning that is left out.
        last: The fraction of the blocks at the end that is left out.

    >>> from regrow.core.axes import Axis
    >>> [axis.key for axis in inner([Axis(key, 4, ()) for key in ("h.0.w", "h.1.w", "h.2.w", "head")], 0.4, 0.0)]
    ['h.1.w', 'h.2.w', 'head']
    """
    result = {axis.key: re.search(r"(?:^|\.)(\d+)\.", axis.key) for axis in units}
    blocks = sorted({int(match[1]) for match in result.values() if match})
    chosen = set(blocks[round(first * len(blocks)) : len(blocks) - round(last * len(blocks))])
    return [axis for axis in units if not (match := result[axis.key]) or int(match[1]) in chosen]


def within(values: Mapping[str, Tensor], among: Sequence[Space], each: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply a function (a ranking, a standardisation) to all units of each ranking space together.

    Args:
        values: Axis key → ``[..., size]``.
        among: The ranking spaces.
        each: The function, ``[..., n]`` → ``[..., n]``.
    """
    return {key: part for space in among for key, part in space.scatter(each(space.gather(values))).items()}
