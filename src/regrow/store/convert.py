"""Validate JSON data strictly: errors name the file, field, value and remedy in one line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from regrow.core import limits
from regrow.core.errors import InputError
from regrow.core.limits import MAX_JSON_BYTES
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
