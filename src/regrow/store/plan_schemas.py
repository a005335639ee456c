"""Schemas of plans as JSON: in ledgers, plan files and checkpoints; placeholders and insertions also in shapes.json."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

import msgspec

from regrow.core.limits import check_memory
from regrow.store.errors import StoreError

Size = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class SlotJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A slot: where the units of an axis lie in one dimension of a tensor."""

    name: str
    dim: Count
    outer: Count
    stride: Count
    inner: Count
    offset: Count
    role: Literal["produces", "consumes", "scales", "shifts"]


class FillJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How new units are initialised: the rule, and the random seed."""

    rule: str
    seed: Count


class ChangeJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan does to one axis: units kept, added and restored."""

    size: Count
    keep: list[Count]
    slots: list[SlotJson]
    ids: list[Count]
    grow: Count
    fill: FillJson
    restore: list[Count]
    fresh: bool


class PlaceholderJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The placeholder that replaces a dropped module: what it returns, and from which argument."""

    gives: Literal["zero", "input", "nothing"]
    takes: Annotated[int, msgspec.Meta(ge=0, lt=256)] | str
    of: Annotated[int, msgspec.Meta(ge=0, le=256)]
    at: Annotated[int, msgspec.Meta(ge=0, lt=256)]


class BlockCopyJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A copy of a block in a stack: its place, what it copies, and which of its parameters are 0."""

    position: Size
    of: Size
    zeros: list[str]


class InsertionJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Copies of blocks that are inserted into a stack."""

    size: Size
    copies: Annotated[list[BlockCopyJson], msgspec.Meta(max_length=4096)]


class PlanJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A plan as JSON; ``origin`` is only informative."""

    format: Literal["regrow-plan/1"]
    changes: dict[str, ChangeJson]
    origin: dict[str, Any]
    means: dict[str, dict[str, float]]
    drop: dict[str, dict[str, PlaceholderJson]]
    back: list[str]
    insert: dict[str, InsertionJson] = {}
    remove: dict[str, InsertionJson] = {}


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
