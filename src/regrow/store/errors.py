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
    """Raise StoreError unless a path leads to a regular file, possibly through symbolic links."""
    try:
        check_regular(path)
    except InputError as error:
        raise StoreError(str(error)) from error


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Context manager: turns operating-system errors into a one-line StoreError that names ``path``, with a remedy."""
    try:
        yield
    except Exception as error:
        number = _find_errno(error)
        if number is None and not isinstance(error, OSError):
            raise
        # The command line chooses its exit code by the number of the cause, which may stand in the text alone.
        complete = number is None or (isinstance(error, OSError) and error.errno is not None)
        cause = error if complete else OSError(number, os.strerror(number or 0))
        raise StoreError(f"{path}: {_explain_errno(error)}") from cause


def _find_errno(error: Exception) -> int | None:
    """Return the operating system's error number of an exception, or ``None`` if it has none."""
    if isinstance(error, OSError):
        # numpy reports a short write as "16 requested and 0 written", without a number.
        return error.errno or (errno.ENOSPC if re.search(r"requested and \d+ written", str(error)) else None)
    match = re.search(r"\(os error (\d+)\)", str(error))  # of libraries in Rust: safetensors, tokenizers
    return int(match[1]) if match and not isinstance(error, StoreError) else None


def _explain_errno(error: Exception) -> str:
    """Return what an operating-system error of writing means for the user, and the remedy, in one line."""
    number = _find_errno(error)
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space or choose another folder, and run again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "may not be written; choose a folder that is yours"
        case errno.ENOENT:
            return "its folder does not exist; create it first"
    why = os.strerror(number) if number else " ".join(str(error).split())[:200]
    return f"cannot be written ({why}); choose another folder"
