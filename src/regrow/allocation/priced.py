"""The cost that a budget limits: a polynomial in sizes, or interpolated measured latencies."""

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np

from regrow.allocation.cost import Cost, CostTerm, SizeIndex, SizePolynomial, expand
from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph, Role, axes_in
from regrow.core.budget import Budget, Timing


class TimeTable:
    """Predict the nanoseconds of a forward pass at given sizes, from latencies measured per axis width.

    The prediction is the measured total less what each axis saves. Between two measured widths time is interpolated
    linearly, below the smallest it is constant. Savings of axes are added up; where two axes meet in one weight, as in
    consecutive convolutions, the real saving is smaller.

    Args:
        sizes: The index of the network's axes; axes without a measured curve save nothing.
        timing: The measured latencies.
    """

    def __init__(self, sizes: SizeIndex, timing: Timing) -> None:
        self._whole = timing.total
        saved: dict[str, np.ndarray] = {}
        for name, curve in timing.curves.items():
            widths, times = (np.array(row, dtype=np.float64) for row in zip(*curve, strict=True))
            at_each = np.interp(np.arange(int(widths[-1]) + 1), widths, times).round().astype(np.int64)
            saved[name] = at_each[-1] - at_each
        self._saved = {sizes.index[key]: saved[name] for key, name in timing.names.items() if key in sizes.index}

    def at(self, vector: np.ndarray) -> int:
        """Return the predicted nanoseconds at a vector of sizes.

        Args:
            vector: The sizes, ``[axes + 1]``.
        """
        return self._whole - sum(self._less(i, int(vector[i])) for i in self._saved)

    def rise(self, vector: np.ndarray, members: Sequence[int], units: int) -> int:
        """Return how many nanoseconds are added if each of some axes gets ``units`` more units.

        Args:
            vector: The sizes to start from.
            members: The indices of the axes that grow.
            units: How many units each of them gets.
        """
        timed = [i for i in members if i in self._saved]
        return sum(self._less(i, int(vector[i])) - self._less(i, int(vector[i]) + units) for i in timed)

    def _less(self, axis: int, width: int) -> int:
        row = self._saved[axis]
        return int(row[min(width, len(row) - 1)])


class CompensationBiases:
    """The cost of biases that bias compensation adds to layers without one, in parameters or bytes.

    Dropping an input saves at least as many entries as the bias has, so a smaller network never costs more.

    Args:
        sizes: The index of the network's axes.
        measure: Parameters (all of them) or bytes.
        weights: The names of the weights whose layers get a bias.
    """

    def __init__(self, sizes: SizeIndex, measure: Measure, weights: Iterable[str]) -> None:
        axes, self._present = sizes.axes, sizes.present
        self._biases: list[tuple[list[int], list[tuple[int, list[int]]]]] = []
        self._beside: list[list[int]] = [[] for _ in sizes.keys]
        for name in weights:
            each = axes.itemsize.get(name, 4) if measure == Measure.BYTES else 1
            reads = {
                slot.dim for axis in axes for slot in axis.slots if slot.name == name and slot.role is Role.CONSUMES
            }
            made = [dim for i, dim in enumerate(axes.shapes[name]) if i not in reads][:1]
            read = sorted({sizes.index[key] for i in reads for key in axes_in(axes.shapes[name][i])})
            terms = [(each * n, [sizes.index[key] for key in keys]) for keys, n in expand(made).items()]
            for i in {*read, *(i for _, own in terms for i in own)}:
                self._beside[i].append(len(self._biases))
            self._biases.append((read, terms))

    def at(self, vector: np.ndarray) -> int:
        """Return the cost of all added biases at a vector of sizes.

        Args:
            vector: The sizes, ``[axes + 1]``.
        """
        return sum(self._bias(one, vector) for one in range(len(self._biases)))

    def rise(self, vector: np.ndarray, members: Sequence[int], units: int) -> int:
        """Return how much the cost of the biases changes if each of some axes gets ``units`` more units.

        Args:
            vector: The sizes to start from.
            members: The indices of the axes that grow.
            units: How many units each of them gets.
        """
        wider = vector.copy()
        wider[members] += units
        some = {one for i in members for one in self._beside[i]}
        return sum(self._bias(i, wider) - self._bias(i, vector) for i in some)

    def _bias(self, one: int, vector: np.ndarray) -> int:
        read, terms = self._biases[one]
        if all(vector[i] >= self._present[i] for i in read):
            return 0
        return sum(n * prod(int(vector[i]) for i in own) for n, own in terms)


def cost_of(axes: AxisGraph, budget: Budget) -> Cost:
    """Return the cost that a budget limits, as a function of axis sizes, in whole steps of its measure.

    Args:
        axes: The network's axes.
        budget: The budget.

    Raises:
        ValueError: If the budget counts the key-value cache and the network has none, or time and none was measured.
    """
    if budget.measure == Measure.TIME:
        if budget.timing is None:
            raise ValueError("how long the network takes was not measured: Budget(timing=evaluation.timing(…))")
        timing = budget.timing
        return Cost(axes, Measure.TIME, terms=lambda sizes: [TimeTable(sizes, timing)])
    if budget.measure == Measure.CACHE and not axes.caches:
        raise ValueError("no attention of this network reads keys and values of earlier tokens: there is no kv_cache")
    if budget.compensated and budget.measure in (Measure.BYTES, Measure.PARAMETERS):
        measure, weights = budget.measure, budget.compensated

        def terms(sizes: SizeIndex) -> list[CostTerm]:
            return [SizePolynomial(sizes, measure), CompensationBiases(sizes, measure, weights)]

        return Cost(axes, measure, terms=terms)
    return Cost(axes, budget.measure, tokens=(budget.target.context if budget.target else 0) or 1)


def payers(axes: AxisGraph, budget: Budget) -> tuple[Axis, ...]:
    """Return the axes that can contribute to meeting a budget: allowed by it, and their units cost something.

    Args:
        axes: The network's axes.
        budget: What is counted, and which axes may be cut.
    """
    cost, units = cost_of(axes, budget), budget.units(axes)
    paying = [axis for axis in units if cost({axis.key: min(axis.least, axis.size - 1)}) < cost.total]
    keys, counts = {axis.key for axis in paying}, {axis.count for axis in paying if axis.count}
    return tuple(axis for axis in units if axis.key in keys or axis.count in counts)
