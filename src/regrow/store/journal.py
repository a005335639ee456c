"""An append-only file of JSON lines that survives a crash in the middle of a write."""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.errors import InputError
from regrow.limits import parse_json
from regrow.store import schemas
from regrow.store.atomic import write_bytes
from regrow.store.convert import convert
from regrow.store.errors import StoreError, check_readable, explain_os_errors


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append a line of JSON and flush it to the disk.

    Args:
        path: The file; it need not exist yet.
        row: JSON data without NaN and infinity.

    Raises:
        StoreError: If it is not a regular file, or the disk is full; the file is then unchanged.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with explain_os_errors(path):
        handle = _open(path)
        try:
            _append(handle, line.encode())
        finally:
            os.close(handle)


def mend(path: Path) -> None:
    """Remove a last line that a crash cut short; add the newline if only that is missing.

    Args:
        path: The file; it need not exist.

    Raises:
        StoreError: If it is not a regular file, or write permission is missing.
    """
    if not os.path.lexists(path):
        return
    with explain_os_errors(path):
        handle = _open(path)
        try:
            _repair_end(handle)
        finally:
            os.close(handle)


def read(path: Path, kinds: Mapping[str, type[object]] | None = None) -> list[dict[str, Any]]:
    """Read all rows in order; a last line that a crash cut short is left out.

    Args:
        path: The file; it need not exist.
        kinds: Kind of row (its ``what``) → the type that the row must fit; rows of other kinds may hold anything.

    Raises:
        StoreError: If another line is damaged, or a row does not fit; names the line and the field.
    """
    if not path.is_file():
        return []
    check_readable(path)
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            if kinds and (kind := kinds.get(row["what"])):
                convert(row, kind, f"{path}: line {number}", "restore it or delete that line")
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise StoreError(f"{path}: line {number} is not a measurement; restore it or delete that line")
    return rows


def _open(path: Path) -> int:
    """Open a file for changes in place, so that no other name of the file is affected.

    A symbolic link is refused. A file with a second name (a hard link), as a killed process may leave it, is copied
    first.
    """
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):  # opening a device or FIFO must not wait
        flags |= getattr(os, name, 0)
    while True:
        if path.is_symlink():
            raise StoreError(f"{path} is a symbolic link, and the file it leads to is not changed; delete the link")
        try:
            handle = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise _irregular(path) from None
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return handle
        os.close(handle)
        if not stat.S_ISREG(status.st_mode):
            raise _irregular(path)
        write_bytes(path, path.read_bytes())


def _irregular(path: Path) -> StoreError:
    return StoreError(f"{path} is not a regular file; delete it")


def _append(handle: int, line: bytes) -> None:
    """Write a line at the end of a file; if that fails, truncate the file to its former end."""
    end = _repair_end(handle)
    try:
        os.lseek(handle, end, os.SEEK_SET)
        left = memoryview(line)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, end)
        raise


def _repair_end(handle: int) -> int:
    """Repair the end of a file and return where the next line begins."""
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
        row = parse_json(line)
        convert(row, schemas.MetricsRow)
    except (ValueError, InputError):
        return None
    return row if isinstance(row, dict) else None
