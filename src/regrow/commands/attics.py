"""An attic on the disk: one safetensors file, whole or not at all."""

from pathlib import Path

import msgspec

from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.tensors import read_tensors, write_tensors
from regrow.surgery import Attic

FORMAT = "regrow-attic/1"


def write_attic(path: Path, attic: Attic) -> None:
    """Write what cuts have taken out of a network.

    Args:
        path: The file to make or replace; its folder must exist.
        attic: What to write.

    Raises:
        StoreError: If the disk is full or does not let us write; the old file stands.
    """
    write_tensors(path, attic.tensors(), {"attic": attic.record()}, FORMAT)


def read_attic(path: Path) -> Attic:
    """What was written there.

    Raises:
        StoreError: If there is no such file, it is no attic, or it is damaged.
    """
    try:
        header, tensors = read_tensors(path, FORMAT, None)
        record = convert(header.get("attic"), schemas.AtticHeader)
        return Attic.read(msgspec.to_builtins(record), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = " ".join(str(error).removeprefix(f"{path} ").split())[:200]
        raise StoreError(f"{path} holds no attic that can be used ({why}); restore the file") from None
