"""A network's cost at given axis sizes (parameters, MACs, bytes, cache, time), and prices of entries and operations."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import prod

import numpy as np

from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph, Dim, Product, Sum, axes_in, size_of
from regrow.core.budget import Budget, Timing

# A polynomial in axis sizes: axis keys (sorted, with repetition) → integer coefficient
Monomials = Counter[tuple[str, ...]]
# One summand of a cost: sizes of all axes, `[axes + 1]` int64 → steps of the measure
Term = Callable[[np.ndarray], int]


class Cost:
    """The cost of a network as a function of the sizes of its axes: an integer, for time in nanoseconds.

    Sizes are also written as a vector, ``[axes + 1]`` int64: ``index`` has each axis's place in it, the last entry is a
    constant 1; ``present`` are the current sizes.

    Args:
        axes: The network's axes.
        measure: What is counted; time raises ``ValueError`` without ``timing``, and so does ``nonzero``.
        tokens: How many tokens a key-value cache holds.
        timing: The measured time, for the measure of time.
        compensated: Names of weights whose layer gets a bias, which counts, once one of their inputs is dropped.
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
        """Return the cost at the sizes of all axes, a vector ``[axes + 1]`` ordered by ``index``, ending with 1."""
        return sum(term(vector) for term in self._terms)


def _polynomial_term(index: Mapping[str, int], products: Iterable[tuple[tuple[Dim, ...], int]]) -> Term:
    """Return a function from a vector of sizes to Σ coefficient · Π sizes; ``products``: (dimensions, coefficient).

    ``index``: axis key → its place in the vector. A convolution between two free axes costs a product of both sizes, so
    a unit's cost depends on the other axis; this takes the cost of the whole planned network, not of each unit.
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
    """Return a function from a vector of sizes to nanoseconds per pass: the measured total less what each axis saves.

    ``index``: axis key → its place in the vector. Between two measured widths time is interpolated linearly, below the
    smallest it is constant; axes without a measured curve save nothing. Savings of axes are added up; where two axes
    meet in one weight, as in consecutive convolutions, the real saving is smaller.
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
    """Return a function from a vector of sizes to the parameters, or bytes, of biases that bias compensation adds.

    ``index``: axis key → its place in the vector; ``present``: the current sizes; ``weights``: names of the weights
    whose layer gets a bias once an input is dropped. That saves at least as many entries as the bias has, so a smaller
    network never costs more.
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
    """Yield (dimensions, coefficient) of each product of sizes that a measure sums; ``ValueError`` for time, nonzero.

    The coefficient is 1, or bytes per entry; of a key-value cache, of ``tokens`` tokens.
    """
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
    """Return the cost function of a budget's measure, with its timing, biases and context (1 token unless given).

    Raise ``ValueError`` for a key-value cache that the network does not have, and as :class:`Cost` does.
    """
    if budget.measure == Measure.CACHE and not axes.caches:
        raise ValueError("no attention of this network reads keys and values of earlier tokens: there is no kv_cache")
    tokens = (budget.target.context if budget.target else 0) or 1
    compensated = budget.compensated if budget.measure in (Measure.BYTES, Measure.PARAMETERS) else ()
    return Cost(axes, budget.measure, tokens=tokens, timing=budget.timing, compensated=compensated)


def find_paying_axes(axes: AxisGraph, budget: Budget) -> tuple[Axis, ...]:
    """Return the axes that a budget lets cut and whose units cost something, with those that must have equal counts."""
    cost, units = cost_of(axes, budget), budget.units(axes)
    paying = [axis for axis in units if cost({axis.key: min(axis.least, axis.size - 1)}) < cost.total]
    keys, counts = {axis.key for axis in paying}, {axis.count for axis in paying if axis.count}
    return tuple(axis for axis in units if axis.key in keys or axis.count in counts)


@dataclass(frozen=True)
class Prices:
    """The cost of a network in one measure, by what it consists of.

    Args:
        entries: Parameter or buffer name → the cost of each of its entries.
        ops: Path of an operation → its cost beside that of its entries.
        rest: The cost that remains whatever is removed.
    """

    entries: Mapping[str, float]
    ops: Mapping[str, float] = field(default_factory=dict)
    rest: float = 0.0


def prices_in(axes: AxisGraph, measure: Measure, ops: Collection[str]) -> Prices:
    """Return the cost per parameter entry and operation (``ops``: paths) in a measure; of time none.

    Raise ``ValueError`` for measures that a search does not count.
    """
    match measure:
        case Measure.PARAMETERS | Measure.NONZERO:
            return Prices(dict.fromkeys(axes.shapes, 1.0))
        case Measure.BYTES:
            return Prices({name: float(axes.itemsize.get(name, 4)) for name in axes.shapes})
        case Measure.MACS:
            return _count_macs(axes, ops)
        case Measure.TIME:
            return Prices({})
    raise ValueError(f"a search does not count {measure}; count params, nonzero, macs, bytes or ms")


def _count_macs(axes: AxisGraph, ops: Collection[str]) -> Prices:
    """Return costs in multiply–accumulates of one example, per parameter entry and operation (``ops``: paths).

    Those of a module are spread over the entries of its weights. Those of modules without any (attention, products of
    activations) count in full as long as their operation is active, which is too much once widths are cut.
    """
    macs, alone, rest, weights = _macs_per_module(axes), dict.fromkeys(ops, 0.0), 0.0, _weights_of_modules(axes)
    for module, count in macs.items():
        if module in weights:
            continue
        if path := next((path for path in (module, *enclosing_modules(module)) if path in alone), None):
            alone[path] += count
        else:
            rest += count
    prices = dict.fromkeys(axes.shapes, 0.0)
    for module, names in weights.items():
        for name in names:  # those of tied tensors are summed under the first name
            prices[axes.ties.get(name, name)] += macs[module] / axes.count_entries(names, axes.sizes())
    return Prices(prices, alone, rest)


def _weights_of_modules(axes: AxisGraph) -> dict[str, list[str]]:
    """Return module path → its ``weight``, or else its own parameters of two or more dimensions, as of an LSTM."""
    found: dict[str, list[str]] = {}
    for name in axes.parameters & axes.shapes.keys():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" or len(axes.shapes[name]) > 1:
            found.setdefault(module, []).append(name)
    named = ((module, f"{module}.weight".lstrip("."), sorted(names)) for module, names in sorted(found.items()))
    return {module: [weight] if weight in names else names for module, weight, names in named}


def _macs_per_module(axes: AxisGraph) -> Counter[str]:
    """Return module path → the multiply–accumulates that it does for one example."""
    sizes, macs = axes.sizes(), Counter[str]()
    for work in axes.work_per_example():
        macs[work.module] += size_of(Product(work.dims), sizes)
    return macs


def enclosing_modules(name: str) -> list[str]:
    """Return the paths of the modules that contain a parameter, the innermost first.

    >>> enclosing_modules("a.b.weight")
    ['a.b', 'a']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
