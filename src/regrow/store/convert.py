"""Read and validate JSON data strictly: errors name the file, what is wrong, the field and the remedy in one line."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from regrow.core import limits
from regrow.core.errors import InputError
from regrow.core.limits import MAX_JSON_BYTES, check_memory
from regrow.store.errors import StoreError

Record = TypeVar("Record")


def convert(data: object, kind: type[Record], where: str | Path = "", remedy: str = "restore it") -> Record:
    """Convert JSON data to a record of type ``kind`` without coercion, or raise StoreError that names the field.

    ``where``: what the error begins with, such as the file's path; ``remedy``: its last words.

    >>> convert({"names": ["a"]}, dict[str, list[int]], "run.json")
    Traceback (most recent call last):
    ...
    regrow.store.errors.StoreError: run.json: Expected `int`, got `str` - at `$[...][0]`; restore it
    """
    try:
        return msgspec.convert(data, kind, strict=True, str_keys=True)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        raise StoreError(f"{where}: {error}; {remedy}" if where else f"{error}; {remedy}") from None


def check_fields(data: object, written: object) -> None:
    """Raise StoreError unless JSON data have the same fields as ``written``, at any depth; values are not compared.

    ``written`` is what was read from the data, written again: a field in one of both alone is unknown or missing.

    >>> check_fields({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]})
    Traceback (most recent call last):
    ...
    regrow.store.errors.StoreError: unknown field `c`; restore it
    """
    if isinstance(data, dict) and isinstance(written, dict):
        if (name := min(data.keys() ^ written.keys(), default=None)) is not None:
            raise StoreError(f"{'unknown' if name in data else 'missing required'} field `{name:.80}`; restore it")
        for name, value in data.items():
            check_fields(value, written[name])
    elif isinstance(data, list) and isinstance(written, list | tuple) and data and isinstance(data[0], dict | list):
        for value, other in zip(data, written, strict=True):
            check_fields(value, other)


def check_format(data: object, expected: str, where: str | Path, remedy: str = "run it again") -> None:
    """Raise StoreError unless the entry ``format`` of JSON data is ``expected``, such as ``"regrow-run/2"``.

    ``where``: the file's path for the error; ``remedy``: what the user can do instead of restoring it.
    """
    written = data.get("format") if isinstance(data, Mapping) else None
    if written != expected:
        raise StoreError(
            f"{where} has the format {written!s:.40}, this version of regrow reads {expected}; restore it, or {remedy}"
        )


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the data of a JSON file that may be hostile, or ``None`` if missing; StoreError if invalid or too long."""
    try:
        return limits.read_json(path, max_bytes) if path.exists() else None
    except InputError as error:
        raise StoreError(str(error)) from None


def replace_nonfinite(value: Any) -> Any:
    """Return a copy of JSON data with null for NaN and infinity, which JSON lacks, string keys, and lists for tuples.

    >>> replace_nonfinite({"loss": float("nan"), "steps": (1, 2)})
    {'loss': None, 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Unit numbers of plans are written as intervals, so that a wide layer takes as much room as a narrow one.
_UNIT_FIELDS = ("keep", "ids", "restore")
# How many unit numbers the intervals of any file may expand to, and how many more for each of its bytes.
_FREE_UNITS, _UNITS_PER_BYTE = 2**21, 100
_BYTES_PER_UNIT = 150  # bytes of memory that each unit number takes while a plan is read


def to_intervals(numbers: Sequence[Any]) -> list[Any]:
    """Return whole numbers with runs of three or more in a row as ``[first, last]``; lists of other things as they are.

    >>> to_intervals([0, 1, 2, 3, 7, 8, 11])
    [[0, 3], 7, 8, 11]
    """
    if any(type(number) is not int or number < 0 for number in numbers):
        return list(numbers)
    result: list[int | list[int]] = []
    for _, row in groupby(enumerate(numbers), key=lambda entry: entry[1] - entry[0]):
        part = [number for _, number in row]
        result += [[part[0], part[-1]]] if len(part) > 2 else part
    return result


def from_intervals(entries: Sequence[Any]) -> list[Any]:
    """Expand intervals ``[first, last]`` into numbers, the inverse of :func:`to_intervals`; other entries stay.

    >>> from_intervals([[0, 3], 7, 8, 11])
    [0, 1, 2, 3, 7, 8, 11]
    """
    result: list[Any] = []
    for entry in entries:
        result += range(entry[0], entry[1] + 1) if _interval_length(entry) else [entry]
    return result


def shorten_plan(plan: Any) -> Any:
    """Write the lists of unit numbers in a plan (JSON data) as :func:`to_intervals`, in place, and return the plan."""
    for change, name in _unit_lists(plan):
        change[name] = to_intervals(change[name])
    return plan


def expand_plans(plans: list[Any], length: int) -> list[Any]:
    """Undo :func:`shorten_plan` in the plans of a ledger, in place, and return them.

    ``length``: the size of the ledger's file in bytes. Raises StoreError if intervals name more units than a file of
    this size should, and ResourceError if the memory does not suffice for them.
    """
    lists = [row for plan in plans for row in _unit_lists(plan)]
    numbers = sum(_interval_length(entry) for change, name in lists for entry in change[name])
    if numbers > _FREE_UNITS + _UNITS_PER_BYTE * length:
        raise StoreError(f"its intervals name {numbers:,} units, which is no plan of a network; restore it")
    check_memory(_BYTES_PER_UNIT * numbers, f"a ledger that names {numbers:,} units", "read it on a larger machine")
    for change, name in lists:
        change[name] = from_intervals(change[name])
    return plans


def _unit_lists(plan: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (change, field) so that ``change[field]`` is each list of unit numbers; none if ``plan`` is no plan."""
    changes = plan.get("changes") if isinstance(plan, dict) else None
    for change in changes.values() if isinstance(changes, dict) else ():
        if isinstance(change, dict):
            yield from ((change, name) for name in _UNIT_FIELDS if isinstance(change.get(name), list))


def _interval_length(entry: Any) -> int:
    """Return how many numbers an interval expands to; 0 for anything that is not an interval."""
    match entry:
        case [int(first), int(last)] if type(first) is type(last) is int and 0 <= first <= last:
            return last - first + 1
    return 0
