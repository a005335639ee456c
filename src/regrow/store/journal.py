"""An append-only file of JSON objects, one a line, that survives being cut off in the middle of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.errors import InputError
from regrow.limits import parse_json
from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError, check_readable, telling


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line; it is on the disk when this returns.

    Args:
        path: The file; it need not exist yet.
        row: JSON data without NaN and infinity.

    Raises:
        StoreError: If the disk is full; the file then holds what it held.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with telling(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _append(handle, line.encode())
        finally:
            os.close(handle)


def mend(path: Path) -> None:
    """Take off a last line that a crash cut short; one that lacks only its end gets it.

    Raises:
        StoreError: If the disk does not let us write.
    """
    if not path.is_file():
        return
    with telling(path):
        handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            _mended(handle)
        finally:
            os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """Every line, in order; a last one that a crash cut short is left out.

    Raises:
        StoreError: If another line is damaged.
    """
    if not path.is_file():
        return []
    check_readable(path)
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise StoreError(f"{path}: line {number} is not a measurement; restore it or delete that line")
    return rows


def _append(handle: int, line: bytes) -> None:
    """Write a line at the end of a file; if that fails, the file ends where it ended."""
    end = _mended(handle)
    try:
        os.lseek(handle, end, os.SEEK_SET)
        left = memoryview(line)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, end)
        raise


def _mended(handle: int) -> int:
    """Where the next line begins: a last line that a crash cut short is taken off, one that lacks its end gets it."""
    end = os.lseek(handle, 0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        start = max(0, start - 2**16)
        os.lseek(handle, start, os.SEEK_SET)
        tail = os.read(handle, end - start)
    last = tail.rpartition(b"\n")[2]
    if not last:
        return end
    if _row(last) is None:
        os.ftruncate(handle, end - len(last))
        return end - len(last)
    os.lseek(handle, end, os.SEEK_SET)
    return end + os.write(handle, b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = parse_json(line)
        convert(row, schemas.Row)
    except (ValueError, InputError):
        return None
    return row
