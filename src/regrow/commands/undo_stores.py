"""An undo store on the disk: one safetensors file, whole or not at all."""

from pathlib import Path

import msgspec

from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.tensors import read_tensors, write_tensors
from regrow.surgery import UndoStore

FORMAT = "regrow-attic/1"


def write_undo_store(path: Path, undo: UndoStore) -> None:
    """Write what cuts have taken out of a network.

    Args:
        path: The file to make or replace; its folder must exist.
        undo: What to write.

    Raises:
        StoreError: If the disk is full or does not let us write; the old file stands.
    """
    write_tensors(path, undo.tensors(), {"attic": undo.record()}, FORMAT)


def read_undo_store(path: Path) -> UndoStore:
    """What was written there.

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
