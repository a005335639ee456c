"""Replace whole folders atomically: the new folder is made beside the old one, and both exchange their names.

At every moment the name leads to the old folder or to the new one. Linux exchanges two names in one step
(``renameat2`` with ``RENAME_EXCHANGE``). Elsewhere there are two renames: the old folder moves into the temporary
folder as ``NAME.replaced``, then the new one takes its name. A process killed between the two leaves a temporary folder
from which :func:`settle` completes the replacement; every reader and writer of ``NAME`` calls it first.
"""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from regrow.store.atomic import LEFTOVER, leftovers, staging_folder, sweep, sync
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.locks import Lock, LockedError, lock

WORK = ".work"
"""Name of the folder, inside a run folder, with the files of an unfinished run."""
_EXCHANGE, _HERE = 2, -100
T = TypeVar("T")


@contextlib.contextmanager
def replace_folder(folder: Path, owner: Lock | None = None) -> Iterator[Path]:
    """Yield a new folder that replaces ``folder`` as a whole when the block ends without an error."""
    place = folder.resolve()
    check_replaceable(folder)
    with explain_os_errors(folder), _parents(place), contextlib.ExitStack() as stack:
        settle(place)
        if owner is None and place.is_dir():
            stack.enter_context(lock(place))
        stage = stack.enter_context(staging_folder(place))
        new = stage / place.name
        new.mkdir()
        stack.enter_context(lock(new))
        yield new
        if place.is_dir():
            shutil.copymode(place, new)
        _sync_tree(new)
        _exchange(new, place)
        sync(place.parent)
        old = stage.with_suffix(".old")  # says that only this is to be deleted
        stage.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raise StoreError unless a folder can be created, or replaced as a whole."""
    place = folder.resolve()
    if place.exists() and not place.is_dir():
        raise StoreError(f"{folder} is a file; name a folder that does not exist yet")
    with contextlib.suppress(FileNotFoundError):
        if place in (here := Path.cwd(), *here.parents):
            raise StoreError(f"{folder} is the current folder or around it; name a folder of its own: {folder / 'out'}")
    if place.is_mount():
        raise StoreError(f"{folder} is a mount point, which cannot be replaced; name a folder in it: {folder / 'out'}")
    for one in (place.parent, place):
        if one.is_dir() and not os.access(one, os.W_OK | os.X_OK):
            denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            raise StoreError(f"{one} may not be written; choose a folder that is yours") from denied


def settle(folder: Path) -> None:
    """Complete the replacement of a folder that a killed process left half done, if there is one."""
    place = folder.resolve()
    for stage in [] if place.exists() else leftovers(place):
        if _was(stage, place).is_dir() and (stage / place.name).is_dir():
            with contextlib.suppress(OSError):  # another reader did it
                (stage / place.name).rename(place)


def clear_leftovers(folder: Path) -> None:
    """Delete the temporary folders that killed processes left beside a folder that they were replacing."""
    settle(folder)
    sweep(folder.resolve())


def link_tree(source: Path, target: Path, skip: Collection[str] = (), copy: Collection[str] = ()) -> None:
    """Hard-link the files of a folder into another one, or copy them where links are not supported."""
    for one in sorted(source.iterdir()):
        place = target / one.name
        if one.name in skip or LEFTOVER.fullmatch(one.name):
            continue
        if one.is_dir() and not one.is_symlink():
            place.mkdir(exist_ok=True)
            link_tree(one, place)
        elif not place.exists():
            if one.name in copy:
                shutil.copy2(one, place)
                continue
            try:
                os.link(one, place, follow_symlinks=False)
            except OSError:  # a file system without links, or with too many of this file
                shutil.copy2(one, place, follow_symlinks=False)


def read_whole(folder: Path, read: Callable[[], T]) -> T:
    """Read several files of a folder consistently: all from before or all from after a replacement."""
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
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _was(stage: Path, place: Path) -> Path:
    return stage / f"{place.name}.replaced"


def _exchange(new: Path, place: Path) -> None:
    """Give a folder the name of another one; if that exists, it moves to where the first one was."""
    if not place.exists():
        try:
            new.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise LockedError(f"{place} was made by another process meanwhile; choose another folder") from None
        return
    if _exchange_atomically(new, place):
        return
    place.rename(_was(new.parent, place))
    try:
        new.rename(place)
    except FileNotFoundError:  # a reader has completed it
        if not place.is_dir():
            raise


def _exchange_atomically(one: Path, other: Path) -> bool:
    """Exchange two names atomically; ``False`` if the system or the file system does not support it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if not call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def _parents(place: Path) -> Iterator[None]:
    """Create the parent folders of a new folder; remove them again if the block fails."""
    missing = [one for one in place.parents if not one.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def _sync_tree(folder: Path) -> None:
    for one in folder.iterdir():
        if one.is_dir() and not one.is_symlink():
            _sync_tree(one)
        elif one.is_file():
            sync(one)
    sync(folder)
