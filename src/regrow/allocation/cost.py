"""A network's cost at given axis sizes, exact and fast: parameters, MACs, bytes, cache, or measured time."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from math import prod

import numpy as np

from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph, Dim, Product, Sum, axes_in
from regrow.core.budget import Budget, Timing

# A polynomial in axis sizes: axis keys (sorted, with repetition) → integer coefficient
Monomials = Counter[tuple[str, ...]]
# One summand of a cost: sizes of all axes, `[axes + 1]` int64 → steps of the measure
Term = Callable[[np.ndarray], int]


class Cost:
    """The cost of a network as a function of the sizes of its axes, in whole steps of its measure.

    Sizes are also written as a vector, ``[axes + 1]`` int64: in the order of ``index``, with a constant 1 behind them.
    A key-value cache is that of ``tokens`` tokens. ``compensated`` weights get a bias once an input is dropped; without
    ``timing``, time raises ``ValueError``.
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
        self.index = {key: i for i, key in enumerate(axes.axes)}
        self.present = np.array([*axes.sizes().values(), 1], dtype=np.int64)
        if measure == Measure.TIME:
            if timing is None:
                raise ValueError("how long the network takes was not measured: Budget(timing=time_widths(…))")
            self._terms = [_time_term(self.index, timing)]
        else:
            self._terms = [_polynomial_term(self.index, _counted_products(axes, measure, tokens))]
        if compensated:
            self._terms.append(_bias_term(self.index, self.present, axes, measure, compensated))

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
        """Return the cost at the sizes of all axes, as a vector ``[axes + 1]``."""
        return sum(term(vector) for term in self._terms)


def _polynomial_term(index: Mapping[str, int], products: Iterable[tuple[tuple[Dim, ...], int]]) -> Term:
    """Return the term Σ coefficient · Π sizes, over (dimensions, coefficient); ``index``: axis key → its place.

    A convolution between two free axes costs a product of both sizes, so the cost of a unit depends on the other axis;
    this evaluates the cost of the whole planned network instead of adding up units.
    """
    monomials: Monomials = Counter()
    for dims, factor in products:
        for keys, coefficient in expand_product(dims).items():
            monomials[keys] += coefficient * factor
    degree = max(map(len, monomials), default=0)
    # A last, constant size of 1 pads the shorter monomials.
    padded = [[index[key] for key in keys] + [len(index)] * (degree - len(keys)) for keys in monomials]
    members = np.array(padded, dtype=np.int64).reshape(len(padded), degree)
    coefficients = np.array(list(monomials.values()), dtype=np.int64)
    return lambda vector: int((coefficients * vector[members].prod(axis=1)).sum())


def _time_term(index: Mapping[str, int], timing: Timing) -> Term:
    """Return the term of nanoseconds of a forward pass: the measured total less what each axis saves at its width.

    Between two measured widths time is interpolated linearly, below the smallest it is constant; axes without a
    measured curve save nothing. Savings of axes are added up; where two axes meet in one weight, as in consecutive
    convolutions, the real saving is smaller.
    """
    savings: dict[str, np.ndarray] = {}
    for name, curve in timing.curves.items():
        widths, times = np.array(curve, dtype=np.float64).T
        at_each = np.interp(np.arange(int(widths[-1]) + 1), widths, times).round().astype(np.int64)
        savings[name] = at_each - at_each[-1]
    rows = [(index[key], savings[name]) for key, name in timing.names.items() if key in index]
    return lambda vector: timing.total + sum(int(row[min(int(vector[axis]), len(row) - 1)]) for axis, row in rows)


def _bias_term(
    index: Mapping[str, int], present: np.ndarray, axes: AxisGraph, measure: Measure, weights: Iterable[str]
) -> Term:
    """Return the term of biases that bias compensation adds to the layers of ``weights``, in parameters or bytes.

    Dropping an input saves at least as many entries as the bias has, so a smaller network never costs more.
    """
    rows: list[tuple[list[int], int, list[tuple[int, list[int]]]]] = []
    for name in weights:
        each = axes.itemsize.get(name, 4) if measure == Measure.BYTES else 1
        reads = axes.consumed.get(name, frozenset())
        outputs = [dim for i, dim in enumerate(axes.shapes[name]) if i not in reads][:1]
        inputs = sorted({index[key] for i in reads for key in axes_in(axes.shapes[name][i])})
        rows.append((inputs, each, [(n, [index[key] for key in keys]) for keys, n in expand_product(outputs).items()]))

    def cost(vector: np.ndarray) -> int:
        total = 0
        for inputs, each, monomials in rows:
            if any(vector[i] < present[i] for i in inputs):
                total += each * sum(n * prod(int(vector[i]) for i in factors) for n, factors in monomials)
        return total

    return cost


def _counted_products(axes: AxisGraph, measure: Measure, tokens: int) -> Iterable[tuple[tuple[Dim, ...], int]]:
    """Yield (dimensions, integer coefficient) of each product that a measure sums; ``ValueError`` for time, nonzero."""
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


def expand_product(dims: Iterable[Dim]) -> Monomials:
    """Return the product of dimensions, multiplied out, as a polynomial in axis sizes: sorted keys → coefficient.

    >>> dict(expand_product([Sum((2, "a")), "b", 3]))
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
                factor = expand_product(parts)
            case Sum(parts):
                for part in parts:
                    factor.update(expand_product([part]))
        multiplied: Monomials = Counter()
        for (a, x), (b, y) in product(result.items(), factor.items()):
            multiplied[tuple(sorted(a + b))] += x * y
        result = multiplied
    return result


def cost_of(axes: AxisGraph, budget: Budget) -> Cost:
    """Return the cost function that a budget limits; raise ``ValueError`` if the network has none of its measure."""
    if budget.measure == Measure.CACHE and not axes.caches:
        raise ValueError("no attention of this network reads keys and values of earlier tokens: there is no kv_cache")
    tokens = (budget.target.context if budget.target else 0) or 1
    compensated = budget.compensated if budget.measure in (Measure.BYTES, Measure.PARAMETERS) else ()
    return Cost(axes, budget.measure, tokens=tokens, timing=budget.timing, compensated=compensated)


def find_paying_axes(axes: AxisGraph, budget: Budget) -> tuple[Axis, ...]:
    """Return the axes that can contribute to meeting a budget: allowed by it, and their units cost something."""
    cost, units = cost_of(axes, budget), budget.units(axes)
    paying = [axis for axis in units if cost({axis.key: min(axis.least, axis.size - 1)}) < cost.total]
    keys, counts = {axis.key for axis in paying}, {axis.count for axis in paying if axis.count}
    return tuple(axis for axis in units if axis.key in keys or axis.count in counts)
