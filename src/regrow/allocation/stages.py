"""Split a search over a growing network into stages, so that the peak memory of every stage fits a budget.

In a stage some cells have all candidates and are searched; earlier cells were searched and are small; later cells do
not run yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from regrow.core.amounts import format_bytes

# Function: (first cell with all candidates, last cell that runs) → peak memory in bytes
Peak = Callable[[int, int], int]


class MemoryBudgetError(ValueError):
    """Raised if no stages fit a memory budget; the message has the least budget in bytes."""


@dataclass(frozen=True)
class MemoryStages:
    """The stages of a search whose memory is limited: ``ends``, the last cell of each (from 0), and its peak in bytes.

    ``recomputed``: whether the peaks hold if activations are recomputed in the backward pass; the caller sets it.
    """

    ends: tuple[int, ...]
    peaks: tuple[int, ...]
    recomputed: bool = False


def plan_stages(peak: Peak, cells: int, budget: int) -> MemoryStages:
    """Return stages of cells that each fit ``budget`` bytes; earlier ones take as many as fit.

    ``peak``: function of a stage's first cell and the last cell that runs → bytes; ``cells``: how many cells there are.
    Raises ``MemoryBudgetError`` if a cell by itself does not fit. Stages are the fewest if the peak grows with the last
    cell. So the last stage has the most room to spare, since later stages depend on an estimate of how small earlier
    cells will be. A final phase over all cells, all of them small, needs no more memory than the last stage.

    >>> plan_stages(lambda first, last: 10 * (last - first + 1) + 3 * first, cells=6, budget=30)
    MemoryStages(ends=(2, 4, 5), peaks=(30, 29, 25), recomputed=False)
    """
    peak_of, first = cache(peak), 0
    if peak_of(0, cells - 1) <= budget:  # even if fewer cells need more
        return MemoryStages((cells - 1,), (peak_of(0, cells - 1),))
    ends, peaks = [], []
    while first < cells:
        if peak_of(first, first) > budget:
            worst = max(
                range(first, cells), key=lambda cell: peak_of(cell, cell)
            )  # so that the amount suffices for all
            least = peak_of(worst, worst)
            raise MemoryBudgetError(
                f"{format_bytes(budget)} of memory do not suffice: part {worst + 1}, searched in a stage of its own, "
                f"needs {format_bytes(least)} ({least} bytes). Give that much, or a smaller batch or width"
            )
        last = first
        while last + 1 < cells and peak_of(first, last + 1) <= budget:
            last += 1
        ends.append(last)
        peaks.append(peak_of(first, last))
        first = last + 1
    return MemoryStages(tuple(ends), tuple(peaks))
