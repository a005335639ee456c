"""``metrics.jsonl``: the measurements of a run; each has a key, so that a resumed run adds none a second time."""

import contextlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from regrow.core.errors import InputError
from regrow.core.limits import parse_json
from regrow.store import schemas
from regrow.store.atomic import write_all, write_bytes
from regrow.store.convert import convert
from regrow.store.errors import StoreError, check_readable, explain_os_errors
from regrow.store.measurements import KINDS


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append a line of JSON and flush it to the disk; if that fails, truncate the file to its former end."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with _opened(path) as handle:
        end = _repair_end(handle)
        try:
            os.lseek(handle, end, os.SEEK_SET)
            write_all(handle, line.encode())
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, end)
            raise


def mend(path: Path) -> None:
    """Remove a last line that a crash cut short; add the newline if only that is missing."""
    if os.path.lexists(path):
        with _opened(path) as handle:
            _repair_end(handle)


def read(path: Path, kinds: Mapping[str, type[object]] | None = None) -> list[dict[str, Any]]:
    """Read all rows in order; a last line that a crash cut short is left out."""
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file for changes in place, so that no other name of the file is affected.

    A symbolic link is refused. A file with a second name (a hard link), as a killed process may leave it, is copied
    first.
    """
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):  # opening a device or FIFO must not wait
        flags |= getattr(os, name, 0)
    with explain_os_errors(path):
        if path.is_symlink():
            raise StoreError(f"{path} is a symbolic link, and the file it leads to is not changed; delete the link")
        if path.exists() and not path.is_file():
            raise StoreError(f"{path} is not a regular file; delete it")
        if path.exists() and path.stat().st_nlink > 1:
            write_bytes(path, path.read_bytes())
        handle = os.open(path, flags, 0o666)
        try:
            opened = os.fstat(handle)  # another one may have taken its place since
            if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
                raise StoreError(f"{path} was exchanged while it was opened; run this again")
            yield handle
        finally:
            os.close(handle)


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


KEYS: Mapping[str, tuple[str, ...]] = {
    "budget": (),
    "choice": ("model", "task", "round"),
    "epoch": ("epoch",),
    "found": (),
    "front": ("epoch",),
    "gone": ("tasks",),
    "latency": (),
    "levels": (),
    "matrix": ("tasks",),
    "paired": ("source", "of", "round"),
    "perplexity": ("model", "source", "round"),
    "reconstruction": (),
    "recovery": ("round",),
    "result": (),
    "size": ("model", "round"),
    "stages": (),
    "training": (),
    "task": ("task",),
    "test": (),
    "verify": (),
}
"""Kind of measurement → the fields that, with the kind, identify a row of a run."""
NUMBERED = frozenset({"commit", "growth", "memory"})
"""Kinds whose rows are identified by their number: the first, the second."""


class Metrics:
    """The rows of a ``metrics.jsonl`` file, read and appended.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Return every row, in order; a last line that a crash truncated is left out."""
        return read(self.path, KINDS)

    def add(self, row: Mapping[str, object], number: int | None = None) -> bool:
        """Append a row, unless one with its key is there, and say whether; it is on the disk when this returns."""
        plain = replace_nonfinite(row)
        key = _key(plain, number)
        if new := key is None or key not in self._keys:
            append(self.path, plain)
            if key is not None:
                self._keys.add(key)
        return new

    @cached_property
    def _keys(self) -> set[str]:
        mend(self.path)
        counts: Counter[Any] = Counter()
        keys = set()
        for row in read(self.path):
            keys.add(_key(row, counts[str(row.get("what"))]))
            counts[str(row.get("what"))] += 1
        return {key for key in keys if key is not None}


def replace_nonfinite(value: Any) -> Any:
    """Return JSON data in which NaN and infinity, which JSON does not have, are replaced by null.

    >>> replace_nonfinite({"loss": float("nan"), "steps": (1, 2)})
    {'loss': None, 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): replace_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _key(row: Mapping[str, object], number: int | None) -> str | None:
    """Return the key that identifies a row; ``None`` for kinds that may repeat."""
    what = str(row.get("what"))
    if what in NUMBERED and number is not None:
        return json.dumps([what, number])
    if what not in KEYS:
        return None
    return json.dumps([what, *(row.get(name) for name in KEYS[what])])
