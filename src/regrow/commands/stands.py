"""How far a recovery has got, on the disk: a run that is killed goes on where it was, bit for bit."""

from pathlib import Path

from regrow.methods.recovery import Stand
from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError, telling
from regrow.store.tensors import read_tensors, write_tensors

FORMAT = "regrow-recovery/1"


def write_stand(path: Path, stand: Stand, key: str) -> None:
    """Write how far a recovery has got.

    Args:
        path: The file to make or replace; its folder is made if need be.
        stand: What to keep.
        key: What it depends on; it will not be taken for the stand of another recovery.

    Raises:
        StoreError: If the disk is full or does not let us write.
    """
    with telling(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_tensors(path, stand.tensors, {"key": key, "step": stand.step, "values": dict(stand.values)}, FORMAT)


def read_stand(path: Path, key: str) -> Stand | None:
    """How far a recovery had got; ``None`` if there is none, or it is of something else, or damaged."""
    try:
        header, tensors = read_tensors(path, FORMAT)
        record = convert(header, schemas.RecoveryHeader)
        return Stand(record.step, tensors, record.values) if record.key == key else None
    except (StoreError, ValueError, KeyError, TypeError):
        return None
