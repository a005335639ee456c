"""Errors of reading and writing files, each one line with a remedy."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from regrow.core.errors import InputError
from regrow.core.limits import check_regular


class StoreError(ValueError):
    """Raised if a folder or file cannot be written, read or trusted; one line with the value and the remedy."""


def check_readable(path: Path) -> None:
    """Raise StoreError unless a path names a regular file that may be read."""
    try:
        check_regular(path)
    except InputError as error:
        raise StoreError(str(error)) from error


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn operating-system errors in the block into a one-line StoreError with a remedy."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None and not isinstance(error, OSError):
            raise
        known = number is None or (isinstance(error, OSError) and error.errno is not None)
        cause = error if known else OSError(number, os.strerror(number or 0))
        raise StoreError(f"{path}: {_explain(error)}") from cause


def _number(error: Exception) -> int | None:
    """Return the operating system's error number of an exception, or ``None`` if it has none."""
    if isinstance(error, OSError):
        # numpy tells a short write as "16 requested and 0 written", without a number.
        return error.errno or (errno.ENOSPC if re.search(r"requested and \d+ written", str(error)) else None)
    fit = re.search(r"\(os error (\d+)\)", str(error))
    return int(fit[1]) if fit and not isinstance(error, StoreError) else None


def _explain(error: Exception) -> str:
    number = _number(error)
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space or choose another folder, and run again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "may not be written; choose a folder that is yours"
        case errno.ENOENT:
            return "its folder does not exist; create it first"
    why = os.strerror(number) if number else " ".join(str(error).split())[:200]
    return f"cannot be written ({why}); choose another folder"
