"""Copies of folders that share no file with the original, and are compared with recorded digests before they are used.

Where the file system can, a copy shares its blocks with the original until one of both is written to (a reflink).
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from regrow.core.limits import check_regular, reason
from regrow.store.atomic import LEFTOVER
from regrow.store.errors import StoreError, check_readable
from regrow.store.outputs import PAGE
from regrow.store.replacing import WORK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CLONE = 0x40049409
"""The request FICLONE of Linux: share the blocks of another file."""


def copy_folder(source: Path, target: Path, *, skip: Collection[str] = (), link: bool = False) -> None:
    """Copy the regular files of a folder; unfinished files, and links that lead out, are left out."""
    for path in sorted(source.iterdir()):
        name = path.name
        if name in skip or name == WORK or LEFTOVER.fullmatch(name) or _leads_out(path):
            continue
        if path.is_dir():
            (target / name).mkdir()
            copy_folder(path, target / name, skip=skip, link=link)
            continue
        check_readable(path)
        if not (link and path.lstat().st_nlink == 1 and not path.is_symlink() and _link(path, target / name)):
            _copy(path, target / name)


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return path in a folder → ``bytes`` and ``sha256`` of every file in it but pages, as JSON data."""
    return {path.relative_to(folder).as_posix(): _measure(path) for path in _files(folder) if path.name != PAGE}


def check_files(folder: Path, recorded: Mapping[str, Mapping[str, Any]], shown: Path) -> None:
    """Raise StoreError unless a folder holds the recorded files and no others but pages, which are made from them."""
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder) if path.name != PAGE}
    for name, expected in recorded.items():
        if name not in there:
            try:
                check_regular(shown / name)
                why = "is a link"
            except ValueError as error:
                why = str(error).removeprefix(f"{shown / name} ").partition("; ")[0]
            raise StoreError(f"{shown / name} {why}; put the file of the run there again")
        size = there[name].stat().st_size
        if size != expected["bytes"] or _measure(there[name]) != expected:
            state = "truncated" if size < expected["bytes"] else "damaged or was changed"
            raise StoreError(f"{shown / name} is {state}: it does not have the recorded SHA-256; copy it again")
    if other := min(there.keys() - recorded.keys(), default=None):
        raise StoreError(f"{shown / other} is no file of the run; move it elsewhere")


def count_bytes(folder: Path) -> int:
    """Return how many bytes a copy of a folder takes."""
    return sum(path.stat().st_size for path in _files(folder))


def shares_blocks(source: Path, folder: Path) -> bool:
    """Whether a copy of a file would take no room on the disk, since it shares the blocks of the original."""
    try:
        with source.open("rb") as file, tempfile.TemporaryFile(dir=folder) as copy:
            return _clone(file, copy)
    except OSError:
        return False


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files in a folder and in those in it, without links and unfinished work, by name."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name == WORK or LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _leads_out(path: Path) -> bool:
    """Whether a path is a link to anything but a file beside it."""
    return path.is_symlink() and not (path.is_file() and path.resolve().parent == path.parent.resolve())


def _measure(path: Path) -> dict[str, Any]:
    check_readable(path)
    try:
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({reason(error)}); copy it again") from None


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("xb") as copy:
        if not _clone(file, copy):
            shutil.copyfileobj(file, copy, 2**22)
    shutil.copystat(source, target)


def _clone(source: BinaryIO, target: Any) -> bool:
    """Let an empty file share the blocks of another one; ``False`` where the file system cannot."""
    if fcntl is None:
        return False
    try:
        fcntl.ioctl(target.fileno(), _CLONE, source.fileno())
    except OSError:
        return False
    return True


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        return False
    return True
