"""Files with weights that are read more than once: what each was when it was opened, and whether it still is that."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from regrow.core.errors import InputError
from regrow.core.limits import reason

_SUFFIXES = (".safetensors", ".gguf")


class WeightFile:
    """A file as it was when it was opened: its size, times and inode, and its digest where one is recorded.

    Args:
        path: The file.
        sha256: Its recorded digest; empty if there is none.
        handle: The descriptor of the open file; ``None``: the file that the path leads to now.
        held: Whether its content stays with the reader (in memory, or mapped) when another file takes its place.

    Raises:
        InputError: If there is no such file.
    """

    def __init__(self, path: Path, sha256: str = "", handle: int | None = None, *, held: bool = False) -> None:
        self.path, self.sha256, self.held = path, sha256, held
        self.status = self._read(handle)

    def check(self, handle: int | None = None) -> None:
        """Raise InputError unless the file is the one that was opened, unchanged.

        A file with a recorded digest that it still has was touched, linked or copied, not changed.

        Args:
            handle: The descriptor of the open file; ``None``: the file that the path leads to now.

        Raises:
            InputError: If another file has taken its place, or it was written to.
        """
        if (now := self._read(handle)) == self.status:
            return
        if self.sha256 and now[2] == self.status[2]:
            with self.path.open("rb") as file:
                if self._read(file.fileno()) == now and hashlib.file_digest(file, "sha256").hexdigest() == self.sha256:
                    self.status = now
                    return
        raise InputError(f"{self.path} was replaced or written to while it was in use; nothing is saved, start again")

    def unchanged_since(self, status: tuple[int, ...], handle: int) -> bool:
        """Whether the open file has the given status still, so that what was read meanwhile is of one version.

        Args:
            status: An earlier :attr:`status`.
            handle: The descriptor of the open file.
        """
        return self._read(handle) == status

    @property
    def record(self) -> dict[str, int]:
        """What tells a later process whether the file is the same, as JSON data; times in nanoseconds."""
        return dict(zip(("inode", "bytes", "modified", "changed"), self.status[1:], strict=True))

    def leads_to_it(self) -> bool:
        """Whether the path still leads to the file that was opened."""
        try:
            return self._read(None)[:2] == self.status[:2]
        except InputError:
            return False

    def _read(self, handle: int | None) -> tuple[int, ...]:
        try:
            now = os.stat(self.path) if handle is None else os.fstat(handle)  # noqa: PTH116 (alike for both)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read any more ({reason(error)}); put it back") from None
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def find_weight_files(path: Path) -> tuple[WeightFile, ...]:
    """Return the files with weights of a model that is loaded whole.

    Args:
        path: Its folder, or the file itself.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple(WeightFile(one, held=True) for one in files if one.suffix in _SUFFIXES and one.is_file())


def check_unchanged(files: Iterable[WeightFile]) -> None:
    """Raise InputError if a file was changed while it was in use.

    Args:
        files: The files; one whose content is held may be gone, or another may have taken its place.

    Raises:
        InputError: Names the first that was changed.
    """
    for one in files:
        if not one.held or one.leads_to_it():
            one.check()
