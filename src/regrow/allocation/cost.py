"""A network's cost at given axis sizes, exact and fast: parameters, MACs, bytes, cache, or measured time."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph, Dim, Product, Sum, axes_in
from regrow.core.budget import Budget, Timing

Monomials = Counter[tuple[str, ...]]
"""A polynomial in axis sizes: axis keys (sorted, with repetition) → integer coefficient."""
Rows = Any  # a list of indices; of a polynomial also a slice, which numpy reads without a copy


class Cost:
    """The cost of a network as a function of the sizes of its axes, in whole steps of its measure.

    Sizes are also written as a vector, ``[axes + 1]`` int64: in the order of ``keys``, with a constant 1 behind them.

    Args:
        axes: The network's axes.
        measure: What is counted: the weights in ``AxisGraph.counted``, all parameters (tied ones once),
            multiply–accumulates of one example, bytes (parameters and buffers), bytes of the key-value cache, or time.
        tokens: For the key-value cache: how many tokens of one sequence it holds in every attention.
        timing: The measured time of the network, if that is the measure.
        compensated: Weights whose layers get a bias once an input is dropped; it counts.
    """

    def __init__(
        self,
        axes: AxisGraph,
        measure: Measure = Measure.WEIGHTS,
        *,
        tokens: int = 1,
        timing: Timing | None = None,
        compensated: Iterable[str] = (),
    ) -> None:
        self.keys, sizes = tuple(axes.axes), axes.sizes()
        self.index = {key: i for i, key in enumerate(self.keys)}
        self.present = np.array([*(sizes[key] for key in self.keys), 1], dtype=np.int64)
        self._terms: list[_Term] = []
        if measure == Measure.TIME:
            if timing is None:
                raise ValueError("how long the network takes was not measured: Budget(timing=evaluation.timing(…))")
            self._terms.append(_TimeTable(self.index, timing))
        else:
            self._terms.append(_Polynomial(self.index, _tensors(axes, measure, tokens)))
        if compensated:
            self._terms.append(_Biases(self.index, self.present, axes, measure, compensated))

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """Return the cost at the given sizes, axis key → size; axes not named keep their current size."""
        vector = self.present.copy()
        for key, size in sizes.items():
            vector[self.index[key]] = size
        return self.at(vector)

    @property
    def total(self) -> int:
        """The cost of the network at its current sizes."""
        return self.at(self.present)

    def at(self, vector: np.ndarray) -> int:
        """Return the cost at sizes of all axes."""
        return sum(term.base + term.sum_rows(term.all_rows, vector) for term in self._terms)

    def rise(self, vector: np.ndarray, members: Iterable[int], units: int) -> int:
        """Return how much the cost grows if each of some axes (indices in ``keys``) gets ``units`` more units."""
        indices, wider = list(members), vector.copy()
        wider[indices] += units
        total = 0
        for term in self._terms:
            rows = sorted({row for i in indices for row in term.touching[i]})
            total += term.sum_rows(rows, wider) - term.sum_rows(rows, vector)
        return total


class _Term(ABC):
    """One summand of a cost: a constant and a sum of rows, each of which depends on the sizes of some axes."""

    base = 0

    def __init__(self, axes: int, rows: Sequence[Iterable[int]]) -> None:
        self.all_rows: Rows = range(len(rows))
        self.touching: list[list[int]] = [[] for _ in range(axes)]
        for row, members in enumerate(rows):
            for axis in {*members}:
                self.touching[axis].append(row)

    @abstractmethod
    def sum_rows(self, rows: Rows, vector: np.ndarray) -> int:
        """Return the sum of some rows at sizes of all axes."""


class _Polynomial(_Term):
    """Σ over monomials of coefficient · Π sizes, a row each.

    A convolution between two free axes costs a product of both sizes, so the cost of a unit depends on the other axis;
    this evaluates the cost of the whole planned network instead of adding up units.
    """

    def __init__(self, index: Mapping[str, int], products: Iterable[tuple[tuple[Dim, ...], int]]) -> None:
        monomials: Monomials = Counter()
        for dims, factor in products:
            for keys, coefficient in expand(dims).items():
                monomials[keys] += coefficient * factor
        rows = [[index[key] for key in keys] for keys in monomials]
        super().__init__(len(index), rows)
        self.all_rows = slice(None)
        # A last, constant size of 1 pads the shorter monomials.
        degree = max(map(len, rows), default=0)
        padded = [row + [len(index)] * (degree - len(row)) for row in rows]
        self._axes = np.array(padded, dtype=np.int64).reshape(len(rows), degree)
        self._coefficients = np.array(list(monomials.values()), dtype=np.int64)

    def sum_rows(self, rows: Rows, vector: np.ndarray) -> int:
        return int((self._coefficients[rows] * vector[self._axes[rows]].prod(axis=1)).sum())


class _TimeTable(_Term):
    """Nanoseconds of a forward pass: the measured total less what each axis saves, by latencies per axis width.

    Between two measured widths time is interpolated linearly, below the smallest it is constant; axes without a
    measured curve save nothing. Savings of axes are added up; where two axes meet in one weight, as in consecutive
    convolutions, the real saving is smaller.
    """

    def __init__(self, index: Mapping[str, int], timing: Timing) -> None:
        curves: dict[str, np.ndarray] = {}
        for name, curve in timing.curves.items():
            widths, times = (np.array(row, dtype=np.float64) for row in zip(*curve, strict=True))
            at_each = np.interp(np.arange(int(widths[-1]) + 1), widths, times).round().astype(np.int64)
            curves[name] = at_each - at_each[-1]
        self.base = timing.total
        self._rows = [(index[key], curves[name]) for key, name in timing.names.items() if key in index]
        super().__init__(len(index), [[axis] for axis, _ in self._rows])

    def sum_rows(self, rows: Rows, vector: np.ndarray) -> int:
        curves = (self._rows[row] for row in rows)
        return sum(int(curve[min(int(vector[axis]), len(curve) - 1)]) for axis, curve in curves)


class _Biases(_Term):
    """The cost of biases that bias compensation adds to layers without one, in parameters or bytes; a row each.

    Dropping an input saves at least as many entries as the bias has, so a smaller network never costs more.
    """

    def __init__(
        self,
        index: Mapping[str, int],
        present: np.ndarray,
        axes: AxisGraph,
        measure: Measure,
        weights: Iterable[str],
    ) -> None:
        self._present = present
        self._rows: list[tuple[list[int], list[tuple[int, list[int]]]]] = []
        for name in weights:
            each = axes.itemsize.get(name, 4) if measure == Measure.BYTES else 1
            reads = axes.consumed.get(name, frozenset())
            made = [dim for i, dim in enumerate(axes.shapes[name]) if i not in reads][:1]
            read = sorted({index[key] for i in reads for key in axes_in(axes.shapes[name][i])})
            self._rows.append((read, [(each * n, [index[key] for key in keys]) for keys, n in expand(made).items()]))
        super().__init__(len(index), [[*read, *(i for _, made in terms for i in made)] for read, terms in self._rows])

    def sum_rows(self, rows: Rows, vector: np.ndarray) -> int:
        total = 0
        for row in rows:
            read, terms = self._rows[row]
            if any(vector[i] < self._present[i] for i in read):
                total += sum(n * prod(int(vector[i]) for i in made) for n, made in terms)
        return total


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
            for cache in axes.caches:
                yield from ((dims, cache.itemsize * tokens) for dims in (cache.keys, cache.values))
        case _:
            raise ValueError(f"{measure} does not follow from sizes; count params")


def expand(dims: Iterable[Dim]) -> Monomials:
    """Multiply dimensions out into a polynomial in axis sizes.

    >>> dict(expand([Sum((2, "a")), "b", 3]))
    {('b',): 6, ('a', 'b'): 3}
    """
    result: Monomials = Counter({(): 1})
    for dim in dims:
        factor: Monomials = Counter()
        match dim:
            case int():
                factor[()] = dim
            case str():
                factor[dim,] = 1
            case Product(parts):
                factor = expand(parts)
            case Sum(parts):
                for part in parts:
                    factor.update(expand([part]))
        multiplied: Monomials = Counter()
        for (a, x), (b, y) in product(result.items(), factor.items()):
            multiplied[tuple(sorted(a + b))] += x * y
        result = multiplied
    return result


def cost_of(axes: AxisGraph, budget: Budget) -> Cost:
    """Return the cost that a budget limits."""
    if budget.measure == Measure.CACHE and not axes.caches:
        raise ValueError("no attention of this network reads keys and values of earlier tokens: there is no kv_cache")
    tokens = (budget.target.context if budget.target else 0) or 1
    counts_biases = budget.measure in (Measure.BYTES, Measure.PARAMETERS)
    compensated = budget.compensated if counts_biases else ()
    return Cost(axes, budget.measure, tokens=tokens, timing=budget.timing, compensated=compensated)


def payers(axes: AxisGraph, budget: Budget) -> tuple[Axis, ...]:
    """Return the axes that can contribute to meeting a budget: allowed by it, and their units cost something."""
    cost, units = cost_of(axes, budget), budget.units(axes)
    paying = [axis for axis in units if cost({axis.key: min(axis.least, axis.size - 1)}) < cost.total]
    keys, counts = {axis.key for axis in paying}, {axis.count for axis in paying if axis.count}
    return tuple(axis for axis in units if axis.key in keys or axis.count in counts)
