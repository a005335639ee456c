"""The working area of an unfinished run: a hidden folder in the run's own folder, never mistaken for a result.

It has a run if it has a ``run.json``. The ``run.json`` at the top of a folder is that of a finished run.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from regrow.store.atomic import LEFTOVER, write_text
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.replacing import WORK, link_tree
from regrow.store.run_record import RUN, check_same, read_run


def unfinished_folder(out: Path) -> Path | None:
    """Return the folder that has the files of the unfinished run in ``out``; ``None`` if there is none.

    Args:
        out: The folder of the run.

    Raises:
        StoreError: If a ``run.json`` is damaged, or the working area leads out of the folder.
    """
    check_area(out / WORK)
    return out / WORK if (out / WORK / RUN).is_file() else None


def is_resumable(out: Path, wanted: Mapping[str, object]) -> bool:
    """Whether a folder holds the wanted run, unfinished; ``False`` if it is empty or missing, else it is refused.

    Args:
        out: The folder.
        wanted: The result of :func:`regrow.store.run_record.run_identity` for the wanted run.

    Raises:
        StoreError: If the folder holds anything else: another run, this one finished, or files of something else.
    """
    if not out.is_dir():
        return False
    names = {one.name for one in out.iterdir() if not LEFTOVER.fullmatch(one.name)}
    if RUN in names:
        check_same(out, read_run(out), wanted)
        raise StoreError(f"{out / RUN} has no finishing time; restore it, or delete {out}")
    if names - {WORK}:
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")
    begun = unfinished_folder(out)
    if begun is None:
        return False
    check_same(out, read_run(begun) | {"finished": None}, wanted)
    return True


def check_area(area: Path) -> None:
    """Raise StoreError if the working area or a folder in it is a symbolic link, so that all writes stay inside it.

    Args:
        area: The working area.

    Raises:
        StoreError: If one is a symbolic link, or the working area is a file.
    """
    inside = (Path(at) / name for at, names, _ in os.walk(area) for name in names)
    for one in (area, *inside):
        if one.is_symlink() or (one.exists() and not one.is_dir()):
            raise StoreError(f"{one} is not a folder of its own, as unfinished work needs it; delete {area}")


def make_area(out: Path) -> Path:
    """Create an empty working area in a folder, and return its path.

    Args:
        out: The folder of the run.
    """
    with explain_os_errors(out):
        if (out / WORK).exists():
            shutil.rmtree(out / WORK)
        (out / WORK).mkdir()
    return out / WORK


def copy_into_area(out: Path) -> None:
    """Fill the working area with the files of the finished run in a folder, so that they can be changed there.

    Args:
        out: The folder of the run.
    """
    area = make_area(out)
    with explain_os_errors(out):
        link_tree(out, area, skip={WORK, RUN}, copy={"metrics.jsonl"})
    write_text(area / RUN, (out / RUN).read_text(encoding="utf-8"))  # last: now there is a run
