"""Replace whole folders atomically: the new folder is made beside the old one, and both exchange their names.

At every moment the name leads to the old folder or to the new one. Linux exchanges two names in one step
(``renameat2`` with ``RENAME_EXCHANGE``). Elsewhere there are two renames: the old folder moves into the temporary
folder as ``NAME.replaced``, then the new one takes its name. A process killed between the two leaves a temporary folder
from which :func:`settle` completes the replacement; every reader and writer of ``NAME`` calls it first.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from regrow.store.atomic import LEFTOVER, PAGE, FolderLock, LockedError, find_leftovers, lock, stage_folder, sweep, sync
from regrow.store.errors import StoreError, check_readable, explain_os_errors

WORK = ".work"  # name of the folder, inside a run folder, with the files of an unfinished run
_REPLACED = ".replaced"  # behind the name of a new folder: of the old one, between the two renames
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of linux/fs.h and fcntl.h
T = TypeVar("T")


@contextlib.contextmanager
def replace_folder(folder: Path, owner: FolderLock | None = None) -> Iterator[Path]:
    """Context manager: yields a new, empty folder that replaces ``folder`` as a whole if the block succeeds.

    ``folder`` need not exist; nothing of an old one stays. ``owner``: the caller's lock on it; ``None``: an existing
    folder is locked here. Raises StoreError if it cannot be replaced, and LockedError if another process writes to it.
    """
    target = folder.resolve()
    check_replaceable(folder)
    with explain_os_errors(folder), contextlib.ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(target)
        if owner is None and target.is_dir():
            stack.enter_context(lock(target))
        stage = stack.enter_context(stage_folder(target))
        new = stage / target.name
        new.mkdir()
        stack.enter_context(lock(new))
        yield new
        if target.is_dir():
            shutil.copymode(target, new)
        _sync_tree(new)
        _exchange(new, target)
        sync(target.parent)
        old = stage.with_suffix(".old")  # says that only this is to be deleted
        stage.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise StoreError unless a folder can be created or replaced as a whole: no file, mount or current folder."""
    target = folder.resolve()
    if target.exists() and not target.is_dir():
        raise StoreError(f"{folder} is a file; name a folder that does not exist yet")
    with contextlib.suppress(FileNotFoundError):
        if target in (here := Path.cwd(), *here.parents):
            raise StoreError(f"{folder} is the current folder or around it; name a folder of its own: {folder / 'out'}")
    if target.is_mount():
        raise StoreError(f"{folder} is a mount point, which cannot be replaced; name a folder in it: {folder / 'out'}")
    for path in (target.parent, target):
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            raise StoreError(f"{path} may not be written; choose a folder that is yours") from denied


def settle(folder: Path) -> None:
    """Complete a replacement of ``folder`` by its last rename if a process was killed before it; else do nothing."""
    target = folder.resolve()
    for stage in [] if target.exists() else find_leftovers(target):
        new = stage / target.name
        if Path(f"{new}{_REPLACED}").is_dir() and new.is_dir():
            with contextlib.suppress(OSError):  # another reader did it
                new.rename(target)


def clear_leftovers(folder: Path) -> None:
    """Complete a replacement of ``folder`` that a killed process left half done; delete its temporary folders."""
    settle(folder)
    sweep(folder.resolve())


def link_tree(source: Path, target: Path, skip: Collection[str] = ()) -> None:
    """Hard-link all files of ``source``, at any depth, into ``target``; copy them where links are not supported.

    ``target`` must exist; files in it stay. Temporary folders of unfinished work are left out, and so are files and
    folders directly in ``source`` that ``skip`` names.
    """
    for path in sorted(source.iterdir()):
        copied = target / path.name
        if path.name in skip or LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            copied.mkdir(exist_ok=True)
            link_tree(path, copied)
        elif not copied.exists() and not _try_link(path, copied):
            shutil.copy2(path, copied, follow_symlinks=False)


def read_whole(folder: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` returns from files of ``folder``, all of one version.

    It is called again, and an error of it ignored, if the folder was replaced while it ran.
    """
    while True:
        settle(folder)
        before = _identity(folder)
        try:
            result = read()
        except (ValueError, OSError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return result


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return (device, inode) of a folder, by which one that replaces it differs; ``None`` if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _exchange(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; an existing one takes the name of ``new`` (plus ``.replaced`` if not atomically).

    Raises LockedError if another process made a target that was not there.
    """
    if not target.exists():
        try:
            new.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise LockedError(f"{target} was made by another process meanwhile; choose another folder") from None
        return
    if _exchange_atomically(new, target):
        return
    target.rename(f"{new}{_REPLACED}")
    try:
        new.rename(target)
    except FileNotFoundError:  # settle() in another process has renamed it
        if not target.is_dir():
            raise


def _exchange_atomically(new: Path, target: Path) -> bool:
    """Exchange the names of two folders atomically; ``False``: it is not supported, and nothing was done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(target))


def _sync_tree(folder: Path) -> None:
    """Flush a folder and all files in it to the disk."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _sync_tree(path)
        elif path.is_file():
            sync(path)
    sync(folder)


def copy_folder(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy the files of ``source``, at any depth, into ``target``, which must exist and be empty.

    Unfinished work, and symbolic links that lead elsewhere than to a file beside them, are left out. ``link``: files
    without another hard link are hard-linked instead.
    """
    for path in sorted(source.iterdir()):
        name = path.name
        leads_out = path.is_symlink() and not (path.is_file() and path.resolve().parent == path.parent.resolve())
        if name == WORK or LEFTOVER.fullmatch(name) or leads_out:
            continue
        if path.is_dir():
            (target / name).mkdir()
            copy_folder(path, target / name, link=link)
            continue
        check_readable(path)
        linkable = link and path.lstat().st_nlink == 1 and not path.is_symlink()
        if not (linkable and _try_link(path, target / name)):
            shutil.copy2(path, target / name)


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return path in ``folder`` → ``{"bytes": …, "sha256": …}``, for every file at any depth but ``report.html``."""
    records: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        if path.name != PAGE:
            check_readable(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            records[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return records


def check_recorded_files(folder: Path, recorded: Mapping[str, Mapping[str, Any]], shown: Path) -> None:
    """Raise StoreError unless a folder holds the ``recorded`` files, unchanged, and no others but ``report.html``.

    ``recorded``: what :func:`record_files` returned; ``shown``: the folder's path in errors.
    """
    present = record_files(folder)
    for name, expected in recorded.items():
        if name not in present:
            raise StoreError(f"{shown / name} is missing or a link; put the file of the run there again")
        if present[name] != expected:
            raise StoreError(f"{shown / name} does not have the recorded SHA-256: it is damaged; copy it again")
    if surplus := min(present.keys() - recorded.keys(), default=None):
        raise StoreError(f"{shown / surplus} is no file of the run; move it elsewhere")


def count_bytes(folder: Path) -> int:
    """Return the size in bytes of a folder's regular files at any depth, without links and unfinished work."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files of a folder at any depth, sorted by name, without links and unfinished work."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or path.name == WORK or LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _try_link(source: Path, target: Path) -> bool:
    """Hard-link a file, and return whether that worked: not every file system has links, or more of this file."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    return True
