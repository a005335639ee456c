"""Files that are there whole or not at all: a temporary file beside the old one, synced, then renamed over it."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
"""What unfinished files and folders are called; one that a killed process left behind can be deleted."""


class StoreError(ValueError):
    """A folder or file that cannot be written, read or trusted; one line that names the value and the remedy."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place to write a new file to, which takes the name ``path`` once the block ends without an error.

    Args:
        path: The file to make or replace; its folder must exist.

    Returns:
        The name of a temporary file in the same folder. If the block fails it is removed, and the old file stands.

    Raises:
        StoreError: If the disk is full or does not let us write.
    """
    path = Path(path)
    with telling(path):
        temporary = partial(path)
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = temporary.stat().st_mode
            yield temporary
            # A library may have put a file of its own in this place, private to its user.
            temporary.chmod(mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Args:
        path: The file to make or replace; its folder must exist.
        data: What it holds afterwards.

    Raises:
        StoreError: If the disk is full or does not let us write; the old file stands.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_bytes(path, b"whole")
    >>> path.read_bytes(), len(list(path.parent.iterdir()))
    (b'whole', 1)
    """
    with written(path) as temporary, temporary.open("wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[os.write(file.fileno(), left) :]


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Args:
        path: The file to make or replace; its folder must exist.
        text: What it holds afterwards.

    Raises:
        StoreError: If the disk is full or does not let us write; the old file stands.
    """
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing ``path`` into one line with a remedy.

    Raises:
        StoreError: Instead of an ``OSError``, or of the error of a library that met one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: {_explained(error)}") from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    # Windows cannot open a folder; a rename there is durable in its own time.
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial(path: Path) -> Path:
    """A new name, beside ``path``, for something that is not finished."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _explained(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full, so nothing was changed; free some space or choose another folder, and run again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "may not be written; choose a folder that is yours"
        case errno.ENOENT:
            return "its folder does not exist; create it first"
    why = os.strerror(number) if number else " ".join(str(error).split())[:200]
    return f"cannot be written ({why}); choose another folder"
