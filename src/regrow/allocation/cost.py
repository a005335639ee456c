"""What a network costs at given sizes of its axes: exact, and fast enough to ask thousands of times."""

from collections.abc import Iterable, Mapping
from itertools import product

import numpy as np

from regrow.amounts import Measure
from regrow.axes import AxisGraph, Dim, Product, Sum
from regrow.work import per_example

Monomials = dict[tuple[str, ...], int]
"""Axis keys (sorted, with repetition) → coefficient."""


class Cost:
    """The cost of a network as a polynomial in the sizes of its axes: Σ over terms of coefficient · Π sizes.

    A convolution between two free axes costs a product of both sizes, so costs of units do not add up; this evaluates
    the planned network instead.

    Args:
        axes: The network's axes.
        measure: Parameters, multiply–accumulates of one example, bytes (parameters and buffers), or bytes of the cache
            of keys and values.
        counted: For parameters: the weights in ``AxisGraph.counted`` alone, as a ``keep`` fraction means; otherwise
            every parameter, tied ones once.
        tokens: For the cache: how many tokens it holds, of one sequence; each attention holds all of them.
    """

    def __init__(
        self, axes: AxisGraph, measure: Measure = Measure.PARAMETERS, *, counted: bool = True, tokens: int = 1
    ) -> None:
        terms: Monomials = {}
        for dims, factor in _tensors(axes, measure, counted, tokens):
            for keys, coefficient in expand(dims).items():
                terms[keys] = terms.get(keys, 0) + coefficient * factor
        self._over(axes, measure)
        degree = max((len(keys) for keys in terms), default=0)
        # A last, constant size of 1 pads the shorter terms.
        self._axes = np.full((len(terms), degree), len(self.keys), dtype=np.int64)
        for row, keys in enumerate(terms):
            self._axes[row, : len(keys)] = [self.index[key] for key in keys]
        self._coefficients = np.array(list(terms.values()), dtype=np.int64)
        self._touching: list[list[int]] = [[] for _ in self.keys]
        for row, keys in enumerate(terms):
            for key in set(keys):
                self._touching[self.index[key]].append(row)

    def _over(self, axes: AxisGraph, measure: Measure) -> None:
        self.measure = measure
        self.keys = tuple(axes.axes)
        self.index = {key: i for i, key in enumerate(self.keys)}
        self.present = self.vector(axes.sizes())

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
        return self._sum(slice(None), vector)

    def rise(self, vector: np.ndarray, members: Iterable[int], units: int) -> int:
        """What ``units`` more units of each of some axes (their indices in ``keys``) would add at these sizes."""
        members = list(members)
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
