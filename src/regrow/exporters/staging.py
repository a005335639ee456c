"""Write an export folder in a temporary place, and move it into place as a whole once it is checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regrow.store.errors import StoreError
from regrow.store.models import keep_others
from regrow.store.replacing import WORK, replace_folder
from regrow.store.shapes import SHAPES


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``out`` when the block ends without an error.

    Args:
        out: The folder: new, empty, or of an earlier export, whose model is replaced.

    Raises:
        StoreError: If it is a file, holds other files, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; name a folder")
    if (out / "run.json").exists() or (out / WORK).exists():
        raise StoreError(f"{out} is the folder of a run; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / SHAPES).is_file():
        raise StoreError(f"{out} holds something else; choose another folder")
    with replace_folder(out) as made:
        yield made
        keep_others(out, made)
