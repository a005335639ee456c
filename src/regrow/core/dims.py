"""Symbolic tensor dimensions: fixed sizes, axis keys, and products and concatenations of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod


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


def occurrences(dim: Dim, key: str, sizes: Mapping[str, int]) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """Yield each place of an axis in a dimension: enclosing loops ``(times, stride)``, inner extent, offset.

    Args:
        dim: The dimension.
        key: The key of the axis.
        sizes: Axis key → its number of units.

    Loops that continue each other without a gap are one; the longest comes first.

    >>> list(occurrences(Product((3, Sum(("a", 2)))), "a", {"a": 4}))
    [([(3, 6)], 1, 0)]
    """
    match dim:
        case str() if dim == key:
            yield [], 1, 0
        case Sum(parts):
            before = 0
            for part in parts:
                for loops, inner, offset in occurrences(part, key, sizes):
                    yield loops, inner, offset + before
                before += size_of(part, sizes)
        case Product(parts):
            for i, part in enumerate(parts):
                times, tail = (size_of(Product(some), sizes) for some in (parts[:i], parts[i + 1 :]))
                for loops, inner, offset in occurrences(part, key, sizes):
                    around = [(times, size_of(part, sizes) * tail)] if times > 1 else []
                    yield _merged([*around, *((n, s * tail) for n, s in loops)]), inner * tail, offset * tail


def divided(dims: tuple[Dim, ...], many: int) -> tuple[Dim, ...]:
    """Return dimensions divided by ``many`` if their fixed sizes contain that factor; unchanged otherwise.

    >>> divided((128, "a", 3), 64), divided((3, "a"), 64)
    ((2, 'a', 3), (3, 'a'))

    Args:
        dims: The dimensions.
        many: The factor.
    """
    left = many

    def without(dim: Dim) -> Dim:
        nonlocal left
        match dim:
            case int():
                shared = gcd(dim, left)
                left //= shared
                return dim // shared
            case Product(parts):
                return Product(tuple(without(part) for part in parts))
        return dim

    result = tuple(without(dim) for dim in dims)
    return result if left == 1 else dims


def _merged(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge loops that continue each other without a gap, and sort them by length, longest first."""
    merged: list[tuple[int, int]] = []
    for times, stride in sorted(loops, key=lambda loop: -loop[1]):
        if merged and merged[-1][1] == times * stride:
            merged[-1] = (merged[-1][0] * times, stride)
        else:
            merged.append((times, stride))
    return sorted(merged, key=lambda loop: -loop[0])
