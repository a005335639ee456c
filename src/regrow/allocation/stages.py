"""Stages: where to cut a search over a growing network, so that the memory of every stage fits a budget.

In a stage some cells are whole and are searched; those before them were searched, and are small; those behind them
do not run yet.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

Peak = Callable[[int, int], int]
"""(first cell that is whole, last cell that runs) → the most bytes that this needs."""

_UNITS = {"": 1, "b": 1, "bytes": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024))
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


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
class Stages:
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


def stages(peak: Peak, cells: int, budget: int, first: int = 0) -> Stages:
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
    Stages(ends=(2, 4, 5), peaks=(30, 29, 25), recomputed=False)
    """
    if not 0 <= first < cells:
        raise ValueError(f"cells {first} to {cells - 1} are to be searched: there is none")
    peak = cache(peak)
    if peak(first, cells - 1) <= budget:
        return Stages((cells - 1,), (peak(first, cells - 1),))
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
    return Stages(tuple(ends), tuple(peaks))


def _too_little(peak: Peak, cells: Iterable[int], budget: int) -> MemoryBudgetError:
    alone = {cell: peak(cell, cell) for cell in cells}
    cell = max(alone, key=alone.__getitem__)
    return MemoryBudgetError(
        f"{in_words(budget)} of memory do not suffice: part {cell + 1}, searched in a stage of its own, needs "
        f"{in_words(alone[cell])} ({alone[cell]} bytes). Give that much, or a smaller batch or width",
        alone[cell],
        cell,
    )


def in_bytes(amount: str | int) -> int:
    """How many bytes a user means: ``2GiB``, ``800 MiB``, ``1.5 GB``, ``4096``; kB, MB … are powers of 1000.

    >>> in_bytes("2GiB"), in_bytes("1.5 GB"), in_bytes("800kib")
    (2147483648, 1500000000, 819200)

    Raises:
        ValueError: If it is no amount of memory, or none at all.
    """
    found = _AMOUNT.fullmatch(str(amount))
    unit = _UNITS.get(found[2].lower()) if found else None
    number = float(found[1]) * unit if found and unit is not None else 0.0
    if not 1 <= number < 2**63:
        raise ValueError(f"an amount of memory reads like 2GiB, 800MiB, 1.5GB or 4096 (bytes); got {amount!r:.40}")
    return int(number)


def in_words(amount: int) -> str:
    """Bytes as people say them, in powers of 1024.

    >>> in_words(1_610_612_736), in_words(7)
    ('1.5 GiB', '7 bytes')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if amount >= _UNITS[unit.lower()]:
            return f"{amount / _UNITS[unit.lower()]:.4g} {unit}"
    return f"{amount} bytes"
