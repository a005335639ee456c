"""The result of an export, and the errors of exporting."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from regrow.errors import RefusedError
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


class ExportError(ValueError):
    """Raised if a format cannot represent the network, or the file cannot be written or read back."""


class CheckError(ExportError, RefusedError):
    """Raised if an export, read back, differs from the network; the export is not kept."""


@dataclass(frozen=True)
class Written:
    """The result of an export: where it is, its size, and how it compared with the network.

    Args:
        path: The file or folder.
        bytes: Its size on disk in bytes.
        checked: Results of the comparison after reading it back: name (``max_abs_diff``, ``next_tokens_differ``) →
            value.
        notes: What a user of the file must know.
        memory: The limit, the prediction and the peak in bytes, if memory was limited.
    """

    path: Path
    bytes: int
    checked: Mapping[str, float | int | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    memory: Mapping[str, int | None] = field(default_factory=dict)
