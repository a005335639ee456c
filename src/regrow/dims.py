"""Dimensions: sizes, the keys of axes, and products and concatenations of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Product:
    """A dimension that is a product of dimensions, outermost first: ``heads × head_dim``."""

    parts: tuple["Dim", ...]


@dataclass(frozen=True)
class Sum:
    """A dimension that is a concatenation of dimensions: ``query ‖ key ‖ value``."""

    parts: tuple["Dim", ...]


Dim = int | str | Product | Sum
"""A dimension: a fixed size, the key of an axis, or a product or sum of dimensions."""


@dataclass(frozen=True)
class Cache:
    """What one attention reads of each token that went before, and a cache therefore keeps.

    Args:
        module: Where the attention runs.
        keys: The dimensions of a token's keys, before any repetition of heads.
        values: Those of its values.
        itemsize: Bytes per entry.
    """

    module: str
    keys: tuple[Dim, ...]
    values: tuple[Dim, ...]
    itemsize: int


def size_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The number of entries of a dimension, given the size of each axis.

    >>> size_of(Product(("kv", Sum((2, "d")))), {"kv": 3, "d": 5})
    21
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
    """The keys of the axes that a dimension is made of, with repetitions, outermost and leftmost first."""
    match dim:
        case str():
            yield dim
        case Product(parts) | Sum(parts):
            for part in parts:
                yield from axes_in(part)
