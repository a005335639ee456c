"""Symbolic tensor dimensions: fixed sizes, axis keys, and products and concatenations of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Product:
    """A flattened dimension: the product of dimensions, outermost first, such as ``heads × head_dim``.

    Args:
        parts: The factors.
    """

    parts: tuple["Dim", ...]


@dataclass(frozen=True)
class Sum:
    """A concatenated dimension: the parts one behind the other, such as ``query ‖ key ‖ value``.

    Args:
        parts: The parts, in order.
    """

    parts: tuple["Dim", ...]


Dim = int | str | Product | Sum
"""A dimension: a fixed size, the key of an axis, or a product or sum of dimensions."""


@dataclass(frozen=True)
class Cache:
    """The keys and values that one attention caches per token, as dimensions, to compute the size of a key-value cache.

    Args:
        module: The path of the attention module.
        keys: The dimensions of one token's keys, before key-value heads are repeated.
        values: The dimensions of one token's values.
        itemsize: Bytes per entry.
    """

    module: str
    keys: tuple[Dim, ...]
    values: tuple[Dim, ...]
    itemsize: int


def size_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number of entries of a dimension, given the size of each axis.

    >>> size_of(Product(("kv", Sum((2, "d")))), {"kv": 3, "d": 5})
    21

    Args:
        dim: The dimension.
        sizes: Axis key → its number of units.
    """
    match dim:
        case int():
            return dim
        case str():
            return sizes[dim]
        case Product(parts):
            return prod(size_of(part, sizes) for part in parts)
        case Sum(parts):
            return sum(size_of(part, sizes) for part in parts)


def axes_in(dim: Dim) -> Iterator[str]:
    """Yield the keys of the axes in a dimension, with repetitions, outermost and leftmost first.

    Args:
        dim: The dimension.
    """
    match dim:
        case str():
            yield dim
        case Product(parts) | Sum(parts):
            for part in parts:
                yield from axes_in(part)
