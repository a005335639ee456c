"""Compute a network's cost (parameters, MACs, bytes, cache) at given axis sizes: exact and fast."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph, Dim, Product, Sum

Monomials = dict[tuple[str, ...], int]
"""A polynomial in axis sizes: axis keys (sorted, with repetition) → integer coefficient."""


class CostTerm(Protocol):
    """One summand of a cost, as a function of the vector of axis sizes."""

    def at(self, vector: np.ndarray) -> int:
        """Return the cost at a vector of axis sizes.

        Args:
            vector: The sizes in the order of ``SizeIndex.keys``, and a constant 1.
        """
        ...

    def rise(self, vector: np.ndarray, members: Sequence[int], units: int) -> int:
        """Return how much the cost grows if each of some axes gets ``units`` more units.

        Args:
            vector: The sizes to start from.
            members: The indices of the axes that grow.
            units: How many units each of them gets.
        """
        ...


@dataclass(frozen=True, eq=False)
class SizeIndex:
    """The axes of a network in a fixed order, so that sizes can be written as a vector.

    Args:
        axes: The axes.
        keys: Their keys, in the order of the vector.
        index: Key → its index in ``keys``.
        present: Their current sizes, and a constant 1, ``[axes + 1]`` int64.
    """

    axes: AxisGraph
    keys: tuple[str, ...]
    index: Mapping[str, int]
    present: np.ndarray

    @classmethod
    def of(cls, axes: AxisGraph) -> "SizeIndex":
        """Return the index of a network's axes.

        Args:
            axes: The network's axes.
        """
        keys, sizes = tuple(axes.axes), axes.sizes()
        present = np.array([*(sizes[key] for key in keys), 1], dtype=np.int64)
        return cls(axes, keys, {key: i for i, key in enumerate(keys)}, present)


class Cost:
    """The cost of a network as a function of the sizes of its axes; a sum of terms.

    Args:
        axes: The network's axes.
        measure: What is counted: the weights in ``AxisGraph.counted``, all parameters (tied ones once),
            multiply–accumulates of one example, bytes (parameters and buffers), or bytes of the key-value cache.
        tokens: For the key-value cache: how many tokens of one sequence it holds in every attention.
        terms: Function from the size index to the terms to sum; if ``None``, the polynomial of the measure.
    """

    def __init__(
        self,
        axes: AxisGraph,
        measure: Measure = Measure.WEIGHTS,
        *,
        tokens: int = 1,
        terms: Callable[[SizeIndex], Sequence[CostTerm]] | None = None,
    ) -> None:
        self.measure, self.sizes = measure, SizeIndex.of(axes)
        self.keys, self.index, self.present = self.sizes.keys, self.sizes.index, self.sizes.present
        self._terms = terms(self.sizes) if terms else (SizePolynomial(self.sizes, measure, tokens),)

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """Return the cost at the given sizes; axes not named keep their current size.

        Args:
            sizes: Axis key → size.
        """
        vector = self.present.copy()
        for key, size in sizes.items():
            vector[self.index[key]] = size
        return self.at(vector)

    @property
    def total(self) -> int:
        """The cost of the network at its current sizes."""
        return self.at(self.present)

    def at(self, vector: np.ndarray) -> int:
        """Return the cost at sizes of all axes in the order of ``keys``, with a 1 behind them.

        Args:
            vector: The sizes, ``[axes + 1]``.
        """
        return sum(term.at(vector) for term in self._terms)

    def rise(self, vector: np.ndarray, members: Iterable[int], units: int) -> int:
        """Return how much the cost grows if each of some axes gets ``units`` more units.

        Args:
            vector: The sizes to start from.
            members: The indices in ``keys`` of the axes that grow.
            units: How many units each of them gets.
        """
        several = list(members)
        return sum(term.rise(vector, several, units) for term in self._terms)


class SizePolynomial:
    """A cost that is a polynomial in axis sizes: Σ over monomials of coefficient · Π sizes.

    A convolution between two free axes costs a product of both sizes, so the cost of a unit depends on the other axis;
    this evaluates the cost of the whole planned network instead of adding up units.

    Args:
        sizes: The index of the network's axes.
        measure: What is counted, as for :class:`Cost`.
        tokens: As for :class:`Cost`.
    """

    def __init__(self, sizes: SizeIndex, measure: Measure, tokens: int = 1) -> None:
        monomials: Monomials = {}
        for dims, factor in _tensors(sizes.axes, measure, tokens):
            for keys, coefficient in expand(dims).items():
                monomials[keys] = monomials.get(keys, 0) + coefficient * factor
        degree = max((len(keys) for keys in monomials), default=0)
        # A last, constant size of 1 pads the shorter monomials.
        self._axes = np.full((len(monomials), degree), len(sizes.keys), dtype=np.int64)
        for row, keys in enumerate(monomials):
            self._axes[row, : len(keys)] = [sizes.index[key] for key in keys]
        self._coefficients = np.array(list(monomials.values()), dtype=np.int64)
        self._touching: list[list[int]] = [[] for _ in sizes.keys]
        for row, keys in enumerate(monomials):
            for key in set(keys):
                self._touching[sizes.index[key]].append(row)

    def at(self, vector: np.ndarray) -> int:
        """Return the cost at a vector of sizes.

        Args:
            vector: The sizes, ``[axes + 1]``.
        """
        return self._sum(slice(None), vector)

    def rise(self, vector: np.ndarray, members: Sequence[int], units: int) -> int:
        """Return how much the cost grows if each of some axes gets ``units`` more units.

        Args:
            vector: The sizes to start from.
            members: The indices of the axes that grow.
            units: How many units each of them gets.
        """
        rows = sorted({row for member in members for row in self._touching[member]})
        wider = vector.copy()
        wider[members] += units
        return self._sum(rows, wider) - self._sum(rows, vector)

    def _sum(self, rows: slice | list[int], vector: np.ndarray) -> int:
        return int((self._coefficients[rows] * vector[self._axes[rows]].prod(axis=1)).sum())


def _tensors(axes: AxisGraph, measure: Measure, tokens: int) -> Iterable[tuple[tuple[Dim, ...], int]]:
    """Yield the products of dimensions that a measure sums, each with an integer coefficient."""
    match measure:
        case Measure.MACS:
            yield from ((work.dims, 1) for work in axes.work_per_example())
        case Measure.BYTES:
            for name, dims in axes.shapes.items():
                if name not in axes.ties:
                    yield dims, axes.itemsize.get(name, 4)
        case Measure.PARAMETERS | Measure.WEIGHTS:
            names = axes.counted if measure == Measure.WEIGHTS else [n for n in axes.shapes if n in axes.parameters]
            yield from ((axes.shapes[name], 1) for name in names if name not in axes.ties)
        case Measure.CACHE:
            for one in axes.caches:
                yield from ((dims, one.itemsize * tokens) for dims in (one.keys, one.values))
        case Measure.NONZERO:
            raise ValueError("which weights are 0 does not follow from sizes; count params")
        case Measure.TIME:
            raise ValueError("time is no polynomial in sizes; allocation.priced makes a cost of measured times")


def expand(dims: Iterable[Dim]) -> Monomials:
    """Multiply dimensions out into a polynomial in axis sizes: axis keys → coefficient.

    Args:
        dims: The dimensions to multiply.

    >>> expand([Sum((2, "a")), "b", 3])
    {('b',): 6, ('a', 'b'): 3}
    """
    result: Monomials = {(): 1}
    for dim in dims:
        match dim:
            case int():
                factor: Monomials = {(): dim}
            case str():
                factor = {(dim,): 1}
            case Product(parts):
                factor = expand(parts)
            case Sum(parts):
                factor = {}
                for part in parts:
                    for keys, coefficient in expand([part]).items():
                        factor[keys] = factor.get(keys, 0) + coefficient
        multiplied: Monomials = {}
        for (a, x), (b, y) in product(result.items(), factor.items()):
            keys = tuple(sorted(a + b))
            multiplied[keys] = multiplied.get(keys, 0) + x * y
        result = multiplied
    return result
