"""Read and validate JSON data strictly: errors name the file, field, value and remedy in one line."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from regrow.core import limits
from regrow.core.errors import InputError
from regrow.core.limits import MAX_JSON_BYTES, check_memory
from regrow.store.errors import StoreError

Record = TypeVar("Record")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def convert(data: object, kind: type[Record], where: str | Path = "", remedy: str = "restore it") -> Record:
    """Convert JSON data to a typed record, or raise an error that names the wrong field and its value.

    >>> convert({"names": "a"}, dict[str, int], "run.json")
    Traceback (most recent call last):
    ...
    regrow.store.errors.StoreError: run.json: names is 'a': Expected `int`, got `str`; restore it
    """
    try:
        return msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        text, _, path = str(error).rpartition(" - at `") if " - at `" in str(error) else (str(error), "", "")
        place, value = _locate(data, kind, path.rstrip("`"), str(error))
        if place:
            shown = repr(value)
            text = f"{place} is {shown if len(shown) <= 80 else shown[:79] + '…'}: {text}"
        raise StoreError(f"{where}: {text}; {remedy}" if where else f"{text}; {remedy}") from None


def check_format(data: object, known: str, where: str | Path, remedy: str = "run it again") -> None:
    """Raise StoreError unless JSON data name the format that this version reads."""
    written = data.get("format") if isinstance(data, Mapping) else None
    if written == known:
        return
    if isinstance(written, str) and written.startswith(known.partition("/")[0] + "/"):
        raise StoreError(
            f"{where} was written by another version of regrow (format {written:.40}, this version reads {known}); "
            f"{remedy}"
        )
    raise StoreError(f"{where} is not of the format {known!r}; restore it")


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file that may be hostile; ``None`` if it does not exist."""
    try:
        return limits.read_json(path, most) if path.exists() else None
    except InputError as error:
        raise StoreError(str(error)) from None


def _locate(data: Any, kind: Any, path: str, message: str) -> tuple[str, Any]:
    """Return the field that an error of msgspec is about, with the dict keys that it leaves out, and its value."""
    place: list[Any] = []
    value = data
    for step in [name or number for name, number in _STEP.findall(path)]:
        if step == "...":
            if not isinstance(value, Mapping):
                break
            found = next((key for key in value if _fails(data, kind, [*place, key], message)), None)
            if found is None:
                break
            step = found
        try:
            value = value[int(step)] if isinstance(value, list | tuple) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            break
        place.append(step)
    return ".".join(map(str, place)), value


def _fails(data: Any, kind: Any, place: list[Any], message: str) -> bool:
    """Whether the same error occurs if a dict holds one entry alone."""
    try:
        msgspec.convert(_isolate(data, place), kind, strict=True)
    except msgspec.ValidationError as error:
        return str(error) == message
    return False


def _isolate(data: Any, place: list[Any]) -> Any:
    """Return JSON data in which the dict at a place holds only the last entry of the place."""
    first, *rest = place
    if not rest:
        return {first: data[first]}
    if isinstance(data, Mapping):
        return {**data, first: _isolate(data[first], rest)}
    return [_isolate(part, rest) if i == int(first) else part for i, part in enumerate(data)]


# Unit numbers of plans are written as intervals, so that a wide layer takes as much room as a narrow one.
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
