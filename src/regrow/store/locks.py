"""One exclusive lock per folder, held by the process that writes there, and released when it ends.

The lock is on the folder itself (``flock``), so there is no lock file that could be left over. Readers need none. Where
the file system or the operating system has no such locks (Windows, some network drives), nothing is locked.
"""

import os
from pathlib import Path
from types import TracebackType

from regrow.store.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LockedError(StoreError):
    """Raised if another process is writing to the folder."""


class Lock:
    """An exclusive lock on a folder, held until it is released or the process ends.

    Args:
        folder: The folder.
        handle: The file descriptor of the open folder; ``None`` if nothing can be locked.
        sure: Whether the folder is really locked (the file system supports locks).
    """

    def __init__(self, folder: Path, handle: int | None, *, sure: bool) -> None:
        self.folder, self.handle, self.sure = folder, handle, sure

    def release(self) -> None:
        """Release the lock; releasing it twice is no error."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def lock(folder: Path) -> Lock:
    """Lock a folder exclusively, or raise LockedError if another process holds its lock."""
    while True:
        if fcntl is None:
            return Lock(folder, None, sure=False)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise LockedError(
                f"{folder} is being written by another process{holder}; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(handle)
            return Lock(folder, None, sure=False)
        try:
            # Between opening and locking, the folder may have been exchanged for another one, or deleted.
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return Lock(folder, handle, sure=True)
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _holder(handle: int) -> str:
    """Return `` (process N)`` for the process that has locked an open folder; empty if it is not known."""
    place = os.fstat(handle)
    wanted = f"{os.major(place.st_dev):02x}:{os.minor(place.st_dev):02x}:{place.st_ino}"
    try:
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            parts = line.split()
            if len(parts) > 5 and parts[1] == "FLOCK" and parts[5] == wanted and int(parts[4]) > 0:
                return f" (process {parts[4]})"
    except (OSError, ValueError):
        pass
    return ""
