"""Compress plans in ledger files: runs of consecutive unit numbers are written as intervals.

So a plan takes as much room for a wide layer as for a narrow one. In ``keep``, ``ids`` and ``restore`` of a change,
three or more consecutive numbers are written as ``[first, last]``.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from regrow.core.limits import check_memory
from regrow.store.errors import StoreError

_LISTS = ("keep", "ids", "restore")
_FEW, _RATIO = 2**21, 100
"""How many numbers the intervals of any file may expand to, and how many more for each of its bytes."""
_BYTES = 150
"""Bytes of memory that each number takes while a plan is read."""


def to_intervals(numbers: Sequence[Any]) -> list[Any]:
    """Replace runs of consecutive whole numbers by ``[first, last]``; other lists are returned unchanged.

    >>> to_intervals([0, 1, 2, 3, 7, 8, 11])
    [[0, 3], 7, 8, 11]
    """
    if any(type(number) is not int or number < 0 for number in numbers):
        return list(numbers)
    result: list[int | list[int]] = []
    for _, row in groupby(enumerate(numbers), key=lambda one: one[1] - one[0]):
        part = [number for _, number in row]
        result += [[part[0], part[-1]]] if len(part) > 2 else part
    return result


def from_intervals(entries: Sequence[Any]) -> list[Any]:
    """Expand intervals ``[first, last]`` into numbers: the inverse of :func:`to_intervals`.

    >>> from_intervals([[0, 3], 7, 8, 11])
    [0, 1, 2, 3, 7, 8, 11]
    """
    result: list[Any] = []
    for entry in entries:
        result += range(entry[0], entry[1] + 1) if _length(entry) else [entry]
    return result


def shorten_plan(plan: object) -> Any:
    """Return a plan (JSON data) with its unit numbers as intervals; anything that is not a plan is unchanged."""
    return _convert_changes(plan, to_intervals)


def expand_plans(plans: Iterable[object], length: int) -> list[Any]:
    """Return the plans of a ledger (JSON data) with intervals expanded: undoes :func:`shorten_plan`."""
    plans = list(plans)
    numbers = sum(_length(entry) for plan in plans for change in _changes(plan) for entry in _entries(change))
    if numbers > _FEW + _RATIO * length:
        raise StoreError(f"its intervals name {numbers:,} units, which is no plan of a network; restore it")
    check_memory(_BYTES * numbers, f"a ledger that names {numbers:,} units", "read it on a larger machine")
    return [_convert_changes(plan, from_intervals) for plan in plans]


def _convert_changes(plan: Any, convert: Callable[[list[Any]], list[Any]]) -> Any:
    if not _changes(plan):
        return plan
    changes = {
        key: {name: convert(one) if name in _LISTS and isinstance(one, list) else one for name, one in change.items()}
        if isinstance(change, dict)
        else change
        for key, change in plan["changes"].items()
    }
    return {**plan, "changes": changes}


def _changes(plan: Any) -> list[Any]:
    changes = plan.get("changes") if isinstance(plan, dict) else None
    return list(changes.values()) if isinstance(changes, dict) else []


def _entries(change: Any) -> Iterable[Any]:
    lists = [change.get(name) for name in _LISTS] if isinstance(change, dict) else []
    return (entry for one in lists if isinstance(one, list) for entry in one)


def _length(entry: Any) -> int:
    """Return how many numbers an interval expands to; 0 for anything that is not an interval."""
    match entry:
        case [int(first), int(last)] if type(first) is type(last) is int and 0 <= first <= last:
            return last - first + 1
    return 0
