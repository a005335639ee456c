"""Exports that are folders: they are made beside their place, checked there, and moved into it; or nothing changes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regrow.store.atomic import StoreError, partial, telling
from regrow.store.models import CARRIED, SHAPES


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder of the same name elsewhere, whose files move into ``out`` once the block ends without an error.

    Args:
        out: The folder; new, empty, or of an earlier export, whose weights and code are replaced.

    Raises:
        StoreError: If it is a file, holds something else, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; name a folder")
    if (out / "run.json").exists():
        raise StoreError(f"{out} is the folder of a run; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / SHAPES).is_file():
        raise StoreError(f"{out} holds something else; choose another folder")
    with telling(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = partial(out)
        try:
            made = stage / out.name
            made.mkdir(parents=True)
            yield made
            out.mkdir(exist_ok=True)
            fresh = {path.name for path in made.iterdir()}
            for path in sorted(made.iterdir()):
                path.replace(out / path.name)
            for path in [*out.glob("model*.safetensors*"), *(out / name for name in CARRIED)]:
                if path.name not in fresh:
                    path.unlink(missing_ok=True)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
