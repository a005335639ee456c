"""Undo stores on disk: one safetensors file each, written atomically."""

from pathlib import Path

import msgspec

from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.tensors import read_tensors, write_tensors
from regrow.surgery import UndoStore

FORMAT = "regrow-attic/1"


def write_undo_store(path: Path, undo: UndoStore) -> None:
    """Write the units that cuts removed from a network to a file.

    Args:
        path: The file to make or replace; its folder must exist.
        undo: The store of the removed units.

    Raises:
        StoreError: If the disk is full or the file cannot be written; an old file is not changed.
    """
    write_tensors(path, undo.tensors(), {"attic": undo.record()}, FORMAT)


def read_undo_store(path: Path) -> UndoStore:
    """Read the units that cuts removed from a file that :func:`write_undo_store` wrote.

    Args:
        path: The file.

    Raises:
        StoreError: If there is no such file, it is no undo store, or it is damaged.
    """
    try:
        header, tensors = read_tensors(path, FORMAT, None)
        record = convert(header.get("attic"), schemas.UndoStoreHeader)
        return UndoStore.read(msgspec.to_builtins(record), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).removeprefix(f"{path} ").split())[:200]
        raise StoreError(f"{path} holds no undo store that can be used ({why}); restore the file") from None
