"""Stages: where to cut a search over a growing network, so that the memory of every stage fits a budget.

In a stage some cells are whole and are searched; those before them were searched, and are small; those behind them
do not run yet.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from regrow.amounts import format_bytes

Peak = Callable[[int, int], int]
"""(first cell that is whole, last cell that runs) → the most bytes that this needs."""


class MemoryBudgetError(ValueError):
    """A budget that no choice of stages keeps; names the least that one keeps.

    Args:
        message: What went wrong, and what would work.
        least: The least budget in bytes that can be kept.
        cell: The cell that needs it, searched in a stage of its own; the first is 0, and part 1 in the message.
    """

    def __init__(self, message: str, least: int, cell: int) -> None:
        super().__init__(message)
        self.least, self.cell = least, cell


@dataclass(frozen=True)
class MemoryStages:
    """Stages of a search, in order.

    Args:
        ends: The last cell of each, ascending.
        peaks: The most bytes that each needs.
        recomputed: Whether parts have to be computed anew in the backward pass.
    """

    ends: tuple[int, ...]
    peaks: tuple[int, ...]
    recomputed: bool = False

    @property
    def peak(self) -> int:
        """The most bytes that the whole search needs."""
        return max(self.peaks)

    def record(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        return {"ends": list(self.ends), "peaks": list(self.peaks), "recomputed": self.recomputed}


def stages(peak: Peak, cells: int, budget: int, first: int = 0) -> MemoryStages:
    """The fewest stages of which each keeps a budget; each takes as many cells as fit, so that the last has most room.

    Later stages rest on a guess of how small earlier ones will be, which the room is for. Once a stage is over, its
    size is known: plan again from the next cell on. A last phase over all cells, all of them small, needs no more
    than the last stage.

    Args:
        peak: More cells never need less, and a cell never needs more after its stage than in it. Asked once where
            one stage suffices, else once per cell and stage besides.
        cells: How many.
        budget: In bytes.
        first: The first cell that was not searched yet.

    Raises:
        MemoryBudgetError: If a cell that is alone in its stage needs more.
        ValueError: If there is no cell to search.

    >>> stages(lambda first, last: 10 * (last - first + 1) + 3 * first, cells=6, budget=30)
    MemoryStages(ends=(2, 4, 5), peaks=(30, 29, 25), recomputed=False)
    """
    if not 0 <= first < cells:
        raise ValueError(f"cells {first} to {cells - 1} are to be searched: there is none")
    peak = cache(peak)
    if peak(first, cells - 1) <= budget:
        return MemoryStages((cells - 1,), (peak(first, cells - 1),))
    ends: list[int] = []
    peaks: list[int] = []
    while first < cells:
        last = first
        if peak(first, last) > budget:
            raise _too_little(peak, range(first, cells), budget)
        while last + 1 < cells and peak(first, last + 1) <= budget:
            last += 1
        ends.append(last)
        peaks.append(peak(first, last))
        first = last + 1
    return MemoryStages(tuple(ends), tuple(peaks))


def _too_little(peak: Peak, cells: Iterable[int], budget: int) -> MemoryBudgetError:
    alone = {cell: peak(cell, cell) for cell in cells}
    cell = max(alone, key=alone.__getitem__)
    return MemoryBudgetError(
        f"{format_bytes(budget)} of memory do not suffice: part {cell + 1}, searched in a stage of its own, needs "
        f"{format_bytes(alone[cell])} ({alone[cell]} bytes). Give that much, or a smaller batch or width",
        alone[cell],
        cell,
    )
