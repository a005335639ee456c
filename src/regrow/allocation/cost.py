"""What a network costs at given sizes of its axes: exact, and fast enough to ask thousands of times."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from regrow.amounts import Measure
from regrow.axes import AxisGraph, Dim, Product, Sum
from regrow.work import per_example

Monomials = dict[tuple[str, ...], int]
"""Axis keys (sorted, with repetition) → coefficient."""


class CostTerm(Protocol):
    """A part of a cost, as a function of a vector of sizes."""

    def at(self, vector: np.ndarray) -> int:
        """The cost at a vector of sizes."""
        ...

    def rise(self, vector: np.ndarray, members: Sequence[int], units: int) -> int:
        """What ``units`` more units of each of some axes (their indices) would add at these sizes."""
        ...


@dataclass(frozen=True, eq=False)
class SizeIndex:
    """The axes of a network in a fixed order.

    Args:
        axes: The axes.
        keys: Their keys.
        index: Key → its place in ``keys``.
        present: Their sizes, and a constant 1.
    """

    axes: AxisGraph
    keys: tuple[str, ...]
    index: Mapping[str, int]
    present: np.ndarray

    @classmethod
    def of(cls, axes: AxisGraph) -> "SizeIndex":
        """The index of a network's axes."""
        keys, sizes = tuple(axes.axes), axes.sizes()
        present = np.array([*(sizes[key] for key in keys), 1], dtype=np.int64)
        return cls(axes, keys, {key: i for i, key in enumerate(keys)}, present)


class Cost:
    """The cost of a network as a function of the sizes of its axes: the sum of its terms.

    Args:
        axes: The network's axes.
        measure: Parameters, multiply–accumulates of one example, bytes (parameters and buffers), or bytes of the cache
            of keys and values.
        counted: For parameters: the weights in ``AxisGraph.counted`` alone, as a ``keep`` fraction means; otherwise
            every parameter, tied ones once.
        tokens: For the cache: how many tokens it holds, of one sequence; each attention holds all of them.
        terms: (index of the sizes) → its terms; the polynomial of the measure unless given.
    """

    def __init__(
        self,
        axes: AxisGraph,
        measure: Measure = Measure.PARAMETERS,
        *,
        counted: bool = True,
        tokens: int = 1,
        terms: Callable[[SizeIndex], Sequence[CostTerm]] | None = None,
    ) -> None:
        self.measure, self.sizes = measure, SizeIndex.of(axes)
        self.keys, self.index, self.present = self.sizes.keys, self.sizes.index, self.sizes.present
        self._terms = terms(self.sizes) if terms else (SizePolynomial(self.sizes, measure, counted, tokens),)

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """The cost at the given sizes; axes not named stay as they are."""
        vector = self.present.copy()
        for key, size in sizes.items():
            vector[self.index[key]] = size
        return self.at(vector)

    @property
    def total(self) -> int:
        """The cost of the network as it is."""
        return self.at(self.present)

    def vector(self, sizes: Mapping[str, int]) -> np.ndarray:
        """The sizes of all axes in the order of ``keys``, and a constant 1."""
        return np.array([*(sizes[key] for key in self.keys), 1], dtype=np.int64)

    def at(self, vector: np.ndarray) -> int:
        """The cost at a vector of sizes (``vector``)."""
        return sum(term.at(vector) for term in self._terms)

    def rise(self, vector: np.ndarray, members: Iterable[int], units: int) -> int:
        """What ``units`` more units of each of some axes (their indices in ``keys``) would add at these sizes."""
        several = list(members)
        return sum(term.rise(vector, several, units) for term in self._terms)


class SizePolynomial:
    """A polynomial in the sizes of axes: Σ over monomials of coefficient · Π sizes.

    A convolution between two free axes costs a product of both sizes, so costs of units do not add up; this evaluates
    the planned network instead.

    Args:
        sizes: The axes.
        measure: What is counted, as for :class:`Cost`.
        counted: As for :class:`Cost`.
        tokens: As for :class:`Cost`.
    """

    def __init__(self, sizes: SizeIndex, measure: Measure, counted: bool, tokens: int = 1) -> None:
        monomials: Monomials = {}
        for dims, factor in _tensors(sizes.axes, measure, counted, tokens):
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
        """The cost at a vector of sizes."""
        return self._sum(slice(None), vector)

    def rise(self, vector: np.ndarray, members: Sequence[int], units: int) -> int:
        """What ``units`` more units of each of some axes (their indices) would add at these sizes."""
        rows = sorted({row for member in members for row in self._touching[member]})
        wider = vector.copy()
        wider[members] += units
        return self._sum(rows, wider) - self._sum(rows, vector)

    def _sum(self, rows: slice | list[int], vector: np.ndarray) -> int:
        return int((self._coefficients[rows] * vector[self._axes[rows]].prod(axis=1)).sum())


def _tensors(axes: AxisGraph, measure: Measure, counted: bool, tokens: int) -> Iterable[tuple[tuple[Dim, ...], int]]:
    """The products of dimensions that are summed, each with a factor."""
    match measure:
        case Measure.MACS:
            yield from ((work.dims, 1) for work in per_example(axes))
        case Measure.BYTES:
            for name, dims in axes.shapes.items():
                if name not in axes.ties:
                    yield dims, axes.itemsize.get(name, 4)
        case Measure.PARAMETERS:
            names = axes.counted if counted else [name for name in axes.shapes if name in axes.parameters]
            yield from ((axes.shapes[name], 1) for name in names if name not in axes.ties)
        case Measure.CACHE:
            for one in axes.caches:
                yield from ((dims, one.itemsize * tokens) for dims in (one.keys, one.values))
        case Measure.NONZERO:
            raise ValueError("which weights are 0 does not follow from sizes; count params")
        case Measure.TIME:
            raise ValueError("time is no polynomial in sizes; allocation.priced makes a cost of measured times")


def expand(dims: Iterable[Dim]) -> Monomials:
    """A product of dimensions as a sum of monomials.

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
