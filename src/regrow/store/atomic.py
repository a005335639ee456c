"""Atomic file writes: a file is made in a temporary folder beside the old one, synced, then renamed over it.

Unfinished files lie in a folder ``.NAME.<hex>.partial`` that the writing process has locked. If the process is killed,
the next command that writes ``NAME`` finds the folder unlocked and deletes it.

Of output files that a user names, a symbolic link is followed: its target is replaced as a whole. An existing file is
replaced only if its suffix is one of the output's and if it is not part of a run folder or model folder.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from regrow.store.errors import StoreError, check_readable, explain_os_errors


class LockedError(StoreError):
    """Raised if another process holds the lock of a folder, since it is writing there."""


class FolderLock:
    """An exclusive lock on a folder, made by :func:`lock`, held until it is released or the process ends.

    ``handle``: the descriptor of the open folder, closed at the release; ``None``: the file system has no locks, and
    nothing is locked. A ``with`` block releases the lock at its end.
    """

    def __init__(self, handle: int | None) -> None:
        self.handle = handle

    def release(self) -> None:
        """Release the lock; releasing it twice is no error."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def lock(folder: Path) -> FolderLock:
    """Lock an existing folder exclusively, without waiting; raise LockedError if another process holds its lock.

    Raises OSError if it cannot be opened. On a file system without locks, the result locks nothing.
    """
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise LockedError(
                f"{folder} is being written by another process; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
            return FolderLock(None)
        try:
            # Between opening and locking, the folder may have been exchanged for another one, or deleted.
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return FolderLock(handle)
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


# Pattern of the names of unfinished files and folders, and of replaced folders that are being deleted.
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(partial|old)")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager: yields an empty temporary file's path; the file replaces ``path`` if the block succeeds.

    The folder of ``path`` must exist. Raises StoreError instead of OSError, for errors in the block too.
    """
    path = Path(path)
    with explain_os_errors(path), stage_folder(path) as stage:
        temporary = stage / path.name
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        # A library may have put a file of its own in this place, private to its user.
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes to a file, which need not exist; it has all of the new content or, after StoreError, all of the old.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_bytes(path, b"whole")
    >>> path.read_bytes(), len(list(path.parent.iterdir()))
    (b'whole', 1)
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8 to a file, as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk (fsync); raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def stage_folder(path: Path) -> Iterator[Path]:
    """Context manager: yields a new, locked folder beside ``path`` for unfinished files; it is deleted at the end.

    ``path``: the file or folder that is being made; it need not exist, the folder around it must. What killed processes
    left beside it is deleted first.
    """
    sweep(path)
    while True:
        stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        stage.mkdir()
        with contextlib.suppress(LockedError, FileNotFoundError):  # another process took it for a leftover: try again
            owner = lock(stage)
            break
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        owner.release()


def find_leftovers(path: Path) -> list[Path]:
    """Return the temporary folders beside ``path`` with new or replaced files of it, sorted; also those in use."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    entries = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(
        entry for entry in entries if name.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
    )


def sweep(path: Path) -> None:
    """Delete what :func:`find_leftovers` returns, except what a live process has locked or, without locks, may use."""
    for leftover in find_leftovers(path):
        with contextlib.suppress(LockedError, FileNotFoundError), lock(leftover) as owner:
            if owner.handle is not None:  # without locks, a live process may own it
                shutil.rmtree(leftover, ignore_errors=True)


JSON = (".json",)  # suffixes of JSON files that a user names
PAGES = (".html", ".htm")  # suffixes of report pages that a user names
PAGE = "report.html"  # the report page of a run, which may be written again in its run folder
# A folder that holds one of these files is a run folder or a model folder.
_RECORDS = ("run.json", "shapes.json", "config.json")


def check_output(path: Path, suffixes: Sequence[str], inputs: Iterable[str | Path] = ()) -> Path:
    """Return ``path`` with symbolic links followed; raise StoreError if no output file may be written there.

    ``suffixes``: what the name of an existing file may end in, such as ``(".html", ".htm")``; the error names the first
    one. ``inputs``: files that the command reads, which it may not replace; names of models among them do no harm.
    Nothing is opened or changed.
    """
    target = Path(os.path.realpath(path))
    with explain_os_errors(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            if not target.parent.is_dir():
                raise StoreError(f"{path}: there is no folder {target.parent}; make it, or choose another") from None
            return target
    if not stat.S_ISREG(status.st_mode):
        check_readable(path)  # raises: the path is a folder, device or pipe
    if any(_is_same_file(status, file) for file in inputs):
        raise StoreError(f"{path} is an input of this command; name another output file")
    if target.suffix.lower() not in suffixes:
        raise StoreError(f"{path} exists and is not a {suffixes[0]} file; name a new file")
    if target.name != PAGE and any((target.parent / name).exists() for name in _RECORDS):
        raise StoreError(f"{path} is part of a run folder or model folder; name a new file, or one in another folder")
    return target


def write_output(path: Path, text: str, suffixes: Sequence[str]) -> None:
    """Write text in UTF-8 atomically to a file that the user names, if :func:`check_output` allows it."""
    write_text(check_output(path, suffixes), text)


def _is_same_file(status: os.stat_result, name: str | Path) -> bool:
    """Whether ``name`` is a path to the file with this ``os.stat`` result; ``False`` if there is no such path."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samestat(status, os.stat(name))  # noqa: PTH116 (any text)
    return False
