"""Output files that a user names: which existing files they may replace, and how text is written to them.

A symbolic link is followed: its target is replaced as a whole, and the link stays. A character device, a FIFO and the
standard output are written to directly; formats that are read back need a regular file. An existing file is replaced
only if its suffix is one of the output's and if it is not part of a run folder or model folder.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from regrow.store.atomic import write_text
from regrow.store.errors import StoreError, check_readable, explain_os_errors

JSON = (".json",)
PAGES = (".html", ".htm")
PAGE = "report.html"
"""The report page of a run, which may be written again in its run folder."""
_RECORDS = ("run.json", "shapes.json", "config.json")
"""A folder that holds one of these files is a run folder or a model folder."""


def check_output(
    path: Path, suffixes: Sequence[str], inputs: Iterable[str | Path] = (), *, streams: bool = False
) -> Path:
    """Raise StoreError unless an output file may be created or replaced; nothing is opened or changed.

    Returns:
        The file to write: ``path``, or the target if it is a symbolic link.
    """
    target = Path(os.path.realpath(path))
    with explain_os_errors(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise StoreError(f"{path}: there is no folder {target.parent}; make it, or choose another") from None
            return target
    if _is_stream(status):
        if streams:
            return path
        raise StoreError(f"{path} is a device, a FIFO or the standard output; name a regular file")
    if not stat.S_ISREG(status.st_mode):
        check_readable(path)
    if any(_is_same(status, one) for one in inputs):
        raise StoreError(f"{path} is an input of this command; name another output file")
    if target.suffix.lower() not in suffixes:
        raise StoreError(f"{path} exists and is not a {suffixes[0]} file; name a new file")
    if target.name != PAGE and any((target.parent / name).exists() for name in _RECORDS):
        raise StoreError(f"{path} is part of a run folder or model folder; name a new file, or one in another folder")
    return target


def write_output(path: Path, text: str, suffixes: Sequence[str]) -> None:
    """Write text in UTF-8 to a file that the user names: atomically, or directly if it is a stream."""
    target = check_output(path, suffixes, streams=True)
    with explain_os_errors(path):
        status = path.stat() if path.exists() else None
    if status is None or not _is_stream(status):
        write_text(target, text)
        return
    with explain_os_errors(path):
        descriptor = _descriptor(status)
        try:
            # A FIFO that no process reads is refused instead of waited for.
            flags = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
            handle = os.open(path, flags) if descriptor is None else os.dup(descriptor)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise StoreError(f"{path} is a FIFO that no process reads; start its reader first") from None
        os.set_blocking(handle, True)
        with open(handle, "wb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
            left = memoryview(text.encode("utf-8"))
            while left:
                left = left[file.write(left) :]


def _is_stream(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode) or _descriptor(status) is not None


def _descriptor(status: os.stat_result) -> int | None:
    """Return the descriptor of standard output or error if a file is the same one, else ``None``."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(number)):
                return number
    return None


def _is_same(status: os.stat_result, name: str | Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.path.samestat(status, os.stat(name))  # noqa: PTH116 (any text, such as the name of a model)
    return False
